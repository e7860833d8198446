"""Fit contention, how much tasks on different workers slow each other down, to the runs that contention.py measures.

The model is the simulator's: a task of device a advances at the rate 1 / (1 + sum of contention[a, b]) over the
devices b of the tasks that run beside it. This file knows nothing of programs or threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from doubleweave.schedule.costs import FloatArray, Int64Array

# A task that took this many times its own time was held up by something else (the machine's other work).
_MOST = 3.0
_TURNS = 20  # of a fixed-point iteration


class Ran(NamedTuple):
    """One run: the device and worker of each task, when it started and ended, and its time run alone, in ns."""

    devices: Sequence[str]
    workers: Int64Array
    start_ns: Int64Array
    end_ns: Int64Array
    alone_ns: Int64Array


def fit(runs: Sequence[Ran]) -> dict[tuple[str, str], float]:
    """Least squares over all tasks of all runs, each weighted by its time alone.

    Returns contention[a, b] for all pairs of devices, 0.1 for 10% longer. It is never below 0: noise makes some tasks
    quicker beside others, and a simulator that believed it would prefer to run them so.
    """
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
    """The contention with each device, for tasks of one device; `beside`, float [tasks, devices], is in ns.

    A task's delay is contention times the work that it does beside others. That work is the time beside them over the
    slow-down meanwhile, which depends on the contention; so the two are found in turns.
    """
    found = [0.0] * beside.shape[1]
    weight = np.sqrt(alone)[:, None]  # squared errors then count by the time
    for _ in range(_TURNS):
        together = (beside / took[:, None]) @ np.array(found)
        # Beside a device the slow-down is at least that device's own; beside several, the mean over the task's time.
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
        # Cumulated, so that the overlap with every task is two lookups, not a comparison with every other task.
        # How long the worker had been busy by a time: it grows from each begin to its end, and rests until the next.
        done = np.concatenate([[0], np.cumsum(end - begin)]).repeat(2)[1:-1]
        changes = np.stack([begin, end], axis=1).ravel()
        overlapped = np.interp(run.end_ns, changes, done) - np.interp(run.start_ns, changes, done)
        others = run.workers != worker
        total[others] += overlapped[others]
    return total


def _not_negative(x: FloatArray, y: FloatArray) -> list[float]:
    """Least squares with no coefficient below 0: columns whose coefficient would be are left out, the worst first.

    Two or three columns need no exact solver, such as scipy's nnls.
    """
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
