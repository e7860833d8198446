"""What Linux says of processes and processors: memory, and how much of the machine others used.

It knows nothing of engines or benchmarks.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def memory_bytes(pid: int | str = "self") -> dict[str, int]:
    """Resident memory of a process: `rss` = `anon` + `file` + `shmem`, and its peak `hwm`."""
    names = {"VmRSS": "rss", "RssAnon": "anon", "RssFile": "file", "RssShmem": "shmem", "VmHWM": "hwm"}
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {names[line[0][:-1]]: int(line[1]) * 1024 for line in lines if line and line[0][:-1] in names}


def session_memory_bytes(session_id: int) -> tuple[int, int]:
    """Resident memory of all processes of a session, as (sum of RSS, sum of PSS).

    RSS counts pages that processes share once for each, PSS divides them.
    """
    rss = pss = 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if int(_stat_fields(folder.name)[3]) != session_id:
                continue
            rss += memory_bytes(folder.name).get("rss", 0)
            rollup = (folder / "smaps_rollup").read_text().splitlines()
            pss += next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) * 1024
        except (OSError, StopIteration):
            continue  # the process ended meanwhile
    return rss, pss


class OtherCpu:
    """The share of the machine (0 to 1) that processes other than ours used since the last `lap`.

    Ours are this process, its children that have ended, and those of `own_pids`.
    Time that the host took away (steal) counts as others'. Linux counts in ticks of 10 ms, so a lap shorter
    than a second is coarse.
    """

    def __init__(self, own_pids: Callable[[], Iterable[int]]) -> None:
        self._own_pids = own_pids
        self._last = self._now()

    def lap(self) -> float:
        before, self._last = self._last, self._now()
        elapsed, busy, own = (after - b for after, b in zip(self._last, before, strict=True))
        capacity = elapsed * _TICKS_PER_SECOND * (os.cpu_count() or 1)
        return max(0.0, (busy - own) / capacity) if capacity else 0.0

    def _now(self) -> tuple[float, int, int]:
        user, nice, system, _idle, _iowait, irq, softirq, steal = (
            int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        own = 0
        for pid in self._own_pids():
            own += sum(map(int, _stat_fields(pid)[11:13]))
        own += sum(map(int, _stat_fields("self")[11:15]))  # with children that have ended
        return time.perf_counter(), user + nice + system + irq + softirq + steal, own


def _stat_fields(pid: int | str) -> list[str]:
    """Fields of /proc/PID/stat from the third (state) on; the second may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def describe() -> dict[str, str | int | None]:
    """The machine in a few words, for the JSON line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version()}
