"""The command that shows a program's segments, calls and memory; it reads the manifest and loads nothing."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from doubleweave.cli.options import add_program, print_json
from doubleweave.errors import InputError


def add_inspect(commands: Any) -> None:
    p = commands.add_parser(
        "inspect", help="show a program's segments", description="Show every segment of a program."
    )
    add_program(p)
    p.add_argument(
        "--calls", action="store_true", help="also list every call with the values it reads and writes"
    )
    p.add_argument(
        "--memory",
        action="store_true",
        help="also list every value of a run: its writer, its readers, its bytes, when it is freed, and the peak",
    )
    p.add_argument(
        "--prompt-len",
        type=int,
        metavar="N",
        help="with --memory: prompt tokens (a language model; default 128)",
    )
    p.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="SYMBOL=N",
        help="with --memory: the size of a dim (another module; default: the largest); may be repeated",
    )
    p.add_argument(
        "--verify",
        action="store_true",
        help="compute the SHA-256 of the program file though it was found right before and was not written since",
    )
    p.add_argument("--json", action="store_true", help="print it as one JSON object on the last line")
    p.set_defaults(command=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    from doubleweave.cli.show_program import inspect_dict, inspect_table
    from doubleweave.ir import manifest

    found = manifest.read(Path(args.program), verify=args.verify)
    print(inspect_table(found))
    if args.calls:
        print("\n" + str(found.split))
    report = inspect_dict(found)
    if args.memory:
        from doubleweave.cli.show_memory import memory_of, table

        memory = memory_of(found, args.prompt_len, _sizes(args.size))
        print("\n" + table(memory))
        report["memory"] = asdict(memory)
    print_json(args, report)


def _sizes(given: list[str]) -> dict[str, int]:
    sizes = {}
    for item in given:
        symbol, _, number = item.partition("=")
        if not symbol or not number.isdigit():
            raise InputError(f"size: found {item!r}, expected SYMBOL=N such as T=128")
        sizes[symbol] = int(number)
    return sizes
