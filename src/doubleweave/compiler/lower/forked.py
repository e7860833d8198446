"""Do a list of jobs in forked processes.

Forked processes inherit what the jobs read (exported graphs and gigabytes of weights), so only results are pickled.
Ctrl-C stops all of them. Knows nothing of what the jobs are.
"""

from __future__ import annotations

import ctypes
import gc
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

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_is_warm = False
_jobs: tuple[Callable[[Any], Any], Sequence[Any]]  # of a forked process


def each_forked(function: Callable[[Item], Result], items: Sequence[Item]) -> Generator[tuple[Item, Result]]:
    """Yield each item with `function(item)`, in the order in which they get done, one process a core.

    The first call in a process does its last item there, and with one core all items: a forked process inherits what
    torch and ExecuTorch cache on the way, and would otherwise work it out anew.
    """
    global _is_warm
    workers = len(os.sched_getaffinity(0))
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
    # With "fork" the initializer's arguments are inherited: `function` may be a closure, which cannot be pickled.
    given = (function, items, os.getpid())
    pool = ProcessPoolExecutor(min(workers, len(items)), context, _begin_process, given)
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
    """Hold Ctrl-C back while processes fork, and raise it afterwards.

    An interrupt raised in a fork handler is lost, or leaves a process that nobody stops. Blocking the signal in this
    thread is not enough: another thread takes it, and Python still raises in this one.
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
    # shutdown() alone waits for the jobs that run, and one may take minutes; there is no public list of processes.
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)


def _begin_process(function: Callable[[Any], Any], items: Sequence[Any], parent: int) -> None:
    global _jobs
    _end_with(parent)
    # Whatever the parent has is its own to free: what an emulator's library made does not survive the fork, and the
    # collector would end this process at it.
    gc.freeze()
    _jobs = (function, items)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and stops us
    torch.set_num_threads(1)  # there is a process for every core
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _end_with(parent: int) -> None:
    """Let the system end this process when its parent is gone, however that ended; other systems than Linux do not."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before
            os._exit(1)
