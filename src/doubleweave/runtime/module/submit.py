"""Futures of submitted calls: one worker thread a device; a call runs as soon as its arguments have results."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from doubleweave import _native
from doubleweave.runtime.threads import use_threads


class Result(Future[Any]):
    """A future result. It can be an argument of other calls; `future[i]` is the future of one of several results."""

    # Python would iterate by __getitem__ without an end: the number of results is not known yet.
    __iter__ = None

    def __getitem__(self, index: Any) -> Result:
        part = Result()
        _follow(self, part, lambda value: value[index])
        return part


def _follow(source: Future[Any], target: Result, change: Callable[[Any], Any]) -> None:
    def done(finished: Future[Any]) -> None:
        with suppress(InvalidStateError):  # it was cancelled in the meantime
            try:
                result = change(finished.result())
            except BaseException as error:
                target.set_exception(error)
            else:
                target.set_result(result)

    source.add_done_callback(done)


class Workers:
    """The threads that submitted calls run on, one a device, and how many threads a direct call uses.

    The threads end when nothing refers to this any more.
    """

    def __init__(self) -> None:
        self._threads: int | None = None
        self.record = False
        self._executors: dict[str, ThreadPoolExecutor] = {}
        self._lock = threading.Lock()

    @property
    def threads(self) -> int:
        """Threads of a direct call: all of the pool's, unless another number was set."""
        return self._threads or _native.pool_threads()

    @threads.setter
    def threads(self, value: int) -> None:
        self._threads = use_threads(value)

    def submit(
        self,
        device: str,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        after: Sequence[Future[Any]],
    ) -> Result:
        """Call `function` on the device's worker once `after` and the futures among `arguments` are done.

        The Result has the value that `function` returns, or the error that it or a future raises.
        """
        result = Result()
        waiting: list[Future[Any]] = []

        def wait_for(future: Future[Any]) -> Future[Any]:
            waiting.append(future)
            return future

        # The caller may go on to fill the lists that it gave.
        held = _with_futures((tuple(arguments), list(after)), wait_for)
        # One more than the futures: none starts the call before all of them have their callback.
        left = len(waiting) + 1
        lock = threading.Lock()

        def ready(finished: Future[Any] | None = None) -> None:
            nonlocal left
            with lock:
                left -= 1
                if left:
                    return
            try:
                self._executor(device).submit(run)
            except RuntimeError:  # the interpreter is ending
                result.cancel()

        def run() -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                given, _ = _with_futures(held, lambda future: future.result())
                result.set_result(function(*given))
            except BaseException as error:
                result.set_exception(error)

        for future in waiting:
            future.add_done_callback(ready)
        ready()
        return result

    def _executor(self, device: str) -> ThreadPoolExecutor:
        with self._lock:
            if device not in self._executors:
                self._executors[device] = ThreadPoolExecutor(1, thread_name_prefix=f"doubleweave-{device}")
            return self._executors[device]


def _with_futures(value: Any, change: Callable[[Future[Any]], Any]) -> Any:
    """A copy of tuples, lists and dicts in which each future is what `change` makes of it."""
    if isinstance(value, Future):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_with_futures(item, change) for item in value))
    if type(value) in (tuple, list):
        return type(value)(_with_futures(item, change) for item in value)
    if isinstance(value, dict):
        return type(value)((key, _with_futures(item, change)) for key, item in value.items())
    return value
