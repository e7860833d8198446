"""The commands that measure a machine, predict runs, plan them and compare traces: each parses, calls and prints."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from doubleweave.cli.options import (
    add_json,
    add_profile_option,
    add_program,
    add_schedule_options,
    open_quietly,
    print_json,
    progress_bar,
    save_trace,
    trace_path,
    workers_of,
)
from doubleweave.errors import InputError
from doubleweave.ir.manifest import RUN_FILE

# The default prompt length, where the context has room for it.
_PROMPT = 512


def add_commands(commands: Any) -> None:
    """Add profile, simulate, plan, prepare and trace."""
    _add_profile(commands)
    _add_simulate(commands)
    _add_plan(commands)
    _add_prepare(commands)
    _add_trace(commands)


def _add_profile(commands: Any) -> None:
    p = commands.add_parser(
        "profile",
        help="measure a program on this machine",
        description="Measure every method of a program on this machine, plan with it, and try the plan's fastest ways "
        "to run a prompt: what --schedule auto then uses. Run it while nothing else runs; it takes some minutes.",
    )
    add_program(p)
    p.add_argument("-o", "--out", metavar="FILE", help="the profile to write (default: DIR/profile.toml)")
    p.add_argument("--runs", type=int, default=5, metavar="N", help="runs of each measurement (default 5)")
    p.add_argument(
        "--max-cached",
        type=int,
        default=4096,
        metavar="N",
        help="the most tokens in the cache (default 4096)",
    )
    p.add_argument("--threads", type=int, metavar="N", help="threads in all (default: the machine's cores)")
    p.add_argument("--quick", action="store_true", help="take the plan for auto as it is, without trying it")
    add_json(p)
    p.set_defaults(command=_profile)


def _profile(args: argparse.Namespace) -> None:
    from doubleweave.cli.show_profile import profile_text
    from doubleweave.measure.decisions import tune
    from doubleweave.measure.segments import measure
    from doubleweave.predict.find_profile import PROFILE_FILE
    from doubleweave.predict.plan_run import RunPlanner
    from doubleweave.predict.planner import decisions
    from doubleweave.predict.profile_file import profile_dict, write_profile
    from doubleweave.predict.run_file import write_run_file
    from doubleweave.runtime.threads import threads_or_all

    out = Path(args.out) if args.out else Path(args.program) / PROFILE_FILE
    if out.suffix != ".toml" or not out.parent.is_dir():
        raise InputError(f"out: found {out}, expected a file that ends in .toml, in a folder that exists")
    program = open_quietly(args.program)
    threads = threads_or_all(args.threads)
    with progress_bar() as progress:
        found = measure(
            program, runs=args.runs, max_cached=args.max_cached, threads=threads, progress=progress
        )
        if args.quick:
            most = program.model.max_context
            chosen = decisions(RunPlanner(program.split, found, most), threads, most)
        else:
            chosen = tune(program, found, threads, progress)
    found = replace(found, threads=threads, decisions=chosen)
    write_profile(found, out)
    if out == Path(args.program) / PROFILE_FILE:
        write_run_file(Path(args.program), program.manifest, found)
    print(profile_text(found, program.split))
    print(f"\nwritten to {out}")
    print_json(args, profile_dict(found))


def _add_simulate(commands: Any) -> None:
    p = commands.add_parser(
        "simulate",
        help="predict a run",
        description="Predict when every task of a prefill would run, on a profile; needs neither torch nor ExecuTorch.",
    )
    add_program(p)
    p.add_argument("--prompt-len", type=int, metavar="N", help=f"prompt tokens (default {_PROMPT})")
    add_schedule_options(p)
    p.add_argument("--trace", metavar="FILE", help="write it as .json (ui.perfetto.dev), .svg or .png")
    p.add_argument("--gantt", action="store_true", help="also print what would run where: table and Gantt")
    p.add_argument("--show-schedule", action="store_true", help="also print the schedule, a line a worker")
    add_json(p)
    p.set_defaults(command=_simulate)


def _simulate(args: argparse.Namespace) -> None:
    from doubleweave.cli.show_plan import forecast_text
    from doubleweave.predict.planner import forecast, simulate
    from doubleweave.timeline.from_tasks import timeline_of

    trace = trace_path(args.trace)
    planner, choice = _chosen(args)
    profile = planner.profile
    run = simulate(planner, choice, args.prompt_len)
    graph, schedule = run.planned.graph, run.planned.verified.schedule
    found = forecast(run)
    print(f"{args.prompt_len:,} tokens on {profile.name} ({profile.kind})")
    print(forecast_text(found))
    if args.show_schedule:
        print("\n" + schedule.text(graph))
    if trace is not None or args.gantt:
        title = f"{schedule.name}, {args.prompt_len:,} tokens, simulated on {profile.name}"
        timeline = timeline_of(graph, schedule, run.start_ns, run.end_ns, title)
        if args.gantt:
            print("\n" + timeline.table() + "\n\n" + timeline.gantt())
        save_trace(timeline, trace)
    print_json(args, {"prompt_tokens": args.prompt_len, "profile": profile.name, **asdict(found)})


def _chosen(args: argparse.Namespace) -> Any:
    """(planner, choice) that the options name; nothing of the program but its manifest is read."""
    from doubleweave.schedule.choice import Wish

    _, found, planner = _planner(args)
    wish = Wish(args.schedule, args.threads, workers_of(args), args.chunk)
    planner.check(wish)
    most = found.model.max_context
    args.prompt_len = min(_PROMPT, most) if args.prompt_len is None else args.prompt_len
    if not 1 <= args.prompt_len <= most:
        raise InputError(f"prompt-len: found {args.prompt_len}, expected 1 to {most}")
    threads = planner.threads(args.threads)
    return planner, planner.choose(wish._replace(threads=threads), args.prompt_len)


def _planner(args: argparse.Namespace) -> Any:
    """(folder, manifest, planner) of a language model's program and the profile that the options name.

    Raises InputError for the program of another module.
    """
    from doubleweave.ir import manifest
    from doubleweave.predict.find_profile import find_profile
    from doubleweave.predict.plan_run import RunPlanner

    folder = Path(args.program)
    found = manifest.read(folder)
    if found.model is None:
        raise InputError(
            f"{args.program}: is the program of module {found.name}, expected a language model's"
        )
    profile = find_profile(folder, found, args.profile)
    return folder, found, RunPlanner(found.split.decoder, profile, found.model.max_context)


def _add_plan(commands: Any) -> None:
    p = commands.add_parser(
        "plan",
        help="choose how a prompt is run",
        description="Simulate every way to run a prompt (chunks, schedule, workers, threads) and say which is fastest, "
        "and what limits it.",
    )
    add_program(p)
    p.add_argument(
        "--prompt-len", metavar="N[,N…]", help=f"prompt tokens, one or several lengths (default {_PROMPT})"
    )
    p.add_argument("--threads", type=int, metavar="N", help="threads in all (default: the profile's)")
    add_profile_option(p)
    p.add_argument("--all", action="store_true", help="list every candidate (default: the fastest ten)")
    add_json(p)
    p.set_defaults(command=_plan)


def _add_prepare(commands: Any) -> None:
    p = commands.add_parser(
        "prepare",
        help="write what doubleweave-run needs",
        description="Write DIR/run.json, by which doubleweave-run runs the program without Python, for the machine of "
        "a profile: costs, and what --schedule auto does there. compile writes one for a generic machine, profile for "
        "this one.",
    )
    add_program(p)
    add_profile_option(p)
    p.add_argument("--threads", type=int, metavar="N", help="threads in all (default: the profile's)")
    add_json(p)
    p.set_defaults(command=_prepare)


def _prepare(args: argparse.Namespace) -> None:
    from doubleweave.predict.planner import decisions
    from doubleweave.predict.run_file import write_run_file

    folder, found, planner = _planner(args)
    profile, threads = planner.profile, planner.threads(args.threads)
    if not profile.decisions or profile.threads != threads:
        chosen = decisions(planner, threads, found.model.max_context)
        profile = replace(profile, threads=threads, decisions=chosen)
    write_run_file(folder, found, profile)
    print(f"{folder / RUN_FILE}: for {profile.name}, {threads} threads")
    print_json(args, {"file": str(folder / RUN_FILE), "profile": profile.name, "threads": threads})


def _plan(args: argparse.Namespace) -> None:
    from doubleweave.cli.show_plan import plan_dict, plan_text
    from doubleweave.predict.planner import plan

    _, found, planner = _planner(args)
    profile, lengths = planner.profile, []
    given = str(min(_PROMPT, found.model.max_context)) if args.prompt_len is None else args.prompt_len
    for word in given.split(","):
        if not word.isdigit() or not 1 <= int(word) <= found.model.max_context:
            raise InputError(
                f"prompt-len: found {word!r}, expected numbers from 1 to {found.model.max_context}"
            )
        lengths.append(int(word))
    threads = planner.threads(args.threads)
    print(f"on {profile.name} ({profile.kind}), {threads} threads in all")
    plans = [plan(planner, length, threads) for length in lengths]
    for item in plans:
        print("\n" + plan_text(item, len(item.candidates) if args.all else 10))
    dicts = [plan_dict(item) for item in plans]
    print_json(args, dicts[0] if len(dicts) == 1 else {"plans": dicts})


def _add_trace(commands: Any) -> None:
    p = commands.add_parser(
        "trace",
        help="compare two traces",
        description="Compare two traces task by task: what was predicted and what was measured, or two schedules.",
    )
    p.add_argument("a", metavar="A", help="a .json that --trace wrote")
    p.add_argument("b", metavar="B", help="another one")
    p.add_argument("--limit", type=int, default=15, metavar="N", help="how many tasks to list (default 15)")
    add_json(p)
    p.set_defaults(command=_trace)


def _trace(args: argparse.Namespace) -> None:
    from doubleweave.timeline.compare import compare, comparison_text
    from doubleweave.timeline.trace_file import read_trace

    found = compare(read_trace(Path(args.a)), read_trace(Path(args.b)))
    print(comparison_text(found, args.limit))
    print_json(args, asdict(found))
