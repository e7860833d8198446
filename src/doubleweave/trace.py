"""Trace a module to one functional graph in which each module that the policy names is one node.

`torch.export` runs the module once; a named nested module is marked where it is called (what goes in, what comes
out), and what it computes is cut out again. The nested modules are traced on their own, with their own dims.
Buffers that `forward` changes become inputs and outputs of the graph. It knows nothing of segments or backends.
"""

from __future__ import annotations

import contextlib
import operator
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.node import has_side_effect
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from doubleweave import dims as _dims
from doubleweave import ops as _ops  # noqa: F401  registers doubleweave::boundary
from doubleweave.dims import Leaf
from doubleweave.errors import DoubleweaveError, PolicyError, SplitError
from doubleweave.interface import Interface, Parameter, parameters_of
from doubleweave.ir import ITEM_BYTES, Range
from doubleweave.policy import Match
from doubleweave.quiet import quiet
from doubleweave.simplify import drop_no_ops
from doubleweave.sizes import Size, symbols
from doubleweave.trees import ALLOWED, Tree, TreeError, build, flatten

BOUNDARY = torch.ops.doubleweave.boundary.default
_MODULE = "model"  # where the wrapper keeps the module; the prefix of all names torch.export gives
_OURS = str(Path(__file__).parent)
_TORCHS = str(Path(torch.__file__).parent)


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
        if isinstance(size, int):
            return size, size
        found = bound_sympy(size.node.expr, self.ranges)
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
        if isinstance(size, int):
            return size
        expression = size.node.expr
        unknown = expression.free_symbols - set(self.names)
        if unknown:
            raise SplitError(
                f"a size depends on the data ({expression}): expected sizes that follow from the inputs' shapes"
            )
        renamed = expression.xreplace({symbol: sympy.Symbol(name) for symbol, name in self.names.items()})
        text = str(renamed)
        try:
            symbols(text)
        except ValueError as error:
            raise SplitError(f"a size is {text}, which cannot be computed from the inputs' shapes") from error
        return int(text) if text.isdigit() else text


class _Flat(nn.Module):
    """A module as a function of its input tensors alone, which returns a tuple of tensors."""

    def __init__(
        self,
        module: nn.Module,
        parameters: tuple[Parameter, ...],
        note: Callable[[Tree], None] = lambda returns: None,
    ) -> None:
        super().__init__()
        self.model = module
        self.parameters_ = parameters
        self.note = note  # torch.export takes back what forward sets on the module
        self.train(module.training)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = _arguments(self.parameters_, iter(tensors))
        result = self.model(*args, **kwargs)
        try:
            returns, found = flatten(result, "its result")
        except TreeError as error:
            raise SplitError(f"{type(self.model).__name__}: {error}") from None
        self.note(returns)
        return tuple(found)


def _arguments(
    parameters: Sequence[Parameter], tensors: Iterator[Tensor]
) -> tuple[list[Any], dict[str, Any]]:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    skipped = False
    for p in parameters:
        if p.tree is None or (p.default is not None and p.tree == p.default):
            skipped = True  # left out: the module's own default
            continue
        value = build(p.tree, tensors)
        if p.kind == "VAR_KEYWORD":
            kwargs.update(value)
        elif p.kind == "VAR_POSITIONAL":
            args += value
        elif p.kind == "KEYWORD_ONLY" or (skipped and p.kind != "POSITIONAL_ONLY"):
            kwargs[p.name] = value
        else:
            args.append(value)
    return args, kwargs


def bind(what: str, module: nn.Module | _Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """(parameters, tensors) of a call of `module`; raises PolicyError where the arguments do not fit."""
    try:
        parameters, tensors = parameters_of(module.forward, args, kwargs)
    except TypeError as error:
        raise PolicyError(f"{what}: {error}") from None
    except TreeError as error:
        if error.found in ("a SymInt", "a SymFloat", "a SymBool"):
            raise SplitError(
                f"{what}: argument {error.where} is a size that varies from call to call; take it from a tensor's "
                "shape inside the module, or pass a tensor"
            ) from None
        raise SplitError(f"{what}: argument {error.where} is {error.found}, expected {ALLOWED}") from None
    return parameters, tensors


def trace(
    what: str,
    module: nn.Module,
    parameters: tuple[Parameter, ...],
    leaves: tuple[Leaf, ...],
    named: Sequence[Match],
) -> Trace:
    """Trace `module` over its arguments' leaves; `named` are the modules that the policy names.

    Raises SplitError where torch.export cannot, or for what a program cannot hold.
    """
    for leaf in leaves:
        dtype = str(leaf.example.dtype).removeprefix("torch.")
        if dtype not in ITEM_BYTES or leaf.example.device.type != "cpu":
            raise SplitError(
                f"{what}: {leaf.path} is {dtype} on {leaf.example.device}, expected a tensor on the CPU of "
                f"{', '.join(ITEM_BYTES)}"
            )
    noted: list[Tree] = []
    flat = _Flat(module, parameters, noted.append)
    calls: list[Call] = []
    with _cut([match for match in named if match.module is not module], calls):
        exported = _export(what, flat, leaves)
    returns = noted[-1]
    if not returns.num_tensors:
        raise SplitError(f"{what}: returns no tensor; expected at least one")
    return _trace_of(what, module, exported, Interface(parameters, returns), leaves, calls)


@contextlib.contextmanager
def _cut(matches: Sequence[Match], calls: list[Call]) -> Iterator[None]:
    """While this lasts, calls of these modules are marked in what is traced and noted in `calls`."""
    before = [(match.module, match.module.__dict__.get("forward")) for match in matches]
    try:
        for match in matches:
            match.module.forward = _marked(match, match.module.forward, calls)
        yield
    finally:
        for module, forward in before:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def _marked(match: Match, forward: Any, calls: list[Call]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        site = _site()
        what = f"{match.name!r}, called at {site}"
        parameters, tensors = bind(what, _Forward(forward), args, kwargs)
        result = forward(*args, **kwargs)
        try:
            returns, outputs = flatten(result, "its result")
        except TreeError as error:
            raise SplitError(f"{what}: {error}") from None
        if not outputs:
            raise SplitError(f"{what}: returns no tensor; name the module around it in the policy instead")
        number = len(calls)
        calls.append(Call(match, parameters, returns, site))
        return build(returns, iter(torch.ops.doubleweave.boundary(tensors, outputs, number)))

    return call


@dataclass
class _Forward:
    forward: Any


def _site() -> str:
    """Where the user's code makes the call: "model.py:12, in forward"."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((_OURS, _TORCHS, "<")):
            return f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}"
    return "an unknown place"


def _export(what: str, flat: _Flat, leaves: Sequence[Leaf]) -> torch.export.ExportedProgram:
    examples = tuple(leaf.example for leaf in leaves)
    axes = [leaf.axes for leaf in leaves]
    try:
        with torch.no_grad(), quiet():
            exported = torch.export.export(flat, examples, dynamic_shapes=(tuple(axes),), strict=False)
            functional: torch.export.ExportedProgram = exported.run_decompositions({})
            return functional
    except DoubleweaveError:
        raise
    except Exception as error:
        # A named module deeper down may have raised one of ours.
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, DoubleweaveError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        raise SplitError(f"{what}: {_reason(flat, leaves, error)}") from error


def _reason(flat: _Flat, leaves: Sequence[Leaf], error: Exception) -> str:
    """What torch.export did not like, in one sentence, with dims that would work where dims are the matter."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    first = lines[0].rstrip(".:") if lines else type(error).__name__
    if any(isinstance(dim, Dim) for leaf in leaves for dim in leaf.axes.values()):
        works = working_dims(flat, leaves)
        if works is not None:
            return f"its dims do not fit what it computes ({first}); dims that would work: {works}"
    return f"torch.export cannot trace it ({type(error).__name__}: {first})"


def working_dims(flat: _Flat, leaves: Sequence[Leaf]) -> str | None:
    """Dims of every axis that can be dynamic, equal ones under one name; None if it cannot be exported at all."""
    free = []
    for leaf in leaves:
        example = torch.zeros(leaf.given or leaf.example.shape, dtype=leaf.example.dtype)
        free.append(Leaf(leaf.path, example, dict.fromkeys(range(example.ndim), Dim.AUTO)))
    try:
        with torch.no_grad(), quiet():
            exported = torch.export.export(
                flat,
                tuple(leaf.example for leaf in free),
                dynamic_shapes=(tuple(leaf.axes for leaf in free),),
                strict=False,
            )
    except Exception:
        return None
    inputs = [node for node in exported.graph.nodes if node.op == "placeholder"][-len(free) :]
    names: dict[str, str] = {}
    letters = iter("mknpqrstuvwxyz")
    axes: list[dict[int, str]] = []
    for node in inputs:
        named = {}
        for axis, size in enumerate(node.meta["val"].shape):
            # The expression knows of sizes that turned out fixed, or equal to another.
            if not isinstance(size, int) and not size.node.expr.is_Integer:
                key = str(size.node.expr)
                if key not in names:
                    names[key] = next(letters, f"d{len(names)}")
                named[axis] = names[key]
        axes.append(named)
    return _dims.text([leaf.path for leaf in leaves], axes) if names else None


def suggest(module: nn.Module, parameters: tuple[Parameter, ...], tensors: Sequence[Tensor]) -> str | None:
    """`working_dims` for arguments of these sizes."""
    leaves = [Leaf(path, tensor, {}) for path, tensor in zip(_paths(parameters), tensors, strict=True)]
    return working_dims(_Flat(module, parameters), leaves)


def _paths(parameters: Sequence[Parameter]) -> list[str]:
    return [path for p in parameters if p.tree is not None for path in p.tree.paths(p.name)]


@dataclass
class _Unlifted:
    """A graph whose weights are get_attr nodes again, of buffers of `root`."""

    graph: fx.Graph
    root: nn.Module
    inputs: list[fx.Node] = field(default_factory=list)
    states: dict[str, fx.Node] = field(default_factory=dict)


def _trace_of(
    what: str,
    module: nn.Module,
    exported: torch.export.ExportedProgram,
    interface: Interface,
    leaves: tuple[Leaf, ...],
    calls: list[Call],
) -> Trace:
    bodies = _Bodies(module, {id(call.match.module) for call in calls})
    _unify(exported, leaves)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(exported.graph, copied)
    for old, new in copied.items():
        new.meta = dict(old.meta)
    outputs: list[Any] = list(result)  # type: ignore[arg-type]
    found = _Unlifted(graph, nn.Module())
    changed = _changed(what, exported, bodies)
    _unlift(what, exported, copied, found, changed)
    kept: list[Any] = []
    new_states: dict[str, Any] = {}
    for spec, output in zip(exported.graph_signature.output_specs, outputs, strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            kept.append(output)
        elif spec.target in changed:
            new_states[str(spec.target)] = output
    graph.output((*kept, *(new_states[name] for name in found.states)))
    for node in graph.nodes:
        # At a segment's edge tensors become contiguous: what was a view of strided memory may have to copy.
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default
    _check_states(what, graph, bodies)
    boundaries = _cut_out(graph, calls, bodies)
    graph_module = fx.GraphModule(found.root, graph)
    drop_no_ops(graph_module)
    _check(what, graph, bodies)
    names, ranges = _symbols(exported, found.inputs, leaves)
    by_name = {r.symbol: r for r in ranges}
    for node, call in boundaries.items():
        # Not the shape environment's own bounds: it takes most sizes to be at least 2.
        call.ranges = {s: ValueRanges(by_name[n].low, by_name[n].high) for s, n in names.items()}
        call.inputs = tuple(source.meta["val"] for source in node.args[0])  # type: ignore[union-attr]
    states = tuple(name.removeprefix(f"{_MODULE}.") for name in found.states)
    return Trace(graph_module, interface, leaves, states, boundaries, names, ranges)


def _unify(exported: torch.export.ExportedProgram, leaves: Sequence[Leaf]) -> None:
    """Let sizes of one Dim be one symbol; torch keeps one for each argument."""
    first: dict[str, Any] = {}
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    inputs = placeholders[len(placeholders) - len(leaves) :]
    for node, leaf in zip(inputs, leaves, strict=True):
        for axis, dim in leaf.axes.items():
            size = node.meta["val"].shape[axis]
            if not isinstance(dim, Dim) or hasattr(dim, "root") or isinstance(size, int):
                continue
            before = first.setdefault(dim.__name__, size)
            symbol, wanted = size.node.expr, before.node.expr
            if symbol != wanted and isinstance(symbol, sympy.Symbol):
                size.node.shape_env._set_replacement(symbol, wanted, f"both are {dim.__name__}")


class _Bodies:
    """Which nodes and buffers belong to the modules that the policy names inside the traced one."""

    def __init__(self, module: nn.Module, named: set[int]) -> None:
        self._named: dict[str, str] = {}  # the path of a named module -> its name
        self._inside: dict[str, str] = {}  # the path of any module in a named one -> the outermost one's name
        for name, found in module.named_modules(remove_duplicate=False):
            path = f"{_MODULE}.{name}" if name else _MODULE
            outer = self._inside.get(path.rpartition(".")[0])
            if id(found) in named and found is not module:
                self._named[path] = name
                outer = outer or name
            if outer is not None:
                self._inside[path] = outer

    def of_buffer(self, name: str) -> str | None:
        """The named module that a buffer of this qualified name is in."""
        return self._inside.get(name.rpartition(".")[0])

    def of_node(self, node: fx.Node) -> str | None:
        """The outermost named module that was being called when this was computed."""
        # Called from elsewhere, a shared module has the same path; only its callers tell.
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            found = self._named.get(path.split("@")[0])
            if found is not None:
                return found
        return None


def _changed(what: str, exported: torch.export.ExportedProgram, bodies: _Bodies) -> set[str]:
    """Names of the buffers that this module itself changes (not those of named ones inside it)."""
    changed = set()
    for spec in exported.graph_signature.output_specs:
        if spec.kind is OutputKind.USER_INPUT_MUTATION:
            raise SplitError(
                f"{what}: changes its argument in place; expected a module that leaves its arguments as they are: "
                "write into a clone"
            )
        if spec.kind is OutputKind.BUFFER_MUTATION:
            name = str(spec.target)
            if bodies.of_buffer(name) is None:
                changed.add(name)
    return changed


def _unlift(
    what: str,
    exported: torch.export.ExportedProgram,
    copied: Mapping[fx.Node, fx.Node],
    found: _Unlifted,
    changed: set[str],
) -> None:
    graph = found.graph
    mutated_inside = {
        str(spec.target)
        for spec in exported.graph_signature.output_specs
        if spec.kind is OutputKind.BUFFER_MUTATION and str(spec.target) not in changed
    }
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    for spec, placeholder in zip(exported.graph_signature.input_specs, placeholders, strict=True):
        node = copied[placeholder]
        if spec.kind is InputKind.USER_INPUT:
            found.inputs.append(node)
            continue
        name = str(spec.target)
        if spec.kind is InputKind.BUFFER and name in changed:
            found.states[name] = node
            continue
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise SplitError(f"{what}: has a {spec.kind.name.lower().replace('_', ' ')}, expected tensors")
        tensor = exported.constants[name] if name in exported.constants else exported.state_dict[name]
        attribute = f"c{len(list(found.root.buffers()))}"
        found.root.register_buffer(attribute, tensor.detach())
        with graph.inserting_before(node):
            get = graph.create_node("get_attr", attribute)
        get.meta["val"] = node.meta["val"]
        get.meta["changed_inside"] = name if name in mutated_inside else ""
        node.replace_all_uses_with(get)
        graph.erase_node(node)
    # States follow the inputs.
    for node in found.states.values():
        found.inputs[-1].append(node) if found.inputs else None
    for earlier, later in zip(list(found.states.values()), list(found.states.values())[1:], strict=False):
        earlier.append(later)


# A call may matter for the state that it changes alone: dead-code elimination must leave it.
has_side_effect(BOUNDARY)


def _cut_out(graph: fx.Graph, calls: Sequence[Call], bodies: _Bodies) -> dict[fx.Node, Call]:
    """Let boundary nodes compute nothing themselves: what made their outputs is dead then, and goes."""
    boundaries: dict[fx.Node, Call] = {}
    stateful = {
        bodies.of_buffer(node.meta["changed_inside"])
        for node in graph.nodes
        if node.meta.get("changed_inside")
    }
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is BOUNDARY:
            inputs, _, number = node.args
            node.args = (inputs, [], number)
            boundaries[node] = calls[number]
    for node in reversed(list(graph.nodes)):
        is_computed = node.op in ("call_function", "get_attr")
        if not is_computed or node.users:
            continue
        name = bodies.of_node(node)
        if node in boundaries and name == boundaries[node].match.name and name in stateful:
            continue
        graph.erase_node(node)
        boundaries.pop(node, None)
    return boundaries


def _check_states(what: str, graph: fx.Graph, bodies: _Bodies) -> None:
    """Refuse a buffer that a named module changes and that is used outside it too."""
    for node in graph.nodes:
        if name := node.meta.get("changed_inside"):
            owner = bodies.of_buffer(name)
            if any(bodies.of_node(user) != owner for user in node.users if user.op != "output"):
                raise SplitError(
                    f"{what}: uses buffer {name.removeprefix(_MODULE + '.')!r}, which {owner!r} changes; return it "
                    "from there, or name the module that has the buffer in the policy"
                )


def _is_random(node: Any) -> bool:
    if node.target is torch.ops.aten.scaled_dot_product_attention.default:
        dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return bool(dropout)
    is_dropout = node.target is torch.ops.aten.dropout.default
    return is_dropout or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _check(what: str, graph: fx.Graph, bodies: _Bodies) -> None:
    """Refuse what a program cannot hold."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target in (BOUNDARY, operator.getitem):
            continue
        if _is_random(node):
            raise SplitError(
                f"{what}: {node.target} draws random numbers; call module.eval() before compiling, or take the "
                "randomness as an argument"
            )
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise SplitError(
                f"{what}: has {node.target} (data-dependent control flow), which a segment cannot hold; take the "
                "branch outside the module"
            )
        leaked = bodies.of_node(node)
        if leaked is not None and isinstance(node.meta.get("val"), Tensor):
            raise SplitError(
                f"{what}: a tensor computed inside {leaked!r} is used outside it ({node.target}) without being "
                "returned; return it from that module's forward"
            )


def _symbols(
    exported: torch.export.ExportedProgram, inputs: Sequence[fx.Node], leaves: Sequence[Leaf]
) -> tuple[dict[sympy.Symbol, str], tuple[Range, ...]]:
    """Names and ranges of the symbols of the inputs' sizes: a Dim's name, or that of the axis."""
    names: dict[sympy.Symbol, str] = {}
    for node, leaf in zip(inputs, leaves, strict=True):
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int):
                continue
            expression = size.node.expr
            dim: Any = leaf.axes.get(axis)
            is_dim, is_derived = isinstance(dim, Dim), hasattr(dim, "root")
            if isinstance(expression, sympy.Symbol) and expression not in names:
                name = "".join(c if c.isalnum() else "_" for c in leaf.path) + f"_{axis}"
                name = dim.__name__ if is_dim and not is_derived else name
                while name in names.values():
                    name += "_"
                names[expression] = name
            elif is_dim and is_derived and len(expression.free_symbols) == 1:
                (symbol,) = expression.free_symbols
                names.setdefault(symbol, dim.root.__name__)
    ranges = []
    least = _least(inputs, leaves)
    for symbol, name in names.items():
        bounds = exported.range_constraints[symbol]
        if not bounds.upper.is_Integer:
            raise PolicyError(
                f"dim {name!r} has no largest size, and a dynamic method is planned for one; give the axis a "
                "Dim(name, min=…, max=…)"
            )
        ranges.append(Range(name, least.get(symbol, int(bounds.lower)), int(bounds.upper)))
    return names, tuple(ranges)


def _least(inputs: Sequence[fx.Node], leaves: Sequence[Leaf]) -> dict[sympy.Symbol, int]:
    """The least size that each symbol's dims allow; torch itself assumes at least 2 of some."""
    least: dict[sympy.Symbol, int] = {}
    for node, leaf in zip(inputs, leaves, strict=True):
        for axis, dim in leaf.axes.items():
            size = node.meta["val"].shape[axis]
            if not isinstance(size, int) and isinstance(size.node.expr, sympy.Symbol):
                low = getattr(dim, "min", None)
                if isinstance(low, int):
                    least[size.node.expr] = max(1, low, least.get(size.node.expr, 1))
    return least
