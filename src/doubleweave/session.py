"""A session: one sequence of tokens with its KV cache, fed turn by turn.

It knows nothing of text or sampling; `generate.py` does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from doubleweave import _native
from doubleweave.chunks import cut
from doubleweave.errors import InputError, RunError
from doubleweave.execution import Memory, bind
from doubleweave.instances import Instances
from doubleweave.ir import Dynamic, Segment, Static, most_rows
from doubleweave.manifest import Manifest
from doubleweave.schedule import SCHEDULES, make, verify
from doubleweave.tasks import TaskGraph, Want, build
from doubleweave.timeline import Event, Timeline

FloatArray = npt.NDArray[np.float32]
TokenIds = Sequence[int] | npt.NDArray[np.integer]

# How many chunks a scoring run takes at once: each holds its own logits.
_SCORE_CHUNKS = 4
_KEPT_EXECUTIONS = 8


@dataclass(frozen=True)
class _Prepared:
    graph: TaskGraph
    execution: _native.Execution
    buffers: _native.Buffers
    input_ids: npt.NDArray[np.int64]
    num_workers: int


class Session:
    """Token ids go in, logits come out; the cache stays between calls.

    Made by `Program.session`. Not thread safe; several sessions of one program are independent, but must
    not run at the same time (they share the loaded methods).
    """

    def __init__(self, manifest: Manifest, instances: Instances, schedule: str, threads: int) -> None:
        if schedule not in SCHEDULES:
            raise InputError(f"schedule: found {schedule!r}, expected one of {', '.join(SCHEDULES)}")
        most = _native.max_threads()
        if not 1 <= threads <= most:
            raise InputError(f"threads: found {threads}, expected 1 to {most} (the cores of this machine)")
        self.manifest = manifest
        assert manifest.model is not None
        self.model = manifest.model
        self._instances = instances
        self.schedule = schedule
        self.threads = threads
        self.timeline: Timeline | None = None
        split = manifest.split
        self._shape = _chunk_shape(split.segments)
        self._most_rows = most_rows(self._shape)
        cached = [value for value in split.values if value.kind == "cache"]
        max_context = self.model.max_context
        self._cache = _native.KvCache([value.row_bytes for value in cached], max_context, self._most_rows)
        self._cache_regions = {value.name: self._cache.region(i) for i, value in enumerate(cached)}
        self._output = next(value.name for value in split.values if value.kind == "output")
        self._positions = np.arange(max_context + self._most_rows, dtype=np.int64)
        self._prepared: OrderedDict[tuple[int, Want], _Prepared] = OrderedDict()

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._cache.length

    @property
    def max_context(self) -> int:
        return self.model.max_context

    @property
    def kv_bytes(self) -> int:
        """Bytes of memory the cache holds now (whole pages)."""
        return self._cache.committed_bytes

    @property
    def kv_bytes_peak(self) -> int:
        return self._cache.peak_bytes

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers for values between calls, of all runs that are kept prepared."""
        return sum(prepared.buffers.total_bytes for prepared in self._prepared.values())

    @property
    def score_rows(self) -> int:
        """Tokens that one run of `score` takes."""
        return self._most_rows * _SCORE_CHUNKS

    def append(self, token_ids: TokenIds, *, record: bool = False) -> FloatArray:
        """Append tokens (ids, 1-D) and return the logits of the last one, float32 [vocab].

        With `record` the run's `timeline` is kept. Raises InputError for no tokens, ids out of range, more
        than one sequence, or more tokens than the context has room for; then nothing was appended.
        """
        ids = self._checked(token_ids)
        prepared = self._run(ids, "last", record)
        last = self._logits(prepared, len(prepared.graph.chunks) - 1, 1)
        return last.reshape(-1).copy()

    def score(self, token_ids: TokenIds) -> FloatArray:
        """Append tokens and return the logits of each, float32 [T, vocab]. Errors as for `append`."""
        ids = self._checked(token_ids)
        parts = []
        for start in range(0, len(ids), self.score_rows):
            prepared = self._run(ids[start : start + self.score_rows], "all", False)
            parts += [
                self._logits(prepared, index, chunk.num_tokens).copy()
                for index, chunk in enumerate(prepared.graph.chunks)
            ]
        return np.concatenate(parts)

    def truncate(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens; memory past them is given back."""
        if not 0 <= num_tokens <= self.length:
            raise InputError(
                f"truncate: found {num_tokens}, expected 0 to {self.length} (the tokens in the cache)"
            )
        self._cache.truncate(num_tokens)

    def reset(self) -> None:
        """Forget every token."""
        self._cache.truncate(0)

    def _checked(self, token_ids: TokenIds) -> npt.NDArray[np.int64]:
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
        if self.length + len(ids) > self.max_context:
            raise InputError(
                f"context: {self.length} tokens in the cache and {len(ids)} more make {self.length + len(ids)}, "
                f"expected at most {self.max_context}: shorten the prompt, or truncate or reset the session"
            )
        return ids.astype(np.int64)

    def _run(self, ids: npt.NDArray[np.int64], want: Want, record: bool) -> _Prepared:
        prepared = self._prepare(len(ids), want)
        prepared.input_ids[: len(ids)] = ids
        base = self.length
        try:
            events = prepared.execution.run(base, record)
        except _native.Error as error:
            raise RunError(str(error)) from error
        padding = prepared.graph.chunks[-1].compiled_size - prepared.graph.chunks[-1].num_tokens
        self._cache.note_length(base + len(ids), padding)
        if len(ids) > 1:
            self._instances.trim()
        if events is not None:
            self.timeline = _timeline(prepared, events)
        return prepared

    def _prepare(self, num_tokens: int, want: Want) -> _Prepared:
        key = (num_tokens, want)
        if key in self._prepared:
            self._prepared.move_to_end(key)
            return self._prepared[key]
        workers = self.threads if self.schedule == "pipelined" else 1
        chunks = cut(num_tokens, self._shape, workers)
        graph = build(self.manifest.split, chunks, want, min(len(chunks), workers))
        schedule = make(self.schedule, graph, self.threads)
        verify(schedule, graph)
        buffers = _native.Buffers(list(graph.buffer_bytes))
        input_ids = np.zeros(chunks[-1].start + chunks[-1].compiled_size, dtype=np.int64)
        memory = Memory(
            tuple(buffers.region(i) for i in range(len(graph.buffer_bytes))),
            {"input_ids": _native.Region.of(input_ids), "position_ids": _native.Region.of(self._positions)},
            self._cache_regions,
        )
        execution = bind(graph, schedule, memory, self._instances, all_rows=want == "all")
        prepared = _Prepared(graph, execution, buffers, input_ids, len(schedule.workers))
        self._prepared[key] = prepared
        while len(self._prepared) > _KEPT_EXECUTIONS:
            self._prepared.popitem(last=False)
        return prepared

    def _logits(self, prepared: _Prepared, chunk: int, rows: int) -> FloatArray:
        buffer = prepared.graph.buffers[self._output, chunk]
        return prepared.buffers.view(buffer, [rows, self.model.vocab_size])


def _chunk_shape(segments: Sequence[Segment]) -> Static | Dynamic:
    """The shape chunks are cut for: that of the blocks, which all have the same."""
    return next(s for s in segments if s.name.startswith("block")).shape


def _timeline(prepared: _Prepared, events: npt.NDArray[np.int64]) -> Timeline:
    split = prepared.graph.split
    devices = {segment.name: segment.device for segment in split.segments}
    result = []
    for number, worker, start, end in events.tolist():
        task = prepared.graph.tasks[number]
        call = split.calls[task.call]
        result.append(Event(call.name, call.segment, devices[call.segment], task.chunk, worker, start, end))
    return Timeline(tuple(sorted(result, key=lambda event: event.start_ns)), prepared.num_workers)
