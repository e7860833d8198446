"""Report the chunks that are done while a run goes on: for slow devices, such as an emulator.

It knows nothing of devices.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from doubleweave import _native
from doubleweave.schedule.verify import Verified

OnChunk = Callable[[int, int], None]
# Polled, so that the executor calls no Python between tasks.
_PERIOD_S = 0.1


@contextmanager
def watching(execution: _native.Execution, verified: Verified, on_chunk: OnChunk | None) -> Iterator[None]:
    """While the execution runs, call `on_chunk(chunks done, chunks in all)` each time another chunk is done.

    A thread of its own calls `on_chunk`. None watches nothing.
    """
    if on_chunk is None:
        yield
        return
    chunk_of = verified.graph.chunk_of
    in_all = np.bincount(chunk_of)
    ended = threading.Event()

    def watch() -> None:
        told = 0
        is_over = False
        while not is_over:
            is_over = ended.wait(_PERIOD_S)
            done = np.zeros_like(in_all)
            for tasks, finished in zip(verified.workers, execution.num_finished(), strict=True):
                done += np.bincount(chunk_of[list(tasks[:finished])], minlength=len(in_all))
            complete = int((done == in_all).sum())
            if complete > told:
                told = complete
                on_chunk(told, len(in_all))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
