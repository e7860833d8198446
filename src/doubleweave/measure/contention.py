"""How much tasks on different workers slow each other down, fitted to what was measured: the simulator's model read
backwards.

While others run beside it, a task of device a advances at the rate 1 / (1 + sum of contention[a, their device]). It
knows nothing of programs or threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from doubleweave.schedule.costs import Int64Array

FloatArray = npt.NDArray[np.float64]
# A task that took this many times its own time was held up by something else (the machine's other work).
_MOST = 3.0
_TURNS = 20


class Ran(NamedTuple):
    """One run: the device and worker of each task, when it started and ended, and its time run alone, in ns."""

    devices: Sequence[str]
    workers: Int64Array
    start_ns: Int64Array
    end_ns: Int64Array
    alone_ns: Int64Array


def fit(runs: Sequence[Ran]) -> dict[tuple[str, str], float]:
    """Least squares over all tasks of all runs, each counting by its time; never below 0."""
    names = sorted({device for run in runs for device in run.devices})
    result: dict[tuple[str, str], float] = {}
    for device in names:
        beside, took, alone = (
            np.concatenate(parts) for parts in zip(*(_tasks(r, device, names) for r in runs), strict=True)
        )
        usual = (alone > 0) & (took < _MOST * alone)
        result |= {
            (device, other): value
            for other, value in zip(names, _fitted(beside[usual], took[usual], alone[usual]), strict=True)
        }
    return result


def _tasks(run: Ran, device: str, names: Sequence[str]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Of a device's tasks: the time beside tasks of each device, the time taken, and the time alone."""
    mine = np.array([d == device for d in run.devices])
    beside = np.stack([_overlap(run, other)[mine] for other in names], axis=1)
    return beside, (run.end_ns - run.start_ns)[mine].astype(float), run.alone_ns[mine].astype(float)


def _fitted(beside: FloatArray, took: FloatArray, alone: FloatArray) -> list[float]:
    """A task's delay is contention times the work it does beside others: the time beside them over how much slower it
    is then, which depends on the contention; so the two are found in turns."""
    found = [0.0] * beside.shape[1]
    weight = np.sqrt(alone)[:, None]
    for _ in range(_TURNS):
        together = (beside / took[:, None]) @ np.array(found)
        slower = 1 + np.maximum(np.array(found)[None, :], together[:, None])
        work = beside / slower
        found = _not_negative(work / alone[:, None] * weight, (took / alone - 1) * weight[:, 0])
    return found


def _overlap(run: Ran, device: str) -> FloatArray:
    """For each task, the time that other workers ran tasks of a device while it ran."""
    total = np.zeros(len(run.start_ns))
    is_device = np.array([d == device for d in run.devices])
    for worker in np.unique(run.workers):
        tasks = np.flatnonzero(is_device & (run.workers == worker))
        if not len(tasks):
            continue
        tasks = tasks[np.argsort(run.start_ns[tasks])]
        begin, end = run.start_ns[tasks], run.end_ns[tasks]
        done = np.concatenate([[0], np.cumsum(end - begin)])

        overlapped = _busy_until(run.end_ns, begin, end, done) - _busy_until(run.start_ns, begin, end, done)
        others = run.workers != worker
        total[others] += overlapped[others]
    return total


def _busy_until(at: Int64Array, begin: Int64Array, end: Int64Array, done: Int64Array) -> Int64Array:
    """How long a worker had been busy by some times; `done` are the sums of its tasks' times, from 0 on."""
    last = np.searchsorted(begin, at, side="right")
    rest = np.where(last > 0, np.maximum(end[last - 1] - at, 0), 0)
    result: Int64Array = done[last] - rest
    return result


def _not_negative(x: FloatArray, y: FloatArray) -> list[float]:
    """Least squares with no coefficient below 0: those that would be are left out, the worst first."""
    kept = [column for column in range(x.shape[1]) if x[:, column].any()]
    while kept:
        found = np.linalg.lstsq(x[:, kept], y, rcond=None)[0]
        if found.min() >= 0:
            break
        kept.pop(int(found.argmin()))
    values = [0.0] * x.shape[1]
    for column, value in zip(kept, found if kept else [], strict=True):
        values[column] = float(value)
    return values
