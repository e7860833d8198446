"""Do a list of jobs in forked processes: what the jobs read is inherited, not pickled, and Ctrl-C stops all."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from doubleweave.compiler.quiet import quiet

Item = TypeVar("Item")
Result = TypeVar("Result")

_is_warm = False
_jobs: tuple[Callable[[Any], Any], Sequence[Any]]  # of a forked process


def each_forked(
    function: Callable[[Item], Result], items: Sequence[Item], num_processes: int | None = None
) -> Generator[tuple[Item, Result]]:
    """Each item with `function(item)`, as they get done. num_processes: None: one a core.

    The last item is done in this process the first time: what torch and ExecuTorch cache with it would otherwise be
    worked out anew in every forked process. With one process all of them are.
    """
    global _is_warm
    workers = num_processes or len(os.sched_getaffinity(0))
    here = len(items) if workers == 1 else min(len(items), 1) if not _is_warm or len(items) == 1 else 0
    for item in reversed(items[len(items) - here :]):
        with quiet():
            result = function(item)
        _is_warm = True
        yield item, result
    items = items[: len(items) - here]
    if not items:
        return
    context = multiprocessing.get_context("fork")
    # A forked process gets these arguments as they are.
    pool = ProcessPoolExecutor(min(workers, len(items)), context, _begin_process, (function, items))
    try:
        with _interrupts_held(), quiet():
            futures = {pool.submit(_do, index): item for index, item in enumerate(items)}
        for future in as_completed(futures):
            yield futures[future], future.result()
        pool.shutdown()
    except BaseException:
        _stop(pool)
        raise


def _do(index: int) -> Any:
    function, items = _jobs
    return function(items[index])


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while processes fork: raised there it is lost in a fork handler, or a process is.

    Blocking the signal would not do: any other thread may take it, and Python raises in this one.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield  # Python raises nothing here
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        signal.raise_signal(signal.SIGINT)


def _stop(pool: ProcessPoolExecutor) -> None:
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)


def _begin_process(function: Callable[[Any], Any], items: Sequence[Any]) -> None:
    global _jobs
    _jobs = (function, items)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and stops us
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
