"""Dims that a module can be exported with, near those that were given: found by following what torch.export asks for.

What is proposed here was exported. It knows nothing of policies or segments.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import sympy
import torch
from torch.export import Dim

from doubleweave.compiler.graph.nodes import expression
from doubleweave.compiler.trace import dims as _dims
from doubleweave.compiler.trace.dims import Leaf

# Exports leaves, or raises what torch.export raises.
Export = Callable[[Sequence[Leaf]], torch.export.ExportedProgram]

_LETTERS = "mknpqrstuvwxyz"  # names of suggested dims, in order
_LEAST = (2, 3, 4, 5)
_MULTIPLES = (2, 3, 4, 5, 6, 7, 8, 12, 16, 32, 64)
_MOST_TRIES = 6  # suggestions followed one behind the other
_MOST_RAISES = 8  # of the least value of a name

_BOUNDS = re.compile(r"(\w+) = Dim\('\w+'(?:, min=(\d+))?(?:, max=(\d+))?\)")
_FIXED = re.compile(r"(\w+) = (\d+)")
_DERIVED = re.compile(r"(\w+) = (?:(\d+)\*)?([A-Za-z_]\w*)(?: ([+-]) (\d+))?")


class _Size(NamedTuple):
    """factor * name + offset."""

    name: str
    factor: int = 1
    offset: int = 0

    def __str__(self) -> str:
        text = f"{self.factor}*{self.name}" if self.factor != 1 else self.name
        return f"{text} {'-' if self.offset < 0 else '+'} {abs(self.offset)}" if self.offset else text

    def of(self, other: _Size) -> _Size:
        """This size where its name stands for `other`."""
        return _Size(other.name, self.factor * other.factor, self.factor * other.offset + self.offset)


Axis = tuple[int, int]  # leaf, axis


@dataclass(frozen=True)
class Plan:
    """Sizes of the dynamic axes, with the bounds of their names."""

    sizes: dict[Axis, _Size]
    bounds: dict[str, tuple[int, int]]

    def text(self, leaves: Sequence[Leaf]) -> str:
        """In the notation of `dynamic_shapes`, with the range of each name."""
        axes: list[dict[int, str]] = [{} for _ in leaves]
        for (leaf, axis), size in self.sizes.items():
            axes[leaf][axis] = str(size)
        names = dict.fromkeys(size.name for size in self.sizes.values())
        ranges = (f"{name} from {self.bounds[name][0]} to {self.bounds[name][1]}" for name in names)
        return ", ".join((_dims.text([leaf.path for leaf in leaves], axes), *ranges))

    def leaves(self, leaves: Sequence[Leaf]) -> tuple[Leaf, ...]:
        """The leaves with these dims, and with examples of these sizes."""
        roots = {name: Dim(name, min=low, max=high) for name, (low, high) in self.bounds.items()}

        def dim(size: _Size) -> Any:
            found: Any = roots[size.name]
            found = found if size.factor == 1 else size.factor * found
            return found + size.offset if size.offset else found

        result = []
        for number, leaf in enumerate(leaves):
            hints = {axis: d for axis, d in leaf.axes.items() if not isinstance(d, Dim)}
            own = {axis: dim(size) for (of, axis), size in self.sizes.items() if of == number}
            given = torch.zeros(leaf.given or leaf.example.shape, dtype=leaf.example.dtype)
            result.append(Leaf(leaf.path, given, hints | own))
        # The user's own sizes are large enough for the module: torch.export then says what the least ones are.
        return tuple(result) if self._fits(result) else _dims.with_examples(result)

    def _fits(self, leaves: Sequence[Leaf]) -> bool:
        values = self.values(leaves)
        in_bounds = all(
            max(2, low) <= values.get(name, 0) <= high for name, (low, high) in self.bounds.items()
        )
        # Two dims of one size might look like one.
        return in_bounds and len(set(values.values())) == len(values)

    def values(self, leaves: Sequence[Leaf]) -> dict[str, int]:
        """The names' values in the user's arguments; none for a name whose axes disagree."""
        found: dict[str, set[int]] = {}
        for (number, axis), size in self.sizes.items():
            leaf = leaves[number]
            length = (leaf.given or leaf.example.shape)[axis] - size.offset
            found.setdefault(size.name, set()).add(0 if length % size.factor else length // size.factor)
        return {name: min(each) for name, each in found.items() if len(each) == 1}

    def fixed(self, leaves: Sequence[Leaf], values: Mapping[str, int]) -> list[Leaf]:
        """The leaves without dims, of the sizes for these values."""
        result = []
        for number, leaf in enumerate(leaves):
            shape = list(leaf.given or leaf.example.shape)
            for (of, axis), size in self.sizes.items():
                if of == number:
                    shape[axis] = size.factor * values[size.name] + size.offset
            # Of one number: it takes no memory.
            example = torch.zeros(1, dtype=leaf.example.dtype).expand(shape)
            result.append(Leaf(leaf.path, example, {}))
        return result


def working_plan(leaves: Sequence[Leaf], export: Export, *, has_clash: bool = False) -> Plan | None:
    """A plan near the leaves' own dims that exports; None where none is found.

    `has_clash`: one Dim has several sizes, so that how sizes are related must be found from the sizes alone.
    """
    starts = [] if has_clash else [_plan_of(leaves)]
    related = _related(leaves, export)
    if related is not None:
        starts.append(related)
    starts = [plan for plan in starts if plan.sizes]
    tries = [
        *starts,
        *(plan for start in starts[-1:] for plan in _variants(start, leaves)),
    ]
    return next(filter(None, (_follow(plan, leaves, export) for plan in tries)), None)


def with_given_sizes(leaves: Sequence[Leaf]) -> tuple[Leaf, ...] | None:
    """The leaves with examples of the user's own sizes; None where those do not fit the dims, or are 1."""
    plan = _plan_of(leaves)
    found = tuple(
        replace(leaf, example=torch.zeros(leaf.given or leaf.example.shape, dtype=leaf.example.dtype))
        for leaf in leaves
    )
    return found if plan.sizes and plan._fits(found) else None


def _plan_of(leaves: Sequence[Leaf]) -> Plan:
    sizes: dict[Axis, _Size] = {}
    bounds: dict[str, tuple[int, int]] = {}
    for number, leaf in enumerate(leaves):
        for axis, dim in leaf.axes.items():
            if not isinstance(dim, Dim):
                continue
            root: Any = getattr(dim, "root", dim)
            first, second = (1, 2) if root is dim else map(getattr(dim, "fn"), (1, 2))  # noqa: B009  derived dims only
            sizes[number, axis] = _Size(root.__name__, int(second - first), int(2 * first - second))
            bounds[root.__name__] = (root.min, root.max)
    return Plan(sizes, bounds)


def _variants(plan: Plan, leaves: Sequence[Leaf]) -> Iterator[Plan]:
    for least in _LEAST:
        yield replace(
            plan, bounds={name: (max(least, low), high) for name, (low, high) in plan.bounds.items()}
        )
    yield from _multiples(plan)
    yield from _pairs(plan, leaves)


def _multiples(plan: Plan) -> Iterator[Plan]:
    """The plan with one of its names a multiple of another number."""
    for name in plan.bounds:
        for factor in _MULTIPLES:
            yield _renamed(plan, name, _Size(name, factor))


def _pairs(plan: Plan, leaves: Sequence[Leaf]) -> Iterator[Plan]:
    """The plan with one of its names a line of another, as the user's sizes are."""
    values = plan.values(leaves)
    for small, other in itertools.permutations(values, 2):
        if 1 < values[small] <= values[other]:
            factor, rest = divmod(values[other], values[small])
            # In one order in every process, so that the advice is the same; equal ones are one.
            for size in dict.fromkeys(
                (_Size(small, factor, rest), _Size(small, 1, values[other] - values[small]))
            ):
                yield _renamed(plan, other, size)


def _renamed(plan: Plan, name: str, size: _Size) -> Plan:
    """The plan with `size` in place of a name; the range of its name follows from those that there are."""
    low, high = plan.bounds[name]
    own = (max(1, -((size.offset - low) // size.factor)), (high - size.offset) // size.factor)
    if size.name in plan.bounds and size.name != name:
        other = plan.bounds[size.name]
        own = max(own[0], other[0]), min(own[1], other[1])
    bounds = {key: value for key, value in plan.bounds.items() if key != name} | {size.name: own}
    sizes = {axis: found.of(size) if found.name == name else found for axis, found in plan.sizes.items()}
    return Plan(sizes, bounds)


def _follow(plan: Plan, leaves: Sequence[Leaf], export: Export) -> Plan | None:
    """The plan, changed as torch.export asks until it exports; None where it asks for nothing that helps."""
    for _ in range(_MOST_TRIES):
        if not plan.sizes or any(low >= high for low, high in plan.bounds.values()):
            return None
        try:
            export(plan.leaves(leaves))
            return _from_least(plan, leaves, export)
        except Exception as error:
            changed = _as_asked(plan, str(error))
        if changed == plan:
            return None
        plan = changed
    return None


def _from_least(plan: Plan, leaves: Sequence[Leaf], export: Export) -> Plan | None:
    """The plan with the least sizes that the module itself takes; None where its names turn out to be related."""
    for name in plan.bounds:
        for _ in range(_MOST_RAISES):
            low, high = plan.bounds[name]
            if low >= high:
                return None
            if _takes(plan, leaves, export, name, low):
                break
            plan = replace(plan, bounds={**plan.bounds, name: (low + 1, high)})
        else:
            return None
        # Not at the least: a size of 1 is broadcast.
        if len(plan.bounds) > 1 and not _takes(plan, leaves, export, name, (low + high + 1) // 2):
            return None
    return plan


def _takes(plan: Plan, leaves: Sequence[Leaf], export: Export, name: str, value: int) -> bool:
    """Whether the module takes the sizes for this value of a name, with all others at their most."""
    values = {key: most for key, (_, most) in plan.bounds.items()} | {name: value}
    try:
        export(plan.fixed(leaves, values))
    except Exception:
        return False
    return True


def suggestions(message: str) -> list[str]:
    """The lines "L = Dim('L', min=3)" and the like that torch.export ends an error with."""
    lines = [line.strip() for line in message.splitlines()]
    begin = lines.index("Suggested fixes:") + 1 if "Suggested fixes:" in lines else len(lines)
    found = []
    for line in lines[begin:]:
        if " = " not in line:
            break
        found.append(line)
    return found


def _as_asked(plan: Plan, message: str) -> Plan:
    lines = suggestions(message)
    for line in lines:
        if (found := _BOUNDS.fullmatch(line)) and found[1] in plan.bounds:
            low, high = plan.bounds[found[1]]
            asked = (max(low, int(found[2] or low)), min(high, int(found[3] or high)))
            plan = replace(plan, bounds={**plan.bounds, found[1]: asked})
    for line in lines:
        if (found := _FIXED.fullmatch(line)) and found[1] in plan.bounds:
            sizes = {axis: size for axis, size in plan.sizes.items() if size.name != found[1]}
            plan = Plan(sizes, {name: b for name, b in plan.bounds.items() if name != found[1]})
        elif (found := _DERIVED.fullmatch(line)) and found[1] in plan.bounds and found[3] != "Dim":
            offset = int(f"{found[4] or '+'}{found[5] or 0}")
            plan = _renamed(plan, found[1], _Size(found[3], int(found[2] or 1), offset))
    return plan


def _related(leaves: Sequence[Leaf], export: Export) -> Plan | None:
    """How torch relates the axes that have dims, from an export without names; None where it finds no lines."""
    free = [
        Leaf(
            leaf.path,
            torch.zeros(leaf.given or leaf.example.shape, dtype=leaf.example.dtype),
            {axis: Dim.AUTO if isinstance(dim, Dim) else dim for axis, dim in leaf.axes.items()},
        )
        for leaf in leaves
    ]
    try:
        exported = export(free)
    except Exception:
        return None
    inputs = [node for node in exported.graph.nodes if node.op == "placeholder"][-len(free) :]
    given = _plan_of(leaves)
    lines: dict[Axis, tuple[Any, int, int]] = {}
    for axis in given.sizes:
        found = expression(inputs[axis[0]].meta["val"].shape[axis[1]])
        if found.is_Integer:
            continue
        symbols = sorted(found.free_symbols, key=str)
        factor = sympy.diff(found, symbols[0])
        if len(symbols) > 1 or not (factor.is_Integer and factor > 0):
            return None
        lines[axis] = symbols[0], int(factor), int(sympy.simplify(found - factor * symbols[0]))
    names: dict[Any, str] = {}
    for symbol, _, _ in lines.values():
        names.setdefault(symbol, _LETTERS[len(names)] if len(names) < len(_LETTERS) else f"d{len(names)}")
    sizes: dict[Axis, _Size] = {}
    bounds: dict[str, tuple[int, int]] = {}
    for axis, (symbol, factor, offset) in lines.items():
        # s - 1 and s are m and m + 1.
        least = min(0, *(b for s, a, b in lines.values() if s == symbol and a == 1))
        size = _Size(names[symbol], factor, offset - factor * least)
        wanted = given.sizes[axis]
        low, high = (wanted.factor * bound + wanted.offset for bound in given.bounds[wanted.name])
        length = free[axis[0]].example.shape[axis[1]]  # with one Dim for several sizes it may be outside
        low, high = min(low, length), max(high, length)
        own = max(1, -((size.offset - low) // factor)), (high - size.offset) // factor
        before = bounds.get(size.name, own)
        bounds[size.name] = max(own[0], before[0]), min(own[1], before[1])
        sizes[axis] = size
    return Plan(sizes, bounds)


def fixed_sizes(leaves: Sequence[Leaf], export: Export) -> str:
    """The axes with dims and their sizes, ": axis 1 of x is 4", where the leaves export without dims; else ""."""
    given = [torch.zeros(leaf.given or leaf.example.shape, dtype=leaf.example.dtype) for leaf in leaves]
    try:
        export([Leaf(leaf.path, example, {}) for leaf, example in zip(leaves, given, strict=True)])
    except Exception:
        return ""
    axes = (
        f"axis {axis} of {leaves[number].path} is {given[number].shape[axis]}"
        for number, axis in _plan_of(leaves).sizes
    )
    return f": {', '.join(axes)}"
