"""What in a model a refusal is about: the module, its class, and what it does that is not supported.

Knows nothing of splits: it watches the model while it is exported, and reads an exported graph's nodes.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import sympy
import torch
from torch import fx, nn

# Names under which transformers' caches hold what a layer hands from token to token.
_STATES = re.compile(r"(update_)?(conv|recurrent|ssm)_states?|[gs]et_linear_cache")
_TRIED = (1, 2, 7, 64)  # numbers of tokens that a rule is tried at, besides the most


class Watch:
    """Says which module runs while a model is exported, and which one ran when a rule about sizes was added.

    Modules are hooked by `watching`; torch.export runs hooks as it traces.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._running: list[nn.Module] = []
        self._sizes: Any = None  # torch's ShapeEnv, from the first symbolic size that a module is given
        self._rules: list[nn.Module] = []  # for each rule of it, the module that ran

    @property
    def running(self) -> nn.Module:
        """The innermost module that runs, or ran where an error ended the run."""
        return self._running[-1] if self._running else self.model

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._running:
            tensors = (one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor))
            lengths = (size for tensor in tensors for size in tensor.shape)
            symbolic: list[Any] = [size for size in lengths if isinstance(size, torch.SymInt)]
            sizes = symbolic[0].node.shape_env if symbolic else self._sizes
            if sizes is not self._sizes:  # another try
                self._sizes, self._rules = sizes, []
        self._count()
        self._running.append(module)

    def leave(self, module: nn.Module) -> None:
        self._count()
        assert self._running.pop() is module

    def _count(self) -> None:
        new = len(self._sizes.guards) - len(self._rules) if self._sizes is not None else 0
        self._rules += [self.running] * new

    def broken_rule(self, most: int) -> tuple[nn.Module, Any] | None:
        """The module that first needed a rule about the number of tokens that 1 to `most` do not all obey, and the
        rule in T; where all obey them, the first rule that torch could not prove."""
        self._count()
        rules = [] if self._sizes is None else [guard.expr for guard in self._sizes.guards]
        found = [
            (module, rule.subs(dict.fromkeys(rule.free_symbols, "T")))
            for module, rule in zip(self._rules, rules, strict=True)
            if not any(str(symbol).startswith("u") for symbol in rule.free_symbols)  # a number that data make
        ]
        tried = (*_TRIED, most)
        broken = (one for one in found if any(one[1].subs("T", number) is sympy.false for number in tried))
        unproved = (one for one in found if re.search(r"M(in|ax|od)\(|//", str(one[1])))
        return next(broken, next(unproved, None))


@contextmanager
def watching(model: nn.Module) -> Iterator[Watch]:
    """Meanwhile the model's modules say when they run."""
    watch = Watch(model)
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(watch.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda module, args, result: watch.leave(module)))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def cause_of(error: Exception, watch: Watch, most: int) -> str:
    """Why torch.export failed: in which module, what it does, and the line of its source where there is one."""
    if "Constraints violated" in str(error) and (broken := watch.broken_rule(most)):
        module, rule = broken
        return f"{place_of(module, watch.model)} {_does(module) or _asks(rule)}"
    module, line = _innermost(error.__traceback__, watch)
    does = _does(module) or _fails(error, line)
    return f"{place_of(module, watch.model)} {does}" + (f", at `{line}`" if line else "")


def _asks(rule: Any) -> str:
    if rule.func.__name__ == "Equality" and "T" in map(str, rule.args):
        return "counts in Python how many tokens there are, as a loop over them does"
    said = str(rule)
    return f"asks of the number of tokens T that {said if len(said) < 60 else f'{said[:60]}…'}"


def _fails(error: Exception, line: str) -> str:
    if "data-dependent" in str(error):
        return "decides in Python by numbers that it computed from the tokens"
    if isinstance(error, (TypeError, AttributeError)) and "mask" in line:
        return "reads the attention mask itself, which programs do not make"
    lines = str(error).strip().splitlines() or [""]
    return f"cannot be traced ({type(error).__name__}: {lines[0][:120]})"


def place_of(module: nn.Module, model: nn.Module) -> str:
    """The module's path and class: "model.layers.0.mixer (MambaMixer)"."""
    path = next((name for name, one in model.named_modules() if one is module), "")
    return f"{path or 'the model'} ({type(module).__name__})"


def place_of_node(node: fx.Node) -> str:
    """The path and class of the module whose forward has the operator."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {"": ("", "the model")}
    path, kind = list(stack.values())[-1]
    name = kind if isinstance(kind, str) else kind.__name__
    # The model is an attribute of the module that is exported.
    return f"{path.removeprefix('model.') or 'the model'} ({name.rpartition('.')[2]})"


def _does(module: nn.Module) -> str:
    """What a module does that cannot be exported, as far as its code shows it: "" where it does not."""
    methods = (getattr(method, "__wrapped__", method) for method in vars(type(module)).values())
    names = [name for method in methods if hasattr(method, "__code__") for name in method.__code__.co_names]
    found = [name for name in names if _STATES.fullmatch(name)]
    return f"carries a state from token to token ({found[0]}), besides keys and values" if found else ""


def _innermost(trace: TracebackType | None, watch: Watch) -> tuple[nn.Module, str]:
    """The innermost module of an error's frames, and the line of its code that raised it, "" for none."""
    modules = {id(module) for module in watch.model.modules()}
    found: tuple[nn.Module, str] = watch.running, ""
    for frame, number in traceback.walk_tb(trace):
        module = frame.f_locals.get("self")
        # Its own code: torch's frames around it have the module as well.
        if (
            isinstance(module, nn.Module)
            and id(module) in modules
            and not frame.f_globals.get("__name__", "").startswith("torch.")
        ):
            (summary,) = traceback.StackSummary.extract(iter([(frame, number)]))
            found = module, (summary.line or "").strip()
    return found
