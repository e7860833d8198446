"""A compiled program, opened: its methods one by one, and sessions over all of them. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

from doubleweave.errors import InputError
from doubleweave.ir import manifest
from doubleweave.ir.split import ENCODER
from doubleweave.predict.find_profile import find_profile
from doubleweave.runtime.instances import open_instances
from doubleweave.runtime.llm.generate import Generation, generate, run
from doubleweave.runtime.llm.sampling import Sampling
from doubleweave.runtime.llm.session import Session, TokenIds
from doubleweave.runtime.llm.text import Stream, Text
from doubleweave.runtime.module.method import Method, segment_functions
from doubleweave.runtime.module.runner import Runner
from doubleweave.runtime.module.states import States
from doubleweave.runtime.module.submit import Workers
from doubleweave.runtime.packed_weights import packed_weights
from doubleweave.schedule.choice import AUTO, Wish


class Program:
    """A program directory: `methods`, `session()`, `generate()`.

    `methods` has each segment's, and each encoder by its name (entries/encoders.py), with its nested modules.
    `keeps_packed`: whether the packed weights of a large program are kept in the cache folder (packed_weights.py).
    """

    def __init__(self, folder: Path, found: manifest.Manifest, *, keeps_packed: bool = True) -> None:
        self.folder = folder
        self.manifest = found
        self.split = found.split.decoder
        assert found.model is not None
        self.model = found.model
        packed = packed_weights(found.split, found.program_sha256, found.name) if keeps_packed else None
        self.instances = open_instances(folder, found.split, packed)
        workers = Workers()
        runner = Runner(found.split, self.instances, States(found.split, folder / manifest.STATE_FILE))
        functions = segment_functions(found.split.segments)
        functions.update((function.name, function) for function in found.split.functions[1:])
        self.methods = {name: Method(name, function, runner, workers) for name, function in functions.items()}

    @cached_property
    def text(self) -> Text:
        """The tokenizer and chat template; raises ProgramError when the program has none."""
        manifest.check_tokenizer(self.folder, self.manifest)
        return Text(self.folder / manifest.TOKENIZER_FILE, self.model)

    def text_for(self, stop: Sequence[str]) -> Text | None:
        """`text`, or None for a program without a tokenizer; ProgramError if stop texts need one."""
        has_tokenizer = (self.folder / manifest.TOKENIZER_FILE).exists()
        return self.text if has_tokenizer or stop else None

    def session(
        self,
        schedule: str = AUTO,
        threads: int | None = None,
        *,
        workers: Sequence[str] | None = None,
        chunk: int | None = None,
        profile: str | None = None,
    ) -> Session:
        """A new session with an empty cache.

        `threads` defaults to the machine's cores, `workers` (their devices, such as ("npu", "cpu")) to what the
        schedule takes by itself, `chunk` (the most tokens of a chunk) to the program's; `profile` is a TOML file or the
        name of one that comes with the package, by default the program's own.

        Raises InputError for a schedule that does not exist, a profile that does not fit, more threads than cores, or
        another number above 1 than loaded programs use.
        """
        found = find_profile(self.folder, self.manifest, profile)
        wish = Wish(schedule, threads, None if workers is None else tuple(workers), chunk)
        return Session(self.model, self.split, self.instances, found, wish, self.methods.get(ENCODER))

    def stream(
        self, session: Session, token_ids: TokenIds, max_new_tokens: int, sampling: Sampling | None = None
    ) -> Iterator[int]:
        """Append a prompt to a session and yield new tokens until an end token or `max_new_tokens`.

        `text.stream()` turns them into text one by one; `stream_text` does both.
        """
        return generate(session, token_ids, max_new_tokens, sampling or Sampling())

    def stream_text(
        self,
        session: Session,
        prompt: str | TokenIds,
        max_new_tokens: int = 128,
        *,
        raw: bool = False,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Iterator[str]:
        """Append a prompt to a session and yield the answer's text as it comes, in whole characters.

        The pieces joined are the text of the new tokens, up to the first of the texts `stop`. The prompt, `raw` and
        `sampling` are those of `generate`.
        """
        chosen, stream = _sampling("stream_text", sampling), self.text.stream(stop)
        ids = self.text.encode(prompt, raw=raw) if isinstance(prompt, str) else prompt
        return _pieces(generate(session, ids, max_new_tokens, chosen), stream)

    def generate(
        self,
        prompt: str | TokenIds | None = None,
        max_new_tokens: int = 128,
        *,
        inputs_embeds: Any = None,
        session: Session | None = None,
        encoder_input: Any = None,
        raw: bool = False,
        stop: tuple[str, ...] = (),
        **sampling: Any,
    ) -> Generation:
        """Generate from a text, from token ids, or from rows of embeddings (`inputs_embeds`, which
        `Session.append_embeddings` describes), and return the Generation (text, token_ids, rates).

        `encoder_input` is what a model with an encoder generates from, as `Session.encode` takes it, or a text where it
        takes token ids. The prompt is then the beginning of the decoder's text, by default the model's own. `raw`
        leaves the chat template out; `sampling` takes temperature, top_p and seed (greedy without).
        """
        chosen = _sampling("generate", sampling)
        if encoder_input is not None and prompt is None and inputs_embeds is None:
            prompt = self.model.start_token_ids or None
        if (prompt is None) == (inputs_embeds is None):
            found = "neither" if prompt is None else "both"
            raise InputError(
                f"generate: found {found} of a prompt and inputs_embeds, expected one; append what comes before it to "
                "a session, and give that"
            )
        session = session or self.session()
        if encoder_input is not None:
            is_text = isinstance(encoder_input, str)
            session.encode([self.text.encode(encoder_input, raw=True)] if is_text else encoder_input)
        ids = self.text.encode(prompt, raw=raw) if isinstance(prompt, str) else prompt
        return run(
            session, ids, max_new_tokens, chosen, self.text_for(stop), stop, inputs_embeds=inputs_embeds
        )


def _sampling(where: str, given: dict[str, Any]) -> Sampling:
    known = {field.name for field in fields(Sampling)}
    if unknown := sorted(set(given) - known):
        raise InputError(f"{where}: found argument {unknown[0]!r}, expected temperature, top_p or seed")
    return Sampling(**given)


def _pieces(tokens: Iterator[int], stream: Stream) -> Iterator[str]:
    for token in tokens:
        if piece := stream.push(token):
            yield piece
        if stream.stopped:
            return
    if piece := stream.finish():
        yield piece
