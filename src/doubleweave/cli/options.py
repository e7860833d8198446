"""Shared by the commands: options, progress bars, the JSON line, opening a program."""

from __future__ import annotations

import argparse
import atexit
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doubleweave.vendors.library import emulator_of
from doubleweave.vendors.printed_output import silence_errors

if TYPE_CHECKING:
    from doubleweave.runtime.llm.program import Program
    from doubleweave.timeline.timeline import Timeline

EXIT_ERROR = 2
_MOST_STEPS = 1_000_000
_KEPT: list[object] = []  # programs that live to the end of the process


def add_program(p: argparse.ArgumentParser) -> None:
    p.add_argument("program", metavar="DIR", help="a program folder made by doubleweave compile")


def add_profile_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--profile",
        metavar="P",
        help="a .toml file or a shipped name such as sm8650 (default: the program's own)",
    )


def add_schedule_options(p: argparse.ArgumentParser) -> None:
    """Options of everything that runs or predicts a run."""
    p.add_argument(
        "--schedule",
        default="auto",
        help="auto (default): what plan chooses; sequential: one task at a time, every thread in it; lockstep: two "
        "chunks, a barrier a step; pipelined: in order, as soon as inputs are ready; out_of_order: critical path "
        "first; wavefront: each worker takes chunks of its own",
    )
    p.add_argument("--threads", type=int, metavar="N", help="threads in all (default: the machine's cores)")
    p.add_argument(
        "--workers",
        metavar="D,D",
        help="the workers' devices, such as npu,cpu or any,any (default: by the schedule)",
    )
    p.add_argument(
        "--chunk", type=int, metavar="N", help="the most tokens of a chunk (default: the program's)"
    )
    add_profile_option(p)


def add_json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print the report as one JSON object on the last line")


def workers_of(args: argparse.Namespace) -> tuple[str, ...] | None:
    """The devices that --workers names."""
    return None if args.workers is None else tuple(args.workers.split(","))


def trace_path(given: str | None) -> Path | None:
    """The file of a trace, None for none; refused before anything runs."""
    from doubleweave.timeline.trace_file import check_path

    if given is None:
        return None
    check_path(Path(given))
    return Path(given)


def save_trace(timeline: Timeline, path: Path | None) -> None:
    from doubleweave.timeline.trace_file import write_trace

    if path is not None:
        write_trace(timeline, path)
        print(f"trace written to {path}")


def print_json(args: argparse.Namespace, report: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps(report))


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, where that is a terminal; gone at the end, so that stderr keeps errors alone.

    Steps that number more than a million are bytes; of them it says how many seconds are left.
    """
    from tqdm import tqdm

    bar_format = "{desc:<34} {bar:24} {n_fmt}/{total_fmt}{postfix} [{elapsed}]"
    began: dict[str, float] = {}
    with tqdm(total=1, bar_format=bar_format, file=sys.stderr, disable=None, leave=False) as bar:

        def progress(what: str, done: int, total: int) -> None:
            seconds = time.monotonic() - began.setdefault(what, time.monotonic())
            is_bytes = total > _MOST_STEPS
            bar.total, bar.n, bar.unit_scale, bar.unit = total, done, is_bytes, "B"
            is_long = is_bytes and done and seconds > 1
            bar.set_postfix_str(
                f"{seconds * (total - done) / done:.0f} s left" if is_long else "", refresh=False
            )
            bar.set_description_str(what)

        yield progress


def open_quietly(folder: str) -> Program:
    """Open a language model's program for a command.

    An emulator runs inside the process: its crash ends the process, with one sentence. At exit it prints everything
    that it frees, after the command's own output, so stderr is silenced then.
    """
    from doubleweave._native import say_crashes
    from doubleweave.runtime.open import open_llm

    program = open_llm(folder)
    if emulator_of(program.split):
        say_crashes(EXIT_ERROR)
        _KEPT.append(program)
        atexit.register(silence_errors)
    return program
