"""The buffers and nodes of a traced graph that belong to the modules that the policy names.

Names are torch.export's: `model.block.bias` for the buffer `block.bias`. This module changes no graph.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, fx, nn

from doubleweave.compiler.trace.trace_data import MODULE


@dataclass(frozen=True)
class NamedModules:
    """The modules that the policy names, by path. A shared module has several paths, a shared buffer several names.

    `named` maps the path of a named module to its name, `outer` any path to the name of the outermost named module
    around it, `inner` any path to the innermost named module itself.
    """

    modules: dict[str, nn.Module]
    named: dict[str, str]
    outer: dict[str, str]
    inner: dict[str, nn.Module]
    buffers: tuple[tuple[str, Tensor], ...]

    def of_buffer(self, name: str) -> str | None:
        """The outermost named module that a buffer of this qualified name is in."""
        return self.outer.get(name.rpartition(".")[0])

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
        return {
            name: self.inner.get(name.rpartition(".")[0]) for name, found in self.buffers if found is buffer
        }


def named_modules(module: nn.Module, named: Collection[nn.Module]) -> NamedModules:
    """Find the modules of `named` inside `module`; `module` itself is none of them."""
    modules = dict(module.named_modules(remove_duplicate=False))
    ids = {id(found) for found in named if found is not module}
    names: dict[str, str] = {}
    outer: dict[str, str] = {}
    inner: dict[str, nn.Module] = {}
    for name, found in modules.items():  # a module comes before those inside it
        path = f"{MODULE}.{name}" if name else MODULE
        parent = path.rpartition(".")[0]
        if parent in outer:
            outer[path], inner[path] = outer[parent], inner[parent]
        if id(found) in ids:
            names[path] = name
            outer.setdefault(path, name)
            inner[path] = found
    buffers = tuple((f"{MODULE}.{n}", b) for n, b in module.named_buffers(remove_duplicate=False))
    return NamedModules(modules, names, outer, inner, buffers)
