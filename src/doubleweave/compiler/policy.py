"""The policy: which nested modules are static and which dynamic, and on which device each runs.

A policy is a dict. Keys are qualified module names ("layers.0.attention"; "" is the whole module), patterns
("re:layers[.][0-9]+[.]mlp", matched in full), module classes, or operators (torch.ops.aten.softmax.int); values
are Static or Dynamic. The most specific key wins: an operator, a name, the first pattern, the nearest class. It
knows nothing of graphs or backends.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from doubleweave.errors import PolicyError

if TYPE_CHECKING:
    from torch import nn

DEFAULT_SIZES = (1, 32, 128)  # decoding takes one row at a time; short and long chunks of a prompt
DEFAULT_BACKEND = "xnnpack"  # of what no option or rule puts elsewhere
KERNELS_BACKEND = "portable"  # of operators that no delegate takes
MOST_ROWS = 4096
TABLE_FORMATS = ("int8", "int4", "bfloat16")  # quantize/formats.py has them
KEPT_FORMATS = ("int4", "int8", "float32")  # of linears: quantize/kept.py
PATTERN = "re:"


@dataclass(frozen=True)
class Static:
    """Compile a module for fixed sizes, as an NPU needs.

    device: a name; modules on different devices never share a segment. chunk: the axis of each argument along which
    the module is cut into chunks, {"x": 1}; its rows along it must not depend on one another. Without it every
    size must be fixed where the module is called. sizes: rows of a chunk, one compiled method each (default 1,
    32, 128); the last chunk is padded up to one of them.
    """

    device: str = "npu"
    chunk: Mapping[str, int] | None = None
    sizes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Dynamic:
    """Compile a module once for every size in a range.

    dims: `torch.export`'s `dynamic_shapes` for the arguments of this module's `forward`, by name or position,
    {"a": {0: m, 1: k}}; each `Dim` with its largest size. Without it, axes are dynamic where the calls of the
    module differ or are dynamic themselves.
    """

    dims: Any = None
    device: str = "cpu"


Rule = Static | Dynamic
Policy = Mapping[Any, Rule]


@dataclass(frozen=True)
class Match:
    """A module that a policy names, under its first qualified name, with the key that names it."""

    name: str
    module: nn.Module
    rule: Rule
    key: str


def resolve(module: nn.Module, policy: Policy) -> list[Match]:
    """Find the modules that the policy names, outermost first.

    Raises PolicyError for a key that matches nothing or a rule that contradicts itself.
    """
    for key, rule in policy.items():
        _check_key(key)
        _check_rule(_key_text(key), rule)
    policy = {key: rule for key, rule in policy.items() if not _is_operator(key)}
    # By id: a module's class may define its own equality.
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, found in module.named_modules(remove_duplicate=False):
        names.setdefault(id(found), []).append(name)
        modules[id(found)] = found
    used: set[int] = set()
    matches = []
    for number, found in modules.items():
        candidates = [
            (rank, index, key)
            for index, key in enumerate(policy)
            if (rank := _rank(key, names[number], found)) is not None
        ]
        used |= {index for _, index, _ in candidates}
        if not candidates:
            continue
        best, _, key = min(candidates)
        rule, text = policy[key], _key_text(key)
        # Only names tie: a module that is in the model twice has two, and each may have a rule.
        if rivals := [
            _key_text(other) for rank, _, other in candidates if rank == best == 0 and policy[other] != rule
        ]:
            raise PolicyError(
                f"policy: {text} and {min(rivals)} are one module, and have different rules; give it one"
            )
        matches.append(Match(names[number][0], found, rule, text))
    for index, key in enumerate(policy):
        if index not in used:
            raise PolicyError(_no_match(key, module))
    return sorted(matches, key=lambda match: (match.name.count(".") + bool(match.name), match.name))


def operator_rules(policy: Policy) -> dict[Any, Rule]:
    """The rules of operators. Raises PolicyError for one that names arguments, which operators do not have."""
    found = {key: rule for key, rule in policy.items() if _is_operator(key)}
    for key, rule in found.items():
        argument = "chunk" if isinstance(rule, Static) else "dims"
        if getattr(rule, argument) is not None:
            raise PolicyError(
                f"policy: {_key_text(key)} is an operator, whose sizes are those of what it is called with; leave "
                f"{argument} out"
            )
    return found


def _is_operator(key: Any) -> bool:
    return hasattr(key, "_schema")


def _rank(key: Any, names: list[str], module: nn.Module) -> int | None:
    """How specific a key is for a module, smaller is more so; None where it does not match."""
    if isinstance(key, type):
        lineage = type(module).__mro__
        return 2 + lineage.index(key) if key in lineage else None
    if key.startswith(PATTERN):
        pattern = re.compile(key.removeprefix(PATTERN))
        return 1 if any(pattern.fullmatch(name) for name in names) else None
    return 0 if key in names else None


def _key_text(key: Any) -> str:
    if _is_operator(key):
        return str(key)
    return key.__name__ if isinstance(key, type) else repr(key)


def _no_match(key: Any, module: nn.Module) -> str:
    names = [name for name, _ in module.named_modules(remove_duplicate=False) if name]
    if isinstance(key, type):
        classes = sorted({type(found).__name__ for found in module.modules()})
        return f"policy: no module is a {key.__name__}; this one has {', '.join(classes[:12])}"
    near = difflib.get_close_matches(key.removeprefix(PATTERN), names, n=3, cutoff=0.5)
    if near:
        hint = f"; names near it: {', '.join(near)}"
    elif names:
        more = f", … ({len(names)} in all)" if len(names) > 6 else ""
        hint = f"; its names are {', '.join(names[:6])}{more}"
    else:
        hint = "; it has no nested modules"
    what = "pattern" if key.startswith(PATTERN) else "key"
    return f"policy: {what} {key!r} matches no module of {type(module).__name__}{hint}"


def _check_rule(key: str, rule: Any) -> None:
    if not isinstance(rule, (Static, Dynamic)):
        found = f"the class {rule.__name__}" if isinstance(rule, type) else f"a {type(rule).__name__}"
        raise PolicyError(
            f"policy: {key} is {found}, expected doubleweave.Static(…) or doubleweave.Dynamic(…)"
        )
    if not isinstance(rule.device, str) or not re.fullmatch(r"[A-Za-z][\w.-]*", rule.device):
        raise PolicyError(
            f"policy: {key}: found device {rule.device!r}, expected a name such as 'npu' or 'cpu'"
        )
    if not isinstance(rule, Static):
        return
    if rule.chunk is None and rule.sizes is not None:
        raise PolicyError(
            f"policy: {key}: sizes={rule.sizes!r} are those of chunks, and it has no chunk; add "
            'chunk={"argument": axis}'
        )
    if rule.chunk is not None and not (
        isinstance(rule.chunk, Mapping)
        and rule.chunk
        and all(isinstance(name, str) and type(axis) is int for name, axis in rule.chunk.items())
    ):
        raise PolicyError(f'policy: {key}: found chunk={rule.chunk!r}, expected {{"argument": axis, …}}')
    if rule.sizes is not None and not isinstance(rule.sizes, (tuple, list)):
        raise PolicyError(f"policy: {key}: found sizes={rule.sizes!r}, expected a tuple such as (1, 32, 128)")
    for size in rule.sizes or ():
        if type(size) is not int or not 1 <= size <= MOST_ROWS:
            raise PolicyError(f"policy: {key}: found size {size!r}, expected 1 to {MOST_ROWS} rows")


def _check_key(key: Any) -> None:
    """Raises PolicyError for a key of another kind, or a pattern that is none."""
    if isinstance(key, type) or _is_operator(key):
        return
    if not isinstance(key, str):
        raise PolicyError(
            f"policy: found key {key!r}, expected a module name, a pattern 're:…', a module class or an operator "
            "such as torch.ops.aten.softmax.int"
        )
    if key.startswith(PATTERN):
        try:
            re.compile(key.removeprefix(PATTERN))
        except re.error as error:
            raise PolicyError(f"policy: {key!r} is not a pattern ({error})") from None
