"""Futures of submitted calls: one worker thread a device, calls run as soon as what they need is there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from doubleweave.method import Method


class Result(Future[Any]):
    """A future result. It can be an argument of other calls; `future[i]` is the future of one of several results."""

    def __getitem__(self, index: Any) -> Result:
        part = Result()
        _follow(self, part, lambda value: value[index])
        return part


def _follow(source: Future[Any], target: Result, change: Callable[[Any], Any]) -> None:
    def done(finished: Future[Any]) -> None:
        try:
            target.set_result(change(finished.result()))
        except InvalidStateError:  # cancelled in the meantime
            pass
        except BaseException as error:
            target.set_exception(error)

    source.add_done_callback(done)


class Workers:
    """The threads that submitted calls run on, one a device, and how many threads a direct call uses."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.record = False
        self._executors: dict[str, ThreadPoolExecutor] = {}
        self._lock = threading.Lock()

    def submit(
        self, method: Method, args: Any, kwargs: dict[str, Any], out: Any, after: Sequence[Future[Any]]
    ) -> Result:
        """Run `method` once the futures among its arguments are done; what one of them raised, it raises."""
        result = Result()
        waiting: list[Future[Any]] = []
        _collect((args, kwargs, out, list(after)), waiting)
        left = len(waiting) + 1
        lock = threading.Lock()

        def ready(finished: Future[Any] | None = None) -> None:
            nonlocal left
            with lock:
                left -= 1
                if left:
                    return
            self._executor(method.device).submit(run)

        def run() -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                given, named, places, _ = _resolve((args, kwargs, out, list(after)))
                # One thread each: with several, methods wait for one another's threads.
                result.set_result(method._run(given, named, places, 1))
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

    def close(self) -> None:
        """Let the threads end once what was submitted is done."""
        for executor in self._executors.values():
            executor.shutdown(wait=False)


def _collect(value: Any, found: list[Future[Any]]) -> None:
    if isinstance(value, Future):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)


def _resolve(value: Any) -> Any:
    if isinstance(value, Future):
        return value.result()
    if type(value) in (tuple, list):
        return type(value)(_resolve(item) for item in value)
    if type(value) is dict:
        return {key: _resolve(item) for key, item in value.items()}
    return value
