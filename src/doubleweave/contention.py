"""How much tasks on different workers slow each other down, fitted to what was measured.

A task of time d (run alone) that overlaps others takes d * (1 + sum of contention[its device, other's device] times the
share of its time that the other ran). It knows nothing of programs or threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from doubleweave.costs import Int64Array

FloatArray = npt.NDArray[np.float64]
# A task that took this many times its own time was held up by something else (the machine's other work).
_MOST = 3.0


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
        rows, excess = [], []
        for run in runs:
            mine = np.array([d == device for d in run.devices])
            share = np.stack([_overlap(run, other)[mine] for other in names], axis=1)
            took = (run.end_ns - run.start_ns)[mine].astype(float)
            alone = run.alone_ns[mine].astype(float)
            usual = (alone > 0) & (took < _MOST * alone)
            weight = np.sqrt(alone[usual])
            rows.append(share[usual] * weight[:, None])
            excess.append((took[usual] / alone[usual] - 1) * weight)
        x, y = np.concatenate(rows), np.concatenate(excess)
        for other, value in zip(names, _not_negative(x, y), strict=True):
            result[device, other] = value
    return result


def _overlap(run: Ran, device: str) -> FloatArray:
    """For each task, the time that other workers ran tasks of a device while it ran, over its own time."""
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
    result: FloatArray = total / np.maximum(run.end_ns - run.start_ns, 1)
    return result


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
