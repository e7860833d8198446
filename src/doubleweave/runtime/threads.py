"""How many threads calls may use: checks the number asked for and sizes ExecuTorch's thread pool.

A call runs on one thread or on the whole pool: with a number between, pthreadpool in ExecuTorch 1.5.1 loses tiles.
"""

from __future__ import annotations

from doubleweave import _native
from doubleweave.errors import InputError
from doubleweave.predict.plan_run import RunPlanner


def threads_or_all(asked: int | None) -> int:
    """`asked` after `use_threads`; for None the pool's number, at first the machine's cores."""
    return _native.pool_threads() if asked is None else use_threads(asked)


def settled_threads(planner: RunPlanner, asked: int | None) -> int:
    """Threads in all of a run here: `asked`, or the planner's default for None, after `use_threads`."""
    if asked is None:
        asked = planner.threads(None, _native.pool_threads(), _native.max_threads())
    return use_threads(asked)


def use_threads(asked: int) -> int:
    """Prepare for calls on `asked` threads.

    Raises InputError for more than there are cores, or where methods are loaded already that use another number.
    """
    most = _native.max_threads()
    if type(asked) is not int or not 1 <= asked <= most:
        raise InputError(f"threads: found {asked!r}, expected 1 to {most} (the cores of this machine)")
    try:
        _native.set_pool_threads(asked)
    except _native.Error:
        pool = _native.pool_threads()
        raise InputError(
            f"threads: found {asked}, expected 1 or {pool}: methods that run on {pool} threads are loaded in this "
            f"process; ask for {asked} before the first call, or in another process"
        ) from None
    return asked
