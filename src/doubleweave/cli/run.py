"""The commands that run a program, run, bench and score: each parses options, makes one call and prints."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doubleweave.cli.options import (
    add_json,
    add_program,
    add_schedule_options,
    open_quietly,
    print_json,
    save_trace,
    trace_path,
    workers_of,
)
from doubleweave.cli.show_scores import score_dict, score_lines
from doubleweave.errors import InputError
from doubleweave.ir.text_score import together
from doubleweave.texts import held_out_texts
from doubleweave.vendors.library import emulator_of

if TYPE_CHECKING:
    from doubleweave.runtime.llm.program import Program
    from doubleweave.runtime.llm.session import Session
    from doubleweave.timeline.timeline import Timeline


def add_run(commands: Any) -> None:
    p = commands.add_parser("run", help="generate text", description="Generate text from a prompt.")
    add_program(p)
    p.add_argument("-p", "--prompt", metavar="PROMPT", help="the prompt; - reads it from standard input")
    p.add_argument("--token-ids", metavar="FILE", help="the prompt as a JSON list of token ids")
    p.add_argument("-n", "--num", type=int, default=128, metavar="NUM", help="most new tokens (default 128)")
    add_schedule_options(p)
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (default 1)")
    p.add_argument("--seed", type=int, metavar="S", help="makes sampling repeatable")
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated"
    )
    p.add_argument("--raw", action="store_true", help="give the prompt as it is, without the chat template")
    _add_trace_option(p)
    add_json(p)
    p.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> None:
    from doubleweave.cli.show_run import generation_lines
    from doubleweave.runtime.llm.generate import run
    from doubleweave.runtime.llm.sampling import Sampling

    sampling = Sampling(args.temperature, args.top_p, args.seed)
    if (args.prompt is None) == (args.token_ids is None):
        raise InputError("prompt: give either -p PROMPT or --token-ids FILE")
    trace = trace_path(args.trace or None)
    program = open_quietly(args.program)
    session = _session(program, args)
    if args.token_ids is not None:
        ids = _read_token_ids(args.token_ids)
    else:
        prompt = _read_stdin() if args.prompt == "-" else args.prompt
        ids = program.text.encode(prompt, raw=args.raw)
    if session.encodes_tokens:  # the prompt is what the encoder reads
        session.encode([ids])
        ids = list(program.model.start_token_ids)

    def show(piece: str) -> None:
        print(piece, end="", flush=True)

    text = program.text_for(args.stop)
    result = run(session, ids, args.num, sampling, text, tuple(args.stop), show, record=True)
    if result.text is None:
        print(json.dumps(list(result.token_ids)), end="")
    print("\n")
    if session.timeline is not None:
        _show_trace(args, session.timeline, trace)
    print(*generation_lines(result), sep="\n")
    print_json(args, asdict(result))


def add_bench(commands: Any) -> None:
    p = commands.add_parser(
        "bench", help="measure speed", description="Measure prefill and decode: medians and spread over runs."
    )
    add_program(p)
    p.add_argument("--prompt-len", type=int, default=512, metavar="N", help="prompt tokens (default 512)")
    p.add_argument("--gen", type=int, default=64, metavar="N", help="tokens to decode (default 64)")
    p.add_argument("--token-ids", metavar="FILE", help="the prompt as a JSON list (instead of --prompt-len)")
    p.add_argument("--runs", type=int, default=5, metavar="N", help="measured runs (default 5)")
    add_schedule_options(p)
    _add_trace_option(p)
    add_json(p)
    p.set_defaults(command=_bench)


def _bench(args: argparse.Namespace) -> None:
    from doubleweave.cli.show_run import bench_lines
    from doubleweave.measure.bench import bench

    trace = trace_path(args.trace or None)
    program = open_quietly(args.program)
    ids = None if args.token_ids is None else _read_token_ids(args.token_ids)
    session = _session(program, args)
    result, timeline = bench(program, session, args.prompt_len, args.gen, runs=args.runs, token_ids=ids)
    print(*bench_lines(result), sep="\n")
    _show_trace(args, timeline, trace)
    print_json(args, result)


def add_score(commands: Any) -> None:
    p = commands.add_parser(
        "score",
        help="perplexity of texts",
        description="Perplexity of a text, through the prefill path; without one, of the package's own: prose, "
        "documentation, code, conversations and German, none of which recipes are calibrated on.",
    )
    add_program(p)
    p.add_argument("file", metavar="FILE", nargs="?", help="a text file")
    p.add_argument(
        "--against",
        metavar="DIR",
        help="a program of the same model, compiled with --quantize none: how much perplexity rises, how far the next "
        "token's probabilities diverge, and how many next tokens are the same",
    )
    add_schedule_options(p)
    add_json(p)
    p.set_defaults(command=_score)


def _score(args: argparse.Namespace) -> None:
    from doubleweave.measure.perplexity import check_exact, score

    texts = held_out_texts() if args.file is None else {Path(args.file).name: _text(args.file)}
    program = open_quietly(args.program)
    session, exact = _session(program, args), None
    if args.against is not None:
        other = open_quietly(args.against)
        check_exact(program, other, args.against)
        exact = other.session(threads=args.threads)
    start = time.perf_counter()
    scores = [score(program, session, text, name, exact) for name, text in texts.items()]
    seconds = time.perf_counter() - start
    whole = together("all", scores)
    speed = whole.num_tokens / seconds
    if args.file is None or exact is not None:
        print("\n".join(score_lines(scores)))
    else:
        print(f"perplexity {whole.perplexity:.4f} over {whole.num_tokens} tokens, {speed:.0f} tokens/s")
    about = {"tokens": whole.num_tokens, "tok_per_s": speed, "schedule": session.schedule}
    about |= {"threads": session.threads, "scores": [score_dict(each) for each in scores]}
    print_json(args, {**score_dict(whole), **about})


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from None


def _add_trace_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--trace",
        nargs="?",
        const="",
        metavar="FILE",
        help="what ran where in the prefill: printed as table and Gantt, or written to FILE: .json (ui.perfetto.dev), "
        ".svg or .png",
    )


def _session(program: Program, args: argparse.Namespace) -> Session:
    session = program.session(
        args.schedule, args.threads, workers=workers_of(args), chunk=args.chunk, profile=args.profile
    )
    if emulator := emulator_of(program.split):
        print(f"running on {emulator}, which is slow", file=sys.stderr)
        session.on_chunk = _say_chunk
    return session


def _say_chunk(done: int, total: int) -> None:
    if total > 1:
        print(f"chunk {done} of {total} done", file=sys.stderr, flush=True)


def _show_trace(args: argparse.Namespace, timeline: Timeline, path: Path | None) -> None:
    if args.trace == "":
        print(timeline.table() + "\n\n" + timeline.gantt() + "\n")
    save_trace(timeline, path)


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: is not text ({error}); give it as {error.encoding}") from None


def _read_token_ids(path: str) -> list[int]:
    try:
        ids = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a JSON list of token ids ({error})") from None
    if not isinstance(ids, list) or any(type(item) is not int for item in ids):
        raise InputError(f"{path}: expected a JSON list of integers (token ids), such as [1, 2, 3]")
    return ids
