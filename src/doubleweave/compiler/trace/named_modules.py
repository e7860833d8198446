"""The buffers and nodes of a traced graph that belong to the modules that the policy names.

Names are torch.export's: `model.block.bias` for the buffer `block.bias`. This module changes no graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, fx, nn

from doubleweave.compiler.trace.trace_data import MODULE


@dataclass(frozen=True)
class NamedModules:
    """The modules that the policy names, by path. A shared module has several paths, a shared buffer several names.

    `modules` are all modules by name, `named` maps the path of a named module to its name.
    """

    modules: dict[str, nn.Module]
    named: dict[str, str]
    buffers: tuple[tuple[str, Tensor], ...]

    def _around(self, buffer: str) -> list[str]:
        """The names of the named modules that a buffer of this qualified name is in, outermost first."""
        paths = itertools.accumulate(buffer.split(".")[:-1], "{}.{}".format)
        return [self.named[path] for path in paths if path in self.named]

    def of_buffer(self, name: str) -> str | None:
        """The outermost named module that a buffer of this qualified name is in."""
        return next(iter(self._around(name)), None)

    def of_node(self, node: fx.Node) -> str | None:
        """The outermost named module that was being called when a node's value was computed."""
        # A shared module has one path wherever it is called, so the path of the innermost call alone is ambiguous.
        stack = node.meta.get("nn_module_stack") or {}
        paths = (path.split("@")[0] for path, _ in stack.values())  # a module's second call is at path@1
        return next((self.named[path] for path in paths if path in self.named), None)

    def module(self, name: str | None) -> nn.Module | None:
        """The module of a name from `of_buffer` or `of_node`."""
        return None if name is None else self.modules[name]

    def owners_of(self, buffer: Tensor) -> dict[str, nn.Module | None]:
        """The innermost named module around a buffer, by each of the buffer's names."""
        around = {name: self._around(name) for name, found in self.buffers if found is buffer}
        return {name: self.modules[names[-1]] if names else None for name, names in around.items()}


def named_modules(module: nn.Module, named: Collection[nn.Module]) -> NamedModules:
    """Find the modules of `named` inside `module`; `module` itself is none of them."""
    modules = dict(module.named_modules(remove_duplicate=False))
    ids = {id(found) for found in named if found is not module}
    paths = {f"{MODULE}.{name}": name for name, found in modules.items() if id(found) in ids}
    buffers = tuple((f"{MODULE}.{n}", b) for n, b in module.named_buffers(remove_duplicate=False))
    return NamedModules(modules, paths, buffers)
