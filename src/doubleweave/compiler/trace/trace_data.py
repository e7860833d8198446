"""The result of tracing a module: a functional graph in which each named module's call is one node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from doubleweave.compiler.graph import ops as _ops  # noqa: F401  registers doubleweave::boundary
from doubleweave.compiler.graph.nodes import expression
from doubleweave.compiler.policy import Match
from doubleweave.compiler.trace.dims import Leaf
from doubleweave.errors import SplitError
from doubleweave.ir.interface import Interface, Parameter
from doubleweave.ir.sizes import Size, symbols
from doubleweave.ir.split import Range
from doubleweave.ir.trees import Tree

BOUNDARY = torch.ops.doubleweave.boundary.default
MODULE = "model"  # where the traced wrapper keeps the module; the prefix of all names torch.export gives


@dataclass
class Call:
    """A call of a module that the policy names, met while its caller was traced."""

    match: Match
    parameters: tuple[Parameter, ...]
    returns: Tree
    site: str
    inputs: tuple[Tensor, ...] = ()  # fakes: their sizes are the caller's
    ranges: dict[sympy.Symbol, ValueRanges[Any]] = field(default_factory=dict)  # of the caller's symbols

    def bounds(self, size: Any) -> tuple[int, int]:
        """The least and the largest number that a size of the inputs can be."""
        found = bound_sympy(expression(size), self.ranges)
        return int(found.lower), int(found.upper)


@dataclass
class Trace:
    """A functional graph: placeholders are the input tensors, then the states; outputs likewise.

    Weights are get_attr nodes. `calls` gives the call behind each boundary node, `names` a symbol's name.
    """

    graph_module: fx.GraphModule
    interface: Interface
    leaves: tuple[Leaf, ...]
    states: tuple[str, ...]  # qualified in the traced module
    calls: dict[fx.Node, Call]
    names: dict[sympy.Symbol, str]
    ranges: tuple[Range, ...]

    def size(self, size: Any) -> Size:
        """A size as a number or as text in the names of this trace's symbols."""
        found = expression(size)
        if found.free_symbols - set(self.names):
            raise SplitError(
                "a size depends on the values of a tensor, expected sizes that follow from the inputs' shapes; keep "
                "the size and mask instead"
            )
        renamed = found.xreplace({symbol: sympy.Symbol(name) for symbol, name in self.names.items()})
        text = str(renamed)
        try:
            symbols(text)
        except ValueError as error:
            names = ", ".join(sorted(map(str, renamed.free_symbols)))
            raise SplitError(
                f"a size follows from {names} by more than integer arithmetic (+, -, *, //, %, max, min); compute it "
                "with integers, or keep that axis fixed"
            ) from error
        return int(text) if text.isdigit() else text
