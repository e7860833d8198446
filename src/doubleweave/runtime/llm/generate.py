"""Generate text: feed a prompt to a session, sample, feed back, until an end token.

It knows nothing of schedules or methods.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from doubleweave.errors import InputError
from doubleweave.runtime.llm.sampling import Sampler, Sampling
from doubleweave.runtime.llm.session import Session, TokenIds
from doubleweave.runtime.llm.text import Text


@dataclass(frozen=True)
class Generation:
    """New tokens and rates. `text` is None when the program has no tokenizer.

    `ttft_s` is the time from the prompt to the first token, `prefill_tok_per_s` the prompt's tokens over it.
    `decode_tok_per_s` counts the tokens after the first; None where there are none. `finish` is "end" (an end
    token), "stop" (a stop text), "length" or "context" (no room left).
    """

    text: str | None
    token_ids: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    prefill_tok_per_s: float
    decode_tok_per_s: float | None
    kv_bytes_peak: int
    schedule: str
    threads: int
    finish: str


def generate(
    session: Session,
    token_ids: TokenIds | None,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    inputs_embeds: Any = None,
    record: bool = False,
) -> Iterator[int]:
    """Yield new tokens, without the end token. The prompt is token ids, or None and rows of embeddings.

    Raises the errors of `Session.append` and of `Session.append_embeddings`.
    """
    if max_new_tokens < 1:
        raise InputError(f"number of new tokens: found {max_new_tokens}, expected at least 1")
    sampler = Sampler(sampling)
    ends = set(session.model.eos_token_ids)
    if token_ids is None:
        logits = session.append_embeddings(inputs_embeds, record=record)
    else:
        logits = session.append(token_ids, record=record)
    for count in range(max_new_tokens):
        token = sampler(logits)
        if token in ends:
            return
        yield token
        # The last token is not appended: nobody asks for the logits behind it.
        if count + 1 < max_new_tokens and session.length < session.max_context:
            logits = session.append([token])
        else:
            return


def run(
    session: Session,
    token_ids: TokenIds | None,
    max_new_tokens: int,
    sampling: Sampling,
    text: Text | None,
    stop: Sequence[str] = (),
    on_text: Callable[[str], None] = lambda piece: None,
    record: bool = False,
    inputs_embeds: Any = None,
) -> Generation:
    """Generate to the end and measure; `on_text` gets the text piece by piece (none without `text`). The prompt is
    token ids, or None and rows of embeddings."""
    stream = None if text is None else text.stream(stop)
    start = time.perf_counter()
    first = last = None
    ids: list[int] = []
    finish = "length"
    pieces: list[str] = []
    for token in generate(
        session, token_ids, max_new_tokens, sampling, inputs_embeds=inputs_embeds, record=record
    ):
        last = time.perf_counter()
        first = first or last
        ids.append(token)
        if stream is not None:
            pieces.append(stream.push(token))
            on_text(pieces[-1])
            if stream.stopped:
                finish = "stop"
                break
    end = time.perf_counter()
    if finish == "length" and len(ids) < max_new_tokens:
        finish = "end" if session.length < session.max_context else "context"
    if stream is not None:
        pieces.append(stream.finish())
        on_text(pieces[-1])
    prompt_tokens = len(token_ids) if token_ids is not None else int(inputs_embeds.shape[-2])
    ttft = (first or end) - start
    decode_s = (last or end) - (first or end)
    return Generation(
        text="".join(pieces) if stream is not None else None,
        token_ids=tuple(ids),
        prompt_tokens=prompt_tokens,
        new_tokens=len(ids),
        ttft_s=ttft,
        prefill_tok_per_s=prompt_tokens / ttft,
        decode_tok_per_s=(len(ids) - 1) / decode_s if len(ids) > 1 and decode_s > 0 else None,
        kv_bytes_peak=session.kv_bytes_peak,
        schedule=session.schedule,
        threads=session.threads,
        finish=finish,
    )
