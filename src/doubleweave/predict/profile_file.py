"""Profiles as TOML files and as plain data, and back: `doubleweave profile` writes them, and people do.

So every key is checked: a misspelt one would be a figure that counts for nothing. And every number is in a range in
which nothing that is planned by it overflows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doubleweave.errors import InputError
from doubleweave.files import read_toml, written_whole
from doubleweave.ir.manifest import to_plain
from doubleweave.ir.rules import MOST_ROWS, MOST_TOKENS
from doubleweave.predict.estimate import WEIGHT_BYTES, Device
from doubleweave.predict.profile import MOST_THREADS, Decision, Measured, Profile
from doubleweave.schedule.choice import Choice
from doubleweave.schedule.makers import MAKERS

_MOST = 1e9  # of a number: microseconds, or 1e9 operations or bytes a second
_MOST_CONTENTION = 100.0
_MOST_SHOWN = 100  # characters of what was found
# Of a decision, with the most that each may be.
_COUNTS = {
    "tokens": MOST_TOKENS,
    "threads": MOST_THREADS,
    "chunk": MOST_ROWS,
    "in_flight": MOST_ROWS,
    "abreast": MOST_THREADS,
}


def profile_dict(profile: Profile) -> dict[str, Any]:
    """The profile as plain data, ready for TOML or JSON; `parse_profile` reads it back."""
    data = {key: getattr(profile, key) for key in ("machine", "program", "threads", "same_worker_us")} | {
        "sources": list(profile.sources),
        "device": {name: device.to_dict() for name, device in profile.devices.items()},
        "hand_over_us": _by_device(profile.hand_over_us),
        "contention": {f"workers_{count}": _by_device(pairs) for count, pairs in profile.contention.items()},
        "segment": {
            name: {f"threads_{threads}": to_plain(measured) for threads, measured in by_threads.items()}
            for name, by_threads in profile.segments.items()
        },
        "decision": [
            {
                "tokens": d.tokens,
                **d.choice._asdict(),
                "workers": [*d.choice.workers],
                "makespan_s": d.makespan_s,
            }
            for d in profile.decisions
        ],
    }
    return {"name": profile.name, "kind": profile.kind} | {key: value for key, value in data.items() if value}


def _by_device(pairs: Mapping[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    data: dict[str, dict[str, float]] = {}
    for (a, b), value in pairs.items():
        data.setdefault(a, {})[b] = value
    return data


def parse_profile(data: Mapping[str, Any], where: str) -> Profile:
    """Parse the data of `profile_dict`; raises InputError that names the key that is wrong, missing or unknown."""
    _check_names(data, where)
    known = {
        f.removesuffix("s") if f in ("devices", "segments", "decisions") else f
        for f in Profile.__annotations__
    }
    _check_keys(data, known - {"weights"}, {"name", "kind"}, where)
    contention = _subtable(data, "contention", where)
    return Profile(
        name=_text(data["name"], f"{where}, name"),
        kind=_text(data["kind"], f"{where}, kind"),
        devices={
            name: parse_device(table, f"{where}, device {name}")
            for name, table in _subtable(data, "device", where).items()
        },
        segments={
            name: _by_threads(table, f"{where}, segment {name}")
            for name, table in _subtable(data, "segment", where).items()
        },
        hand_over_us=_pairs(data, "hand_over_us", where),
        contention={
            _count(key, "workers_", f"{where}, contention"): _pairs(
                contention, key, f"{where}, contention", _MOST_CONTENTION
            )
            for key in contention
        },
        same_worker_us=_number(data.get("same_worker_us", 0.0), f"{where}, same_worker_us"),
        sources=tuple(_text(item, f"{where}, sources") for item in _list(data, "sources", where)),
        machine=_text(data.get("machine", ""), f"{where}, machine"),
        program=_text(data.get("program", ""), f"{where}, program"),
        threads=_whole(data.get("threads", 0), f"{where}, threads", 0, MOST_THREADS),
        decisions=tuple(_decision(item, f"{where}, decision") for item in _list(data, "decision", where)),
    )


def parse_device(data: Any, where: str) -> Device:
    """Parse a table of a device; raises InputError that names the key."""
    table = _table(data, where)
    names = set(Device.__annotations__)
    _check_keys(table, names, names - {"efficiency", "workers"}, where)
    peak = table["peak_gops"]
    if not isinstance(peak, Mapping) or not peak or not set(peak) <= set(WEIGHT_BYTES):
        raise InputError(
            f"{where}, peak_gops: found {_shown(peak)}, expected numbers for some of {', '.join(WEIGHT_BYTES)}"
        )
    numbers = [(key, table[key]) for key in names - {"peak_gops"} if key in table]
    for key, value in [*numbers, *((f"peak_gops.{k}", v) for k, v in peak.items())]:
        least = 0 if key in ("launch_us", "hand_over_us") else 1e-9  # the model divides by the others
        if not _is_number(value, least):
            raise InputError(f"{where}, {key}: found {_shown(value)}, expected a number above 0")
    _whole(table.get("workers", 1), f"{where}, workers", 1, MOST_THREADS)
    return Device(**table)


def _shown(value: Any) -> str:
    """A value for an error: in one line, and not all of a long one."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def _check_names(data: Mapping[str, Any], where: str) -> None:
    """Refuse names of devices, segments and keys that do not stand in one line: errors and tables show them."""
    for key, value in data.items():
        if not key.isprintable() or len(key) > _MOST_SHOWN:
            raise InputError(
                f"{where}: found name {_shown(key)}, expected printable letters, {_MOST_SHOWN} at most"
            )
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                _check_names(item, where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise InputError(f"{where}: found {_shown(value)}, expected a text of one line")
    return value


def _list(data: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = data.get(key, [])
    if not isinstance(value, list):
        raise InputError(f"{where}, {key}: found {_shown(value)}, expected a list")
    return value


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: found {_shown(value)}, expected a table")
    return value


def _subtable(data: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    return _table(data.get(key, {}), f"{where}, {key}")


def _check_keys(data: Mapping[str, Any], known: set[str], needed: set[str], where: str) -> None:
    if unknown := sorted(set(data) - known):
        raise InputError(f"{where}: found key {unknown[0]!r}, expected one of {', '.join(sorted(known))}")
    if missing := sorted(needed - set(data)):
        raise InputError(f"{where}: key {missing[0]!r} is missing")


def _is_number(value: Any, least: float) -> bool:
    # TOML has infinity and NaN, and True is an int.
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= _MOST


def _number(value: Any, where: str, most: float = _MOST) -> float:
    if not _is_number(value, 0) or value > most:
        raise InputError(f"{where}: found {_shown(value)}, expected a number, 0 or more, {most:.0f} at most")
    return float(value)


def _whole(value: Any, where: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise InputError(f"{where}: found {_shown(value)}, expected a whole number, {least} to {most}")
    return value


def _count(key: str, prefix: str, where: str) -> int:
    """The number at the end of a table's name, such as threads_2."""
    digits = key.removeprefix(prefix)
    is_number = digits != key and digits.isascii() and digits.isdigit() and len(digits) < 9
    if not is_number or not 1 <= int(digits) <= MOST_THREADS:
        raise InputError(f"{where}: found table {key!r}, expected {prefix}1, {prefix}2, …")
    return int(digits)


def _pairs(
    data: Mapping[str, Any], key: str, where: str, most: float = _MOST
) -> dict[tuple[str, str], float]:
    return {
        (a, b): _number(value, f"{where}, {key}.{a}.{b}", most)
        for a, row in _subtable(data, key, where).items()
        for b, value in _table(row, f"{where}, {key}.{a}").items()
    }


def _by_threads(data: Any, where: str) -> dict[int, Measured]:
    tables = _table(data, where)
    return {_count(key, "threads_", where): _measured(tables[key], f"{where}, {key}") for key in tables}


def _measured(data: Any, where: str) -> Measured:
    table = _table(data, where)
    _check_keys(table, set(Measured.__annotations__), {"rows", "cached", "us"}, where)
    columns: dict[str, Any] = {key: _numbers(table[key], f"{where}, {key}") for key in table if key != "us"}
    rows, cached = columns["rows"], columns["cached"]
    for key, points, least in (("rows", rows, 1), ("cached", cached, 0)):
        if not points or list(points) != sorted(set(points)) or points[0] < least:
            raise InputError(
                f"{where}, {key}: found {_shown(list(points))}, expected numbers that rise from {least} or more"
            )
    us = table["us"]
    if not isinstance(us, list) or len(us) != len(rows):
        raise InputError(f"{where}, us: expected {len(rows)} lists of numbers, one for each of rows")
    lists = tuple(_numbers(values, f"{where}, us") for values in us)
    for row in lists:
        _check_length(row, {len(cached)}, f"{where}, us")
    for key, points in (("spread", rows), ("misfit", rows), ("repeated", cached)):
        _check_length(columns.get(key, ()), {0, len(points)}, f"{where}, {key}")
    counts = {"rows": tuple(map(int, rows)), "cached": tuple(map(int, cached))}
    return Measured(**{**columns, **counts, "us": lists})


def _check_length(values: tuple[float, ...], allowed: set[int], where: str) -> None:
    if len(values) not in allowed:
        raise InputError(f"{where}: found {len(values)} numbers, expected {max(allowed)}")


def _numbers(values: Any, where: str) -> tuple[float, ...]:
    if not isinstance(values, list):
        raise InputError(f"{where}: found {_shown(values)}, expected a list of numbers")
    return tuple(_number(value, where) for value in values)


def _decision(data: Any, where: str) -> Decision:
    table = _table(data, where)
    keys = {"tokens", "makespan_s", *Choice._fields}
    _check_keys(table, keys, keys, where)
    schedule, workers = table["schedule"], table["workers"]
    if schedule not in MAKERS:
        raise InputError(f"{where}, schedule: found {_shown(schedule)}, expected one of {', '.join(MAKERS)}")
    is_list = isinstance(workers, list) and 1 <= len(workers) <= MOST_THREADS
    if not is_list or not all(isinstance(name, str) for name in workers):
        raise InputError(f"{where}, workers: found {_shown(workers)}, expected a list of devices")
    counts = {key: _whole(table[key], f"{where}, {key}", 1, most) for key, most in _COUNTS.items()}
    tokens = counts.pop("tokens")
    choice = Choice(schedule=schedule, workers=tuple(workers), **counts)
    return Decision(tokens, choice, _number(table["makespan_s"], f"{where}, makespan_s"))


def read_profile(path: Path) -> Profile:
    """Read a TOML file; raises InputError where it is missing, no TOML or no profile."""
    try:
        data = read_toml(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a profile ({error})") from None
    except ValueError as error:
        raise InputError(
            f"{path}: is no TOML ({error}); profiles are written by doubleweave profile"
        ) from None
    return parse_profile(data, str(path))


def write_profile(profile: Profile, path: Path) -> None:
    """Write a TOML file as a whole, as `written_whole` does."""
    import tomli_w

    with written_whole(path) as temporary:
        temporary.write_text(tomli_w.dumps(profile_dict(profile)))
