"""What weights are kept in where somebody asks for it: by pattern, for the linears of a language model.

A linear's name is its segment's and its role's, such as "block_3.down" (roles.py). A pattern without a dot is a role's,
or a segment's, of which it means all linears. Later patterns count before earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from doubleweave.compiler.quantize.channels import Place
from doubleweave.compiler.quantize.grids import GROUP_SIZE
from doubleweave.compiler.quantize.roles import ROLES, role_of_weights, roles_of
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.errors import PolicyError

FLOAT32 = "float32"
_MOST_4_BIT_COLUMNS = 1 << 16  # kMostInt4Features in native/include/doubleweave/linears.h


def takes_4_bits(columns: int) -> bool:
    """Whether the kernel of 4 bits takes a weight of so many columns: whole groups, and sums that stay in 32 bits."""
    return columns % GROUP_SIZE == 0 and columns <= _MOST_4_BIT_COLUMNS


def kept_formats(
    torch_split: TorchSplit, keep: Mapping[str, str], *, is_part: bool = False
) -> dict[Place, str]:
    """A name of KEPT_FORMATS for each weight that a pattern matches.

    Raises PolicyError for a pattern that matches none, unless this `is_part` of a model, and where 4 bits are asked for
    a weight without whole groups.
    """
    names: dict[Place, tuple[str, str]] = {}
    roles = roles_of(torch_split)
    for segment in torch_split.split.segments:
        found = role_of_weights(roles[segment.name], torch_split.graphs[segment.structure].graph)
        # A rounding that changes which experts are chosen changes all that follows: they are no one's to round.
        names |= {
            Place(segment.name, index): (segment.name, role)
            for index, role in found.items()
            if role != "router"
        }
    asked: dict[Place, str] = {}
    for pattern, into in keep.items():
        matching = [place for place, name in names.items() if _matches(pattern, *name)]
        if not matching and not is_part:
            there = {role for _, role in names.values()}
            raise PolicyError(
                f"keep: {pattern!r} matches no linear; expected a role ({', '.join(_ordered(there))}), a "
                "segment that has linears (block_3), both (block_3.down) or a pattern (block_*.down)"
            )
        asked.update(dict.fromkeys(matching, into))
    for place, into in asked.items():
        columns = int(torch_split.weights[place.segment][place.weight].shape[-1])
        if into == "int4" and not takes_4_bits(columns):
            raise PolicyError(
                f"keep: found int4 for {'.'.join(names[place])}, which has {columns} input features; expected a "
                f"multiple of {GROUP_SIZE}, at most {_MOST_4_BIT_COLUMNS}; give it int8"
            )
    return asked


def _matches(pattern: str, segment: str, role: str) -> bool:
    if "." in pattern:
        return fnmatchcase(f"{segment}.{role}", pattern)
    return fnmatchcase(role, pattern) or fnmatchcase(segment, pattern)


def _ordered(roles: set[str]) -> list[str]:
    known = [role for role in ROLES if role in roles]
    return known + sorted(roles - {*known})
