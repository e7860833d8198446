"""A session: one sequence of tokens with its KV cache, fed turn by turn.

It knows nothing of text or sampling; `generate.py` does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from doubleweave import _native
from doubleweave.errors import InputError
from doubleweave.ir.cache_format import heads_of
from doubleweave.ir.embeddings import behind_lookup, why_no_rows
from doubleweave.ir.manifest import ModelInfo
from doubleweave.ir.split import ITEM_BYTES, Split, Value, most_rows, whole_cache
from doubleweave.predict.plan_run import RunPlanner
from doubleweave.predict.profile import Profile
from doubleweave.runtime.instances import Instances
from doubleweave.runtime.llm.bind import bind
from doubleweave.runtime.llm.chunk_progress import OnChunk, watching
from doubleweave.runtime.llm.encoded import Encoded
from doubleweave.runtime.llm.frequencies import Frequencies
from doubleweave.runtime.llm.rows import checked_rows
from doubleweave.runtime.llm.states import States
from doubleweave.runtime.module.method import Method
from doubleweave.runtime.native_errors import as_run_errors
from doubleweave.runtime.threads import settled_threads
from doubleweave.schedule.choice import Choice, Wish, chunk_shape
from doubleweave.schedule.makers import Maker
from doubleweave.schedule.pattern import Want
from doubleweave.schedule.verify import Verified
from doubleweave.timeline.from_tasks import timeline_of
from doubleweave.timeline.timeline import Timeline

FloatArray = npt.NDArray[np.float32]
TokenIds = Sequence[int] | npt.NDArray[np.integer]

# How many chunks a scoring run takes: each holds the logits of all its rows, rows x vocabulary x 4 bytes.
_SCORE_CHUNKS = 4
# Prepared runs by prompt length. Decode is one of them; a conversation's turns differ in length.
_KEPT_EXECUTIONS = 8


@dataclass(frozen=True)
class _Prepared:
    choice: Choice
    verified: Verified
    execution: _native.Execution
    buffers: _native.Buffers
    given: npt.NDArray[Any]  # the ids or rows of its tokens, and padding


class _Entry(NamedTuple):
    """Where tokens come into the model: the value that they are written to, and the plans of runs from there on."""

    value: Value
    planner: RunPlanner


class Recorded(NamedTuple):
    """A run that was recorded: task t ran from `start_ns[t]` to `end_ns[t]`, behind `cached` tokens."""

    choice: Choice
    verified: Verified
    start_ns: npt.NDArray[np.int64]
    end_ns: npt.NDArray[np.int64]
    num_tokens: int
    cached: int

    @property
    def took_ns(self) -> npt.NDArray[np.int64]:
        return self.end_ns - self.start_ns

    @property
    def makespan_s(self) -> float:
        return float(self.end_ns.max()) / 1e9


class Session:
    """Token ids go in, logits come out; the cache stays between calls.

    Made by `Program.session`. Not thread safe; several sessions of one program are independent, but must
    not run at the same time (they share the loaded methods).
    """

    def __init__(
        self,
        model: ModelInfo,
        split: Split,
        instances: Instances,
        profile: Profile,
        wish: Wish,
        encoder: Method | None = None,
    ) -> None:
        self.model = model
        self.max_context = model.max_context
        self._instances = instances
        self._split = split
        self.planner = RunPlanner(split, profile, self.max_context)
        self._ids = _Entry(split.main.value("input_ids"), self.planner)
        self.planner.check(wish)
        self.schedule = wish.schedule
        self.threads = settled_threads(self.planner, wish.threads)
        self._wish: Wish | Choice = wish._replace(threads=self.threads)
        self.recorded: Recorded | None = None
        self.on_chunk: OnChunk | None = None  # called for every chunk that is done while a run goes on
        self._most_rows = most_rows(chunk_shape(split))
        cached = [value for value in split.values if value.kind == "cache"]
        # Padded rows of the last chunk are written behind the context: the cache has room for a chunk more.
        with as_run_errors():
            self._cache = _native.KvCache(
                [value.row_bytes for value in cached],
                self.max_context,
                self._most_rows,
                [value.window for value in cached],
            )
        self._cache_regions = {value.name: self._cache.region(i) for i, value in enumerate(cached)}
        self._states = States([value for value in split.values if value.kind == "state"])
        self._encoded = Encoded(split, encoder)
        self._before: int | None = None  # the length at which the last prompt began, which has a snapshot
        whole = (segment for segment in split.segments if not segment.each_row)
        is_whole = any(whole_cache(port) for segment in whole for port in segment.inputs)
        self._whole_bytes = self.max_context * sum(value.row_bytes for value in cached) if is_whole else 0
        self._output = next(value.name for value in split.values if value.kind == "output")
        self._frequencies = Frequencies(model.rotary_border, self.max_context + self._most_rows)
        self._makers: dict[str, Maker] = {}
        self._prepared: OrderedDict[tuple[str, int, int, Want, Choice], _Prepared] = OrderedDict()

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._cache.length

    @property
    def kv_bytes(self) -> int:
        """Bytes of memory the cache holds now (whole pages); all of a cache of fixed length."""
        return self._whole_bytes or self._cache.committed_bytes

    @property
    def kv_bytes_peak(self) -> int:
        return self._whole_bytes or self._cache.peak_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of a model that keeps any, with their snapshots."""
        return self._states.num_bytes

    @property
    def encoded_bytes(self) -> int:
        """Bytes of the keys and values that an encoder gave."""
        return self._encoded.num_bytes

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers for values between calls, of all runs that are kept prepared."""
        return sum(prepared.buffers.total_bytes for prepared in self._prepared.values())

    @property
    def score_rows(self) -> int:
        """Tokens that one run of `score` takes."""
        return self._most_rows * _SCORE_CHUNKS

    def encode(self, encoder_input: Any) -> None:
        """Begin a new sequence, of a model with an encoder: what `encoder_input` says is what all its tokens read.

        `encoder_input` is an array or tensor of the model's own: token ids int64 [1, E], or features such as Whisper's,
        float32 [1, bins, frames]. Tokens that were appended are forgotten; `truncate` and `reset` keep what was
        encoded. Raises InputError for another shape or dtype, and for a model without an encoder.
        """
        self._encoded.encode(encoder_input)
        self.reset()

    @property
    def encodes_tokens(self) -> bool:
        """Whether the model has an encoder, and it takes token ids."""
        return self._encoded.takes_tokens

    def append(self, token_ids: TokenIds, *, record: bool = False) -> FloatArray:
        """Append tokens (ids, 1-D) and return the logits of the last one, float32 [vocab].

        With `record` the run's `timeline` is kept. Raises InputError for no tokens, ids out of range, more
        than one sequence, or more tokens than the context has room for; then nothing was appended.
        """
        ids = self._checked(token_ids)
        self._change_frequencies(len(ids))
        return self._last(self._run(self._ids, ids, "last", record))

    def append_embeddings(self, rows: Any, *, record: bool = False) -> FloatArray:
        """Append rows in the place of tokens' embeddings, float32 [T, width], and return the logits of the last one,
        float32 [vocab].

        A row is what the model's input embeddings give for a token (transformers' `inputs_embeds`): such as what an
        encoder makes of an image. It is one token of the sequence: `append`, `truncate` and `record` go on as ever.
        Raises InputError for rows of another width or dtype, numbers that are none, more rows than the context has room
        for, and a model that reads token ids elsewhere; then nothing was appended.
        """
        entry = self._rows
        given = self._checked_rows(rows, entry.value)
        self._change_frequencies(len(given))
        return self._last(self._run(entry, given, "last", record))

    def expect(self, num_tokens: int) -> None:
        """Say that the sequence will have so many tokens; until `reset`.

        Only LongRoPE asks for it (Phi-3, Phi-4): behind `model.rotary_border` tokens all tokens have other frequencies,
        and a session that passes it computes its tokens anew. One that expects to does not have to.
        """
        self._frequencies.expect(num_tokens)

    def append_recorded(self, token_ids: TokenIds) -> Recorded:
        """Append tokens as `append` does, and return the run with its times."""
        self.append(token_ids, record=True)
        assert self.recorded is not None
        return self.recorded

    def score(self, token_ids: TokenIds) -> FloatArray:
        """Append tokens and return the logits of each, float32 [T, vocab]. Errors as for `append`."""
        ids = self._checked(token_ids)
        self._change_frequencies(len(ids))
        parts = []
        for start in range(0, len(ids), self.score_rows):
            prepared = self._run(self._ids, ids[start : start + self.score_rows], "all", False)
            parts += [
                self._logits(prepared, index, chunk.num_tokens).copy()
                for index, chunk in enumerate(prepared.verified.graph.chunks)
            ]
        return np.concatenate(parts)

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens; memory past them is given back.

        The states of a recurrent model forget nothing: such a session goes back to a snapshot alone, which `snapshot`
        takes, and which is taken where the last prompt began. Raises InputError for any other number.
        """
        if not 0 <= num_tokens <= self.length:
            raise InputError(
                f"truncate: found {num_tokens}, expected 0 to {self.length} (the tokens in the cache)"
            )
        if self._states and num_tokens < self.length and num_tokens not in self._states.lengths:
            raise InputError(
                f"truncate: found {num_tokens}, expected {', '.join(map(str, self._states.lengths))} or "
                f"{self.length}: the model keeps states, which go back to snapshots alone; take one with "
                "snapshot() where you want to go back to"
            )
        if 0 < num_tokens < self._cache.least_length:
            raise InputError(
                f"truncate: found {num_tokens}, expected 0 or {self._cache.least_length} to {self.length}: layers "
                "with a window keep only the rows that it shows, so a session does not go back further; reset it, "
                "and append the tokens again"
            )
        if self._states and num_tokens < self.length:
            self._states.go_back(num_tokens)
        self._cache.truncate(num_tokens)
        self._frequencies.truncate(num_tokens)

    def snapshot(self) -> int:
        """Keep a way back to the tokens in the cache, and return their number: `truncate` takes it.

        A session without states goes back to any number and keeps nothing.
        """
        if self._states:
            self._states.take(self.length)
            self._before = None if self._before == self.length else self._before
        return self.length

    def move_to(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens, and the states as they are: for measuring how long runs take behind so
        many tokens. Their numbers are wrong where there are states."""
        self._frequencies.lose()
        self._states.move(self.length, num_tokens)
        self._cache.truncate(num_tokens, is_forced=True)

    def fill(self, rows: Mapping[str, FloatArray], num_tokens: int) -> None:
        """Put rows into an empty cache, float32 [num_tokens, width] for each of its values, which keeps them in its own
        format, as if tokens made them, and numbers into the states, by name as well.

        So a model can be tried at a far position without running what comes before it.
        """
        self._frequencies.lose()
        with as_run_errors():
            self._cache.prepare(num_tokens)
        for number, name in enumerate(self._cache_regions):
            value = self._split.main.value(name)
            self._cache.write(number, rows[name], heads_of(value)[0], value.dtype)
        self._states.fill(rows, num_tokens)
        self._cache.note_length(num_tokens)

    def reset(self) -> None:
        """Forget every token."""
        self._frequencies.forget()
        self._clear()

    def _clear(self) -> None:
        self._cache.truncate(0)
        self._states.reset()

    def _checked(self, token_ids: TokenIds) -> npt.NDArray[np.int64]:
        self._encoded.check()
        try:
            ids = np.asarray(token_ids)
        except ValueError:
            raise InputError(
                "token ids: found lists of several lengths, expected one list of integers"
            ) from None
        if ids.ndim == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.ndim != 1:
            raise InputError(
                f"token ids: found shape {list(ids.shape)}, expected [T]: a cache holds one sequence, so a batch "
                "larger than 1 needs one session a sequence"
            )
        if len(ids) == 0:
            raise InputError("token ids: found none, expected at least one: the prompt is empty")
        if not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"token ids: found dtype {ids.dtype}, expected integers")
        vocab = self.model.vocab_size
        wrong = ids[(ids < 0) | (ids >= vocab)]
        if len(wrong):
            raise InputError(f"token ids: found {int(wrong[0])}, expected 0 to {vocab - 1} (the vocabulary)")
        self._check_room(len(ids))
        return ids.astype(np.int64)

    def _checked_rows(self, rows: Any, value: Value) -> FloatArray:
        self._encoded.check()
        found = checked_rows(rows, value.row_bytes // ITEM_BYTES[value.dtype])
        self._check_room(len(found))
        return found

    def _check_room(self, more: int) -> None:
        if self.length + more > self.max_context:
            raise InputError(
                f"context: {self.length} tokens in the cache and {more} more make {self.length + more}, "
                f"expected at most {self.max_context}: shorten the prompt, or truncate or reset the session"
            )

    @cached_property
    def _rows(self) -> _Entry:
        """Where rows come in; InputError for a model that takes none."""
        if why := why_no_rows(self._split):
            raise InputError(f"embeddings: {why}; append token ids")
        split, value = behind_lookup(self._split)
        return _Entry(value, RunPlanner(split, self.planner.profile, self.max_context))

    def _change_frequencies(self, more: int) -> None:
        """Take the frequencies of the text that so many more tokens make, and compute the tokens so far anew by them
        where they are others. A run that fails here leaves the tokens that were computed."""
        if again := self._frequencies.change(self.length + more):
            self._clear()
            for name, given in again:
                self._run(self._ids if name == self._ids.value.name else self._rows, given, "last", False)

    def _run(self, entry: _Entry, given: npt.NDArray[Any], want: Want, record: bool) -> _Prepared:
        """Run `given`, a row a token: their ids, int64 [T], or what the entry takes in their place."""
        num_tokens = len(given)
        prepared = self._prepare(entry, num_tokens, want)
        prepared.given[:num_tokens] = given
        base = self.length
        last = prepared.verified.graph.chunks[-1]
        with as_run_errors():
            self._cache.prepare(base + last.start + last.compiled_size)
        if self._states and num_tokens > 1:
            self._keep_way_back(base)
        try:
            with as_run_errors(), watching(prepared.execution, prepared.verified, self.on_chunk):
                events = prepared.execution.run(base, record)
        except BaseException:
            # Rows behind the cached tokens count for nothing, but states are changed in place, but for one token's.
            if self._states and num_tokens > 1:
                self._states.go_back(base)
            raise
        self._cache.note_length(base + num_tokens, last.compiled_size - last.num_tokens)
        self._frequencies.note(entry.value.name, given)
        if num_tokens > 1:  # a decode step touches one row of the embedding table, and runs too often
            self._instances.trim()
        if events is not None:
            start_ns, end_ns = np.zeros((2, len(prepared.verified.graph)), np.int64)
            start_ns[events[:, 0]], end_ns[events[:, 0]] = events[:, 2], events[:, 3]
            self.recorded = Recorded(prepared.choice, prepared.verified, start_ns, end_ns, num_tokens, base)
        return prepared

    def _keep_way_back(self, base: int) -> None:
        """A snapshot of the states before a prompt, in the place of the one before the last prompt."""
        if self._before is not None:
            self._states.drop(self._before)
        self._before = base if base and base not in self._states.lengths else None
        if self._before is not None:
            self._states.take(base)

    @property
    def timeline(self) -> Timeline | None:
        """When each task ran in the last recorded run; None if no run was recorded."""
        if self.recorded is None:
            return None
        _, verified, start_ns, end_ns, num_tokens, cached = self.recorded
        title = f"{verified.schedule.name}, {num_tokens:,} tokens, measured"
        return timeline_of(verified.graph, verified.schedule, start_ns, end_ns, title, cached)

    def _prepare(self, entry: _Entry, num_tokens: int, want: Want) -> _Prepared:
        if isinstance(self._wish, Choice):
            choice = entry.planner.settled(self._wish, self.threads, num_tokens)
        else:
            choice = entry.planner.choose(self._wish, num_tokens)
        key = (entry.value.name, num_tokens, self._encoded.num_rows, want, choice)
        if key in self._prepared:
            self._prepared.move_to_end(key)
            return self._prepared[key]
        maker = self._makers.get(choice.schedule)
        verified = entry.planner.plan_run(choice, num_tokens, want, maker).verified
        graph = verified.graph
        with as_run_errors():
            buffers = _native.Buffers(list(graph.buffer_bytes))
        last = graph.chunks[-1]
        # Of rows as of ids: [tokens, …].
        sizes = (last.start + last.compiled_size, *map(int, entry.value.shape[2:]))
        given = np.zeros(sizes, entry.value.dtype)
        regions = [buffers.region(i) for i in range(len(graph.buffer_bytes))]
        inputs = {
            entry.value.name: _native.Region.of(given),
            "position_ids": _native.Region.of(self._frequencies.positions),
        }
        named = inputs | self._cache_regions | self._states.regions() | self._encoded.regions()
        rows, all_rows = self._encoded.num_rows, want == "all"
        execution = bind(verified, regions, named, self._instances, all_rows=all_rows, encoded_rows=rows)
        prepared = _Prepared(choice, verified, execution, buffers, given)
        self._prepared[key] = prepared
        while len(self._prepared) > _KEPT_EXECUTIONS:
            self._prepared.popitem(last=False)
        return prepared

    def use(self, choice: Choice, maker: Maker | None = None) -> None:
        """Run every later prompt by this choice.

        `maker` builds the schedule; `choice.schedule` is the name it is shown under.
        """
        self._wish = choice
        self.schedule = choice.schedule
        if maker is not None:
            self._makers[choice.schedule] = maker

    def _last(self, prepared: _Prepared) -> FloatArray:
        last = self._logits(prepared, len(prepared.verified.graph.chunks) - 1, 1)
        return last.reshape(-1).copy()

    def _logits(self, prepared: _Prepared, chunk: int, rows: int) -> FloatArray:
        buffer = prepared.verified.graph.buffer(self._output, chunk)
        return prepared.buffers.view(buffer, [rows, self.model.vocab_size])
