"""The command that shows and clears what is kept of large programs, so that they open quickly."""

from __future__ import annotations

import argparse
import time
from typing import Any

from doubleweave.cli.options import add_json, print_json
from doubleweave.ir.cache_folder import VARIABLE, cache_folder
from doubleweave.ir.known_files import forget_all
from doubleweave.tables import format_table


def add_cache(commands: Any) -> None:
    p = commands.add_parser(
        "cache",
        help="show or clear the packed weights of large programs",
        description="Show what is kept of large programs so that they open quickly: their weights, as XNNPACK packs "
        f"them for this processor. ${VARIABLE} names another folder; off keeps nothing.",
    )
    p.add_argument(
        "--clear", action="store_true", help="remove all of it; running programs keep what they use"
    )
    add_json(p)
    p.set_defaults(command=_cache)


def _cache(args: argparse.Namespace) -> None:
    from doubleweave.runtime.packed_weights import MOST_BYTES, kept, make_room

    folder = cache_folder()
    if folder is None:
        print(f"no cache: ${VARIABLE} is off, or there is no home")
        print_json(args, {"folder": None, "programs": [], "removed_bytes": 0})
        return
    removed = make_room(most=0) if args.clear else 0
    if args.clear:
        forget_all()
    found = kept()
    if args.clear:
        print(f"removed {_megabytes(removed)}")
    rows = [["program", "bytes", "last used"]]
    for each in found:
        rows.append(
            [
                each.name,
                _megabytes(each.num_bytes),
                time.strftime("%Y-%m-%d %H:%M", time.localtime(each.used)),
            ]
        )
    if found:
        print(format_table(rows))
    total = sum(each.num_bytes for each in found)
    print(f"{folder}: {_megabytes(total)} of at most {_megabytes(MOST_BYTES)}")
    programs = [{"name": each.name, "bytes": each.num_bytes, "used": each.used} for each in found]
    print_json(args, {"folder": str(folder), "programs": programs, "removed_bytes": removed})


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
