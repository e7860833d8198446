"""The commands that make a program or say what works here: compile and doctor."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

from doubleweave.cli.options import print_json, progress_bar
from doubleweave.compiler.backends import llm_backends
from doubleweave.compiler.backends.backend import Backend, Option
from doubleweave.compiler.policy import DEFAULT_BACKEND, TABLE_FORMATS
from doubleweave.errors import PolicyError
from doubleweave.ir.cache_format import CACHE_FORMATS


def add_compile(commands: Any) -> None:
    p = commands.add_parser(
        "compile",
        help="compile a model into a program folder",
        description="Compile SOURCE into the program folder DIR.",
        epilog="example: doubleweave compile smollm2 -o programs/smollm2",
    )
    p.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="an alias (smollm2), a .gguf file, a Hugging Face folder or a Llama checkpoint (.pt, .pth)",
    )
    p.add_argument(
        "-c", "--checkpoint", metavar="FILE", help="SOURCE, under the name that other tools give it"
    )
    p.add_argument(
        "-p", "--params", metavar="FILE", help="of a Llama checkpoint (default: params.json beside it)"
    )
    p.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="of a Llama checkpoint: a SentencePiece model or a tiktoken list (default: tokenizer.model beside it)",
    )
    p.add_argument(
        "--adapter",
        metavar="DIR",
        help="of a Hugging Face folder: the folder of a LoRA adapter, which is merged into the weights",
    )
    p.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="of a Hugging Face folder: run the Python code that it brings; without it none of it runs",
    )
    p.add_argument("-o", "--out", metavar="DIR", required=True, help="the program folder to write")
    offered = llm_backends()
    of_npus = [name for name, backend in offered.items() if backend.takes_fixed_sizes_only]
    p.add_argument(
        "--backend",
        default=DEFAULT_BACKEND,
        help=f"{_alternatives({name: backend.about for name, backend in offered.items()})}; see doubleweave doctor",
    )
    p.add_argument(
        "--quantize",
        metavar="RECIPE",
        help="; ".join(f"{name}: {_alternatives(backend.recipes)}" for name, backend in offered.items()),
    )
    p.add_argument(
        "--recipe",
        metavar="FILE",
        help="a TOML file with quantize, keep, table, cache, calibrate and budget; options beside it count before it",
    )
    p.add_argument(
        "--shape",
        help="bounded (default): linears take 1 to N rows; static: fixed sizes, as an NPU needs (default for "
        f"{', '.join(of_npus)})",
    )
    p.add_argument(
        "--chunk",
        action="append",
        type=int,
        default=[],
        metavar="N",
        help="bounded: the most rows (default 128); static: a size, may be repeated (default 1, 32, 128)",
    )
    p.add_argument("--max-context", type=int, metavar="N", help="the longest context (default: the model's)")
    p.add_argument(
        "--attention",
        default="dynamic",
        help="dynamic (default; on the CPU, over a cache that grows) or static (inlined in the static segments, over a "
        "cache of --max-context tokens with a mask: the all-static way, to compare with)",
    )
    p.add_argument(
        "--cache",
        metavar="FORMAT",
        help=f"what keys and values are kept in: {', '.join(CACHE_FORMATS)} (a scale for each head of a row); "
        f"default: bfloat16 for quantized programs of {DEFAULT_BACKEND}, float32 for others",
    )
    p.add_argument(
        "--table",
        metavar="FORMAT",
        help=f"what rows of embeddings are kept in: {', '.join(TABLE_FORMATS)}; default: int8 (a table that is tied to "
        "the head takes no room) where the recipe rounds weights",
    )
    for option, help_text in _own_options(offered):
        _add_option(p, option, help_text)
    checks = p.add_mutually_exclusive_group()
    checks.add_argument(
        "--no-check",
        action="store_true",
        help="do not run the program against the source before it is written; the manifest says so",
    )
    checks.add_argument(
        "--check-whole",
        action="store_true",
        help="run all layers of a large model against the source, several times as long as its first layers and each "
        "segment by itself",
    )
    p.add_argument(
        "--score",
        action="store_true",
        help="run the program over the package's texts (18,000 tokens of several kinds) against float32; the manifest "
        "keeps perplexity, divergence and equal next tokens",
    )
    p.add_argument("--json", action="store_true", help="print a summary as one JSON object on the last line")
    p.set_defaults(command=_compile)


def add_doctor(commands: Any) -> None:
    p = commands.add_parser(
        "doctor",
        help="say what works on this machine",
        description="Say which backends work on this machine, and what to install for the rest.",
    )
    p.add_argument("--json", action="store_true", help="print it as one JSON object on the last line")
    p.set_defaults(command=_doctor)


def _alternatives(meanings: Mapping[str, str]) -> str:
    """a (default; its meaning), b (its meaning) or c"""
    texts = []
    for number, (name, meaning) in enumerate(meanings.items()):
        about = "; ".join(filter(None, ("default" if number == 0 else "", meaning)))
        texts.append(f"{name} ({about})" if about else name)
    return " or ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def _own_options(offered: Mapping[str, Backend]) -> list[tuple[Option, str]]:
    """The options of all backends with their help; options of one name are one on the command line."""
    found: dict[str, tuple[Option, list[str]]] = {}
    for name, backend in offered.items():
        for option in backend.options:
            found.setdefault(option.name, (option, []))[1].append(f"{name}: {option.help}")
    return [(option, "; ".join(texts)) for option, texts in found.values()]


def _add_option(p: argparse.ArgumentParser, option: Option, help_text: str) -> None:
    """Add one that is None where it is not given."""

    def pair(text: str) -> tuple[str, str]:
        key, equals, value = text.rpartition("=")
        if not equals or not key:
            raise argparse.ArgumentTypeError(
                f"found {text!r}, expected {option.metavar}, such as {option.example!r}"
            )
        return key, value

    kinds: dict[str, dict[str, Any]] = {
        "flag": {"action": "store_true", "default": None},
        "pairs": {"action": "append", "type": pair, "metavar": option.metavar},
        "text": {"metavar": option.metavar or None},
    }
    p.add_argument(f"--{option.flag}", help=help_text, **kinds[option.kind])


def _compile(args: argparse.Namespace) -> None:
    from doubleweave.cli.show_program import check_lines, compile_summary, quality_lines
    from doubleweave.cli.show_scores import score_lines
    from doubleweave.entries.compile_llm import compile_llm

    if (args.source is None) == (args.checkpoint is None):
        found = "neither SOURCE nor -c" if args.source is None else "both SOURCE and -c"
        raise PolicyError(f"source: found {found}, expected one of them")
    start = time.perf_counter()
    with progress_bar() as progress:
        manifest = compile_llm(
            args.checkpoint if args.source is None else args.source,
            args.out,
            backend=args.backend,
            quantize=args.quantize,
            recipe=args.recipe,
            shape=args.shape,
            chunk=args.chunk,
            max_context=args.max_context,
            attention=args.attention,
            cache=args.cache,
            table=args.table,
            params=args.params,
            tokenizer=args.tokenizer,
            adapter=args.adapter,
            trust_remote_code=args.trust_remote_code,
            check="whole" if args.check_whole else not args.no_check,
            score=args.score,
            progress=progress,
            **_given(args),
        )
    summary = compile_summary(args.out, manifest, time.perf_counter() - start)
    print(
        f"{args.out}: {summary['segments']} segments, {summary['methods']} methods, "
        f"{summary['program_bytes'] / 2**20:.0f} MiB in {summary['seconds']:.0f} s, "
        f"at most {summary['peak_memory_bytes'] / 2**20:.0f} MiB of memory in a process"
    )
    for line in (*check_lines(manifest), *quality_lines(manifest), *score_lines(manifest.scores)):
        print(line)
    if not summary["tokenizer"]:
        print("note: the source has no tokenizer that can be read; give prompts as --token-ids")
    print_json(args, summary)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The backends' options that the command line has."""
    found = {}
    for option, _ in _own_options(llm_backends()):
        value = getattr(args, option.name)
        if value is not None:
            found[option.name] = dict(value) if option.kind == "pairs" else value
    return found


def _doctor(args: argparse.Namespace) -> None:
    from doubleweave.cli.doctor import examine, lines_of

    found = examine()
    print(*lines_of(found), sep="\n")
    print_json(args, found)
