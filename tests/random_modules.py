"""Random small modules under random policies, for test_random_modules.py: what a case is, and how it is drawn.

Nearly every module takes x of [*batch, rows, WIDTH] and returns that shape, so that rows are axis -2 everywhere. Which
rules a module allows follows from how it is made; nothing is run to find out.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

import doubleweave as dw
from doubleweave.compiler.policy import resolve

WIDTH = 4
MOST_ROWS = 12
MOST_NAMED = 3  # modules that a policy names: each costs a trace and a method or two

# Whether what a module computes can be cut into chunks of rows: anyhow, or in order and without padding, or not.
ROWWISE, CARRIES, MIXES = 0, 1, 2


class MatMul(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Scale(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b


class Pair(nn.Module):
    """Returns two tensors, in one of these forms."""

    FORMS = ("tuple", "dict", "nested", "same", "stats")

    def __init__(self, form: str) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.form = form
        self.rows = MIXES if form == "stats" else ROWWISE

    def extra_repr(self) -> str:
        return self.form

    def forward(self, x: Tensor) -> Any:
        a = self.fc(x)
        if self.form in ("tuple", "same"):
            return (a, torch.sigmoid(x)) if self.form == "tuple" else [a, a]
        if self.form == "nested":
            return {0: a, "rest": [torch.sigmoid(x), 3, None]}
        return {0: a, 1: torch.sigmoid(x) if self.form == "dict" else x.mean()}

    def read(self, x: Tensor) -> Tensor:
        """The sum of the two, for a parent."""
        found = self(x)
        return found[0] + (found["rest"][0] if self.form == "nested" else found[1])


class Flagged(nn.Module):
    """Options. `given` are the tensors among them that each call gives, None where calls differ."""

    def __init__(self, given: tuple[str, ...] | None) -> None:
        super().__init__()
        self.given = given

    def forward(
        self, x: Tensor, factor: float = 1.5, bias: Any = None, *, mask: Any = None, relu: bool = False
    ):
        x = x * factor if bias is None else x * factor + bias
        x = x if mask is None else x.masked_fill(mask, 0.0)
        return torch.relu(x) if relu else x


class State(nn.Module):
    """Changes its buffer: in place or as a new tensor, whatever the rows, by all rows, or row by row."""

    KINDS = ("count", "count ints", "count anew", "sum", "carry")

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.register_buffer("total", torch.tensor(0) if kind == "count ints" else torch.zeros(WIDTH))
        self.kind = kind
        self.rows = CARRIES if kind == "carry" else MIXES

    def extra_repr(self) -> str:
        return self.kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "carry":  # takes no batch
            out = self.total + x.cumsum(0)
            self.total.copy_(out[-1])
            return 0.1 * out
        out = x - 0.1 * self.total
        if self.kind == "sum":
            self.total.add_(x.sum(tuple(range(x.ndim - 1))))
        elif self.kind == "count anew":
            self.total = self.total + 1
        else:
            self.total += 1
        return out


LEAVES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "mlp": lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH)),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "rms norm": lambda: nn.RMSNorm(WIDTH, eps=1e-5),
    "softmax": lambda: nn.Softmax(-1),
    "silu": nn.SiLU,
    "identity": nn.Identity,
}
LEAVES |= {kind: partial(State, kind) for kind in State.KINDS}


# A step makes the next x of a block from the block, one of its modules (c), x and y.


def doubled(block: Any, c: Any, x: Tensor, y: Any) -> Tensor:
    rows = x.shape[-2]
    z = c(torch.cat((x, x * 0.5), -2))
    return z[..., :rows, :] + z[..., rows:, :]


def cross(block: Any, c: Any, x: Tensor, y: Any) -> Tensor:
    return c(torch.softmax(c(x, y.mT) * 0.25, -1), y)


Step = Callable[[Any, Any, Tensor, Any], Tensor]
# With any module of one tensor.
FORMS: dict[str, Step] = {
    "plain": lambda block, c, x, y: c(x),
    "residual": lambda block, c, x, y: x + c(x),
    "twice": lambda block, c, x, y: c(c(x)),
    "doubled": doubled,
    # torch.export cannot reshape back what may still be a view.
    "flattened": lambda block, c, x, y: c(x.reshape(-1, WIDTH) @ torch.eye(WIDTH)).reshape(x.shape),
    "dropped": lambda block, c, x, y: (c(x), x)[1],  # called for its state alone
    "on y": lambda block, c, x, y: x + c(y).mean(-2, keepdim=True),
    "with y": lambda block, c, x, y: c(x, y),
}
# With a module made for the step.
SPECIAL: dict[str, Step] = {
    "attend": lambda block, c, x, y: cross(block, c, x, x),
    "pair": lambda block, c, x, y: c.read(x),
    "scale": lambda block, c, x, y: c(x, block.weight),
    "flags": lambda block, c, x, y: c(c(x), 0.5, relu=True),
    "bias": lambda block, c, x, y: c(x, bias=x * 0.5),
    "mask": lambda block, c, x, y: c(c(x), mask=x < 0),
    "lookup": lambda block, c, x, y: x + c(torch.arange(x.shape[-2]) % 4),
}
# Without a module.
OPS: dict[str, Step] = {
    "mul": lambda block, c, x, y: x * 1.5,
    "gate": lambda block, c, x, y: torch.mul(*torch.cat((x, torch.tanh(x)), -1).chunk(2, -1)),
    "heads": lambda block, c, x, y: torch.softmax(x.unflatten(-1, (2, -1)).mT, -1).mT.flatten(-2),
    "swap": lambda block, c, x, y: torch.relu(x.mT).mT,
    "center": lambda block, c, x, y: x - x.mean(-2, keepdim=True),
    "most": lambda block, c, x, y: x + x.amax(-2, keepdim=True),
    "last": lambda block, c, x, y: x + x[..., -1:, :],
    "cumsum": lambda block, c, x, y: 0.2 * x.cumsum(-2),
    "position": lambda block, c, x, y: x + 0.1 * torch.arange(x.shape[-2])[:, None],
    "sdpa": lambda block, c, x, y: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])[0],
    "count": lambda block, c, x, y: x * torch.sigmoid(block.n.add_(1)),
}
# Only with y, and x + y only if it has the rows of x.
WITH_Y: dict[str, Step] = {
    "cross": cross,
    "mean y": lambda block, c, x, y: x + y.mean(),
    "add y": lambda block, c, x, y: x + y,
}
STEPS = FORMS | SPECIAL | OPS | WITH_Y
KEEP_ROWS = {"plain", "residual", "twice", "dropped", "with y", "pair", "scale", "flags", "bias", "mask"}
KEEP_ROWS |= {"mul", "gate", "heads", "swap", "add y"}
OVER_Y = {"cross", "on y", "mean y"}  # keep the rows of x where those of y are fixed
OTHER_ROWS = {"doubled", "flattened", "on y"}  # call their module with other rows than the block has


class Block(nn.Module):
    """Steps in turn, each with the name of its module ("" for none)."""

    def __init__(self, steps: list[tuple[str, str]], modules: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.steps = steps
        kinds = {kind for kind, _ in steps}
        self.uses_y = bool(kinds & {"with y", "on y", *WITH_Y})
        if "scale" in kinds:
            self.weight = nn.Parameter(torch.randn(WIDTH))
        if "count" in kinds:
            self.register_buffer("n", torch.zeros(1))

    def extra_repr(self) -> str:
        return ", ".join(f"{kind} {name}".strip() for kind, name in self.steps)

    def parts(self) -> list[tuple[str, Any]]:
        return [(kind, getattr(self, name) if name else None) for kind, name in self.steps]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        for kind, module in self.parts():
            x = STEPS[kind](self, module, x, y)
        return x


class Root(nn.Module):
    def __init__(self, body: Block, returns: str) -> None:
        super().__init__()
        self.body = body
        self.uses_y = body.uses_y
        self.returns = returns

    def extra_repr(self) -> str:
        return f"returns {self.returns}"

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        out = self.body(x, y) if self.uses_y else self.body(x)
        if self.returns == "dict":
            return {"out": out, "rest": [None, (3, torch.relu(out))]}
        if self.returns == "list":
            return [out, out]
        return (out, y) if self.returns == "with y" else out


class Sizes(NamedTuple):
    rows: int
    y_rows: int
    batch: int  # 0: there is none


Axes = dict[str, dict[int, Any]]  # by argument and axis


@dataclass
class Case:
    seed: int
    module: Root
    y: str  # "none", "same" (rows as x), "other" or "fixed"
    dynamic: set[str]  # of Sizes' fields
    most: Sizes  # the largest ones; what they are where they are not dynamic
    style: str  # of dynamic_shapes, and of passing y
    policy: dict[Any, Any] = field(default_factory=dict)
    calls: list[tuple[Sizes, str]] = field(default_factory=list)

    @property
    def what(self) -> str:
        """What is compiled, but for its weights."""
        sizes = f"y {self.y}, {self.most}, dynamic: {sorted(self.dynamic)}, {self.style}"
        return f"{self.module}\n{sizes}\npolicy {self.policy}"

    @property
    def kinds(self) -> set[str]:
        return {
            kind for block in self.module.modules() if isinstance(block, Block) for kind, _ in block.steps
        }

    def __repr__(self) -> str:
        return f"\n{self.what}\nseed {self.seed}, calls {self.calls}"

    def tensors(self, sizes: Sizes, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(self.seed * 1000 + seed)
        y = {"none": (), "same": (sizes.rows,)}.get(self.y, (sizes.y_rows,))
        lead = (sizes.batch,) if sizes.batch else ()
        return tuple(torch.randn(*lead, n, WIDTH, generator=generator) for n in (sizes.rows, *y))

    def dims(self) -> Axes:
        """Those of the whole module."""
        return with_dims(self.axes(self.module), {name: getattr(self.most, name) for name in self.dynamic})

    def axes(self, module: nn.Module) -> Axes:
        """What varies in a module's arguments, by name; axes of one name are equal."""
        batch = {0: "batch"} if "batch" in self.dynamic else {}
        rows = {-2: "rows", **batch}
        if isinstance(module, MatMul):
            return {"a": {-1: "k", **rows}, "b": {-2: "k", -1: "n", **batch}}
        if isinstance(module, nn.Embedding):
            return {"input": {-1: "rows"}}
        if isinstance(module, Flagged):
            return {} if module.given is None else dict.fromkeys(("x", *module.given), rows)
        found = {next(iter(inspect.signature(module.forward).parameters)): rows}
        if getattr(module, "uses_y", False):
            found["y"] = {"same": rows, "fixed": batch, "other": {-2: "y_rows", **batch}}[self.y]
        return found

    def rows(self, module: nn.Module, named: set[nn.Module]) -> int:
        """How the rows are in what a module computes itself, without the named modules inside."""
        inside = {found for found in module.modules() if found in named and found is not module}

        def of(found: nn.Module | None) -> int:
            if found is None or found in inside:
                return ROWWISE
            if isinstance(found, Root):
                return of(found.body)
            if isinstance(found, nn.Sequential):
                return max(map(of, found))
            if not isinstance(found, Block):
                return getattr(found, "rows", ROWWISE)
            return max(of_step(*part, len(found.steps)) for part in found.parts())

        def of_step(kind: str, child: nn.Module | None, num_steps: int) -> int:
            rows = of(child)
            # What has no rows must not leave a segment that has them.
            keeps = kind in KEEP_ROWS or (kind in OVER_Y and self.y == "fixed" and not inside)
            keeps &= not (kind == "scale" and child in inside)
            # The state of a Carry must be seen by one call in one segment.
            keeps &= rows == ROWWISE or (kind in ("plain", "residual") and num_steps == 1)
            return rows if keeps else MIXES

        return of(module)


def with_dims(axes: Axes, most: dict[str, int]) -> Axes:
    """Dims for the axes whose names have a largest size."""
    dims = {name: Dim(name, min=1, max=max(2, size)) for name, size in most.items()}
    return {
        argument: {axis: dims[name] for axis, name in found.items() if name in dims}
        for argument, found in axes.items()
    }


# Drawing.

One = Callable[[Iterable[Any]], Any]  # draws one of these


@dataclass
class Draw:
    """Draws a tree of modules; `shared` are those of one tensor, which another block may have too."""

    one: One
    y: str
    batch: int
    shared: list[nn.Module] = field(default_factory=list)

    def unit(self, depth: int) -> nn.Module:
        """A module of x, or of x and y if it is a block that uses y."""
        if self.shared and self.one(range(3)) == 2:
            return self.one(self.shared)
        kinds = [kind for kind in LEAVES if kind != "carry" or not self.batch]
        kind = self.one([*kinds, *["block"] * (12 if depth < 2 else 0)])
        module = self.block(depth + 1) if kind == "block" else LEAVES[kind]()
        if not getattr(module, "uses_y", False):
            self.shared.append(module)
        return module

    def special(self, kind: str) -> nn.Module:
        if kind in ("attend", "cross"):
            return MatMul(ROWWISE if kind == "cross" and self.y == "fixed" else MIXES)
        if kind == "pair":
            return Pair(self.one(Pair.FORMS))
        if kind == "scale":
            return Scale()
        if kind == "lookup":
            return nn.Embedding(4, WIDTH)
        return Flagged({"flags": (), "bias": ("bias",), "mask": None}[kind])

    def forms(self, module: nn.Module) -> list[str]:
        if getattr(module, "uses_y", False):
            return ["with y"]
        found = ["plain", "plain", "residual", "twice", "doubled"]
        found += ["flattened"] if self.batch else []
        found += ["on y"] if self.y != "none" else []
        return found + (["dropped"] if any(True for _ in module.buffers()) else [])

    def block(self, depth: int) -> Block:
        steps: list[tuple[str, str]] = []
        modules: dict[str, nn.Module] = {}
        units: list[str] = []
        with_y = [kind for kind in WITH_Y if kind != "add y" or self.y == "same"]
        groups: list[Any] = [FORMS, FORMS, FORMS, SPECIAL, *([with_y] if self.y != "none" else [])]

        def add(module: nn.Module) -> str:
            name = f"{type(module).__name__.lower()}{len(modules)}"
            modules[name] = module
            return name

        for _ in range(self.one(range(1, 3 if depth else 4))):
            group = self.one([*groups, OPS] if steps else groups)
            if group is FORMS:
                is_new = not units or self.one((True, False))
                name = add(self.unit(depth)) if is_new else self.one(units)
                units += [name] if is_new else []
                kind = self.one(self.forms(modules[name]))
            else:
                kind = self.one(group)
                name = add(self.special(kind)) if kind in (*SPECIAL, "cross") else ""
            steps.append((kind, name))
        return Block(steps, modules)


def governed(keys: Sequence[Any], root: nn.Module) -> dict[Any, list[nn.Module]]:
    """The modules for which each key wins; none at all where keys contradict one another."""
    found: dict[Any, list[nn.Module]] = {key: [] for key in keys}
    try:
        for match in resolve(root, {key: dw.Dynamic(device=f"d{n}") for n, key in enumerate(keys)}):
            found[keys[int(match.rule.device[1:])]].append(match.module)
    except dw.PolicyError:
        found.clear()
    return found


def splits_state(named: set[nn.Module], root: nn.Module) -> bool:
    """Whether a state might change in a named module and be used outside it, which is refused."""
    count = Counter(module for _, module in root.named_modules(remove_duplicate=False))
    return any(module._buffers and number > 1 and module not in named for module, number in count.items())


def draw_keys(one: One, root: nn.Module) -> dict[Any, list[nn.Module]]:
    """Keys, with the modules that they name."""
    modules = [found for found in root.named_modules(remove_duplicate=False) if found[0]]
    keys: dict[Any, list[nn.Module]] = {}
    for _ in range(one((1, 2, 2, 3))):
        name, module = one(modules)
        patterns = (f"re:{re.escape(name)}", "re:" + re.sub(r"\d+", r"\\d+", name))
        tried = governed([*keys, one((name, name, *patterns, type(module)))], root)
        named = list(chain(*tried.values()))
        if tried and all(tried.values()) and len(named) <= MOST_NAMED and not splits_state(set(named), root):
            keys = tried
    return keys


def draw_policy(one: One, case: Case) -> dict[Any, Any]:
    won = draw_keys(one, case.module)
    named = set(chain(*won.values()))
    if one(range(4)) == 3:
        won[""] = [case.module]
    # Either all sizes are fixed, or rules may make some vary.
    is_fixed = not case.dynamic and not case.kinds & OTHER_ROWS and one((True, False))
    return {key: draw_rule(one, case, modules, named, is_fixed) for key, modules in won.items()}


def draw_rule(one: One, case: Case, modules: list[nn.Module], named: set[nn.Module], is_fixed: bool) -> Any:
    """One for all of these modules."""
    axes = case.axes(modules[0])
    varying = {name for found in axes.values() for name in found.values()}
    rows = max(case.rows(module, named) for module in modules)
    options = ["dynamic", "static"] if is_fixed else ["dynamic"]
    if axes and not is_fixed:
        # Dims must hold what those around allow. Batch and rows are one axis of a flattened tensor.
        is_one = len(modules) == 1 and not ("flattened" in case.kinds and "batch" in varying)
        options += ["dims"] if is_one else []
        is_cut = rows < MIXES and not varying & {"batch", "y_rows"}
        options += ["chunk", "chunk"] if is_cut and all(case.axes(m) == axes for m in modules) else []
    rule, device = one(options), one(("cpu", "npu", "dsp"))
    if rule == "dims" and modules[0] is case.module:
        return dw.Dynamic(case.dims(), device)
    if rule == "dims":
        paths = [name for name, m in case.module.named_modules(remove_duplicate=False) if m is modules[0]]
        most = 48 * 3 ** max(path.count(".") for path in paths)  # each step has at most thrice as many rows
        return dw.Dynamic(with_dims(axes, dict.fromkeys(varying, most)), device)
    if rule == "chunk":
        cut = {name: axis for name, of in axes.items() for axis, found in of.items() if found == "rows"}
        sizes = one(((3,), (1, 4), (2, 8), (5,), (1,), (4,)))
        return dw.Static(device, cut, (1, *sizes) if rows == CARRIES else sizes)
    return dw.Static(device) if rule == "static" else dw.Dynamic(device=device)


@st.composite
def cases(draw: Any) -> Case:
    def one(options: Iterable[Any]) -> Any:
        return draw(st.sampled_from(list(options)))

    batch, y, seed = one((0, 0, 2, 3)), one(("none", "same", "other", "fixed")), one(range(100))
    torch.manual_seed(seed)
    body = Draw(one, y, batch).block(0)
    y = y if body.uses_y else "none"
    root = Root(body, one(("tensor", "dict", "list", *(["with y"] if body.uses_y else [])))).eval()
    dynamic = set(one(((), (), ("rows",), ("rows",), ("rows",), ("rows", "batch" if batch else "rows"))))
    dynamic |= {"y_rows"} if dynamic and y == "other" else set()
    most = Sizes(one(range(2 if dynamic else 1, MOST_ROWS)), one(range(2, MOST_ROWS)), batch)
    case = Case(seed, root, y, dynamic, most, one(("by name", "by position", "y by name")))
    case.policy = draw_policy(one, case)
    for rows in (most.rows, 1, one(range(1, most.rows + 1))):
        wanted = Sizes(rows, one(range(1, most.y_rows + 1)), one(range(min(batch, 1), batch + 1)))
        sizes = (a if name in dynamic else b for name, a, b in zip(Sizes._fields, wanted, most, strict=True))
        case.calls.append((Sizes(*sizes), one(("torch", "torch", "numpy", "strided"))))
    return case
