"""Profiles: what segments cost on a machine, measured there or estimated from published figures. TOML on disk.

A measured segment has its time by rows and by cached tokens; for anything else the time is estimated from operations
over peak and bytes over bandwidth of its device. It knows nothing of how profiles are measured (`measure.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from doubleweave.choice import Choice, default_choice
from doubleweave.costs import Costs
from doubleweave.errors import InputError
from doubleweave.estimate import Device, estimate_us
from doubleweave.ir import CACHED, Segment, Split, Static
from doubleweave.tasks import TaskGraph

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A segment's time with some number of threads: at `rows[i]` rows, with S rows in the cache,
    `base_us[i] + per_cached_us[i] * S` microseconds; between rows it is interpolated.

    `spread[i]` is half the distance of the quartiles over the median; `misfit[i]` the largest relative distance of
    the line from a measured median.
    """

    rows: tuple[int, ...]
    base_us: tuple[float, ...]
    per_cached_us: tuple[float, ...]
    spread: tuple[float, ...] = ()
    misfit: tuple[float, ...] = ()

    def time_us(self, rows: FloatArray, cached: FloatArray) -> FloatArray:
        base = _interpolate(rows, self.rows, self.base_us)
        slope = _interpolate(rows, self.rows, self.per_cached_us)
        return np.maximum(base + slope * cached, 0.0)


@dataclass(frozen=True)
class Decision:
    """What the planner chose for prompts of up to `tokens` tokens (and more than the decision before)."""

    tokens: int
    choice: Choice
    makespan_s: float


@dataclass(frozen=True)
class Profile:
    """`segments[name][threads]` are measured times; `hand_over_us` and `contention` are by pairs of devices, as in
    `Costs`. `program` says what the segments are of (`program_id`), `machine` where they were measured. `decisions` are
    the planner's, in order of tokens, for `threads` threads in all. `weights` is the format of the program at hand (not
    in the file)."""

    name: str
    kind: str
    devices: Mapping[str, Device] = field(default_factory=dict)
    segments: Mapping[str, Mapping[int, Measured]] = field(default_factory=dict)
    hand_over_us: Mapping[tuple[str, str], float] = field(default_factory=dict)
    contention: Mapping[tuple[str, str], float] = field(default_factory=dict)
    same_worker_us: float = 0.0
    sources: tuple[str, ...] = ()
    machine: str = ""
    program: str = ""
    threads: int = 0
    decisions: tuple[Decision, ...] = ()
    weights: str = "int8"

    def costs(self, graph: TaskGraph, threads: int = 1, *, all_rows: bool = False, cached: int = 0) -> Costs:
        """What the tasks of a graph cost, each method on `threads` threads, behind `cached` tokens.

        Raises InputError where the profile has neither a segment's time nor its device.
        """
        calls = graph.split.calls
        sizes = np.array(
            [(c.num_tokens, c.compiled_size, c.start + c.num_tokens) for c in graph.chunks], float
        )
        duration_us = np.zeros(len(graph))
        order = np.argsort(graph.call_of, kind="stable")
        bounds = np.searchsorted(graph.call_of[order], np.arange(len(calls) + 1))
        for index, call in enumerate(calls):
            tasks = order[bounds[index] : bounds[index + 1]]
            if not len(tasks):
                continue
            segment = graph.split.segment(call.segment)
            tokens, compiled, total = sizes[graph.chunk_of[tasks]].T
            rows = compiled if isinstance(segment.shape, Static) else tokens
            if call.rows == "last" and not all_rows:
                rows = np.ones(len(tasks))
            duration_us[tasks] = self.time_us(segment, rows, total + cached, threads)
        hand_over = {
            (a, b): self._hand_over_us(a, b) for a in self._devices(graph) for b in self._devices(graph)
        }
        return Costs(
            np.rint(duration_us * 1e3).astype(np.int64),
            {pair: round(us * 1e3) for pair, us in hand_over.items()},
            round(self.same_worker_us * 1e3),
            self.contention,
        )

    def time_us(self, segment: Segment, rows: FloatArray, cached: FloatArray, threads: int) -> FloatArray:
        """A segment's time for `rows` rows, its cache (if it reads one) holding `cached` of them."""
        measured = self.segments.get(segment.name)
        if measured:
            nearest = min(measured, key=lambda count: (abs(count - threads), count))
            return measured[nearest].time_us(rows, cached)
        if segment.device not in self.devices:
            raise InputError(
                f"profile {self.name}: found neither segment {segment.name!r} nor device {segment.device!r}, expected "
                f"one of them; measure this program with doubleweave profile, or add [device.{segment.device}]"
            )
        return estimate_us(self.devices[segment.device], segment, self.weights, rows, cached, threads)

    def choose(self, split: Split, num_tokens: int, threads: int) -> Choice:
        """The planner's decision for a prompt of this length, or, where the profile has none for as many threads,
        the rule: a single chunk runs on every thread, several run as a wavefront (out of order with an NPU)."""
        if self.decisions and self.threads == threads:
            found = next((d for d in self.decisions if num_tokens <= d.tokens), self.decisions[-1])
            return found.choice
        wave = default_choice(split, "wavefront", threads)
        return (
            wave
            if num_tokens > wave.chunk // 2 and threads > 1
            else default_choice(split, "sequential", threads)
        )

    def _devices(self, graph: TaskGraph) -> list[str]:
        return sorted(set(graph.devices))

    def _hand_over_us(self, a: str, b: str) -> float:
        """From a worker of device a to another one of device b."""
        if (a, b) in self.hand_over_us:
            return self.hand_over_us[a, b]
        return self.devices[b].hand_over_us if b in self.devices else 0.0


def uses_cache(segment: Segment) -> bool:
    """Whether the segment reads rows of the cache."""
    return any(CACHED in port.shape for port in segment.inputs)


def _interpolate(at: FloatArray, rows: tuple[int, ...], values: tuple[float, ...]) -> FloatArray:
    """Linear between the points, and on along the last line beyond them."""
    x, y = np.array(rows, float), np.array(values)
    if len(x) == 1:
        return np.full(len(at), y[0])
    left = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    share = (at - x[left]) / (x[left + 1] - x[left])
    result: FloatArray = y[left] + share * (y[left + 1] - y[left])
    return result


def profile_dict(profile: Profile) -> dict[str, Any]:
    """The profile as plain data, ready for TOML or JSON; `parse_profile` reads it back."""
    data: dict[str, Any] = {"name": profile.name, "kind": profile.kind}
    for key in ("machine", "program", "threads", "same_worker_us"):
        if getattr(profile, key):
            data[key] = getattr(profile, key)
    if profile.sources:
        data["sources"] = list(profile.sources)
    if profile.devices:
        data["device"] = {name: device.to_dict() for name, device in profile.devices.items()}
    for key, table in (("hand_over_us", profile.hand_over_us), ("contention", profile.contention)):
        for (a, b), value in table.items():
            data.setdefault(key, {}).setdefault(a, {})[b] = value
    if profile.segments:
        data["segment"] = {
            name: {
                f"threads_{threads}": {key: list(value) for key, value in vars(measured).items()}
                for threads, measured in by_threads.items()
            }
            for name, by_threads in profile.segments.items()
        }
    if profile.decisions:
        data["decision"] = [
            {
                "tokens": d.tokens,
                **d.choice._asdict(),
                "workers": list(d.choice.workers),
                "makespan_s": d.makespan_s,
            }
            for d in profile.decisions
        ]
    return data


def parse_profile(data: Mapping[str, Any], where: str) -> Profile:
    """Parse what `profile_dict` gives; raises InputError that names the key that is wrong, missing or unknown."""
    known = {
        f.removesuffix("s") if f in ("devices", "segments", "decisions") else f
        for f in Profile.__annotations__
    }
    _check_keys(data, known - {"weights"}, {"name", "kind"}, where)
    segments = {
        name: {
            int(key.removeprefix("threads_")): _measured(table, f"{where}, segment {name}, {key}")
            for key, table in _table(by_threads, f"{where}, segment {name}").items()
        }
        for name, by_threads in _table(data.get("segment", {}), f"{where}, segment").items()
    }
    devices = {
        name: Device.parse(table, f"{where}, device {name}")
        for name, table in _table(data.get("device", {}), f"{where}, device").items()
    }
    return Profile(
        name=str(data["name"]),
        kind=str(data["kind"]),
        devices=devices,
        segments=segments,
        hand_over_us=_pairs(data, "hand_over_us", where),
        contention=_pairs(data, "contention", where),
        same_worker_us=_number(data.get("same_worker_us", 0.0), f"{where}, same_worker_us"),
        sources=tuple(map(str, data.get("sources", ()))),
        machine=str(data.get("machine", "")),
        program=str(data.get("program", "")),
        threads=int(_number(data.get("threads", 0), f"{where}, threads")),
        decisions=tuple(_decision(item, f"{where}, decision") for item in data.get("decision", ())),
    )


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: found {value!r}, expected a table")
    return value


def _check_keys(data: Mapping[str, Any], known: set[str], needed: set[str], where: str) -> None:
    if unknown := sorted(set(data) - known):
        raise InputError(f"{where}: found key {unknown[0]!r}, expected one of {', '.join(sorted(known))}")
    if missing := sorted(needed - set(data)):
        raise InputError(f"{where}: key {missing[0]!r} is missing")


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e18:
        raise InputError(f"{where}: found {value!r}, expected a number, 0 or more")
    return float(value)


def _pairs(data: Mapping[str, Any], key: str, where: str) -> dict[tuple[str, str], float]:
    return {
        (a, b): _number(value, f"{where}, {key}.{a}.{b}")
        for a, row in _table(data.get(key, {}), f"{where}, {key}").items()
        for b, value in _table(row, f"{where}, {key}.{a}").items()
    }


def _measured(data: Any, where: str) -> Measured:
    table = _table(data, where)
    _check_keys(table, set(Measured.__annotations__), {"rows", "base_us", "per_cached_us"}, where)
    columns: dict[str, tuple[Any, ...]] = {}
    for key, values in table.items():
        if not isinstance(values, list) or not all(
            isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e18 for v in values
        ):
            raise InputError(f"{where}, {key}: found {values!r}, expected a list of numbers")
        columns[key] = tuple(values)
    rows = columns["rows"]
    if not rows or list(rows) != sorted(set(rows)) or rows[0] < 1:
        raise InputError(
            f"{where}, rows: found {list(rows)}, expected numbers of rows that rise from 1 or more"
        )
    for key, column in columns.items():
        if len(column) not in (0, len(rows)):
            raise InputError(
                f"{where}, {key}: found {len(column)} numbers, expected {len(rows)}, one for each of rows"
            )
    return Measured(**{**columns, "rows": tuple(map(int, rows))})


def _decision(data: Any, where: str) -> Decision:
    table = _table(data, where)
    keys = {"tokens", "makespan_s", *Choice._fields}
    _check_keys(table, keys, keys, where)
    choice = {key: table[key] for key in Choice._fields} | {"workers": tuple(table["workers"])}
    return Decision(int(table["tokens"]), Choice(**choice), float(table["makespan_s"]))


def read_profile(path: Path) -> Profile:
    """Read a TOML file; raises InputError where it is missing, no TOML or no profile."""
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a profile ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(
            f"{path}: is no TOML ({error}); profiles are written by doubleweave profile"
        ) from None
    return parse_profile(data, str(path))


def write_profile(profile: Profile, path: Path) -> None:
    """Write a TOML file, in one piece: under another name beside it first."""
    import tomli_w

    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(tomli_w.dumps(profile_dict(profile)))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
