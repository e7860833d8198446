"""Rules about sizes that torch.export cannot prove, and that hold for every size: tried, and then told to it.

torch.export asks whether layouts agree, as in T * min(64, 64 * T) == 64 * T, and refuses what it does not see by
itself. This module knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import sympy
import torch
from torch import nn
from torch.utils import _pytree as pytree

_MOST = 1 << 13  # sizes that are tried


def with_proved_rules(
    module: nn.Module, export: Callable[[], torch.export.ExportedProgram]
) -> torch.export.ExportedProgram:
    """What `export` of `module` returns, told of the rules that hold; raises what it raises of others."""
    known: set[Any] = set()
    while True:
        found: list[Any] = []
        handle = module.register_forward_pre_hook(partial(_tell, known, found), with_kwargs=True)
        try:
            return export()
        except Exception as error:
            violated = found and "Constraints violated" in str(error)
            new = _that_hold(found[0]) - known if violated else set()
            if not new:
                raise
            known |= new
        finally:
            handle.remove()


def _tell(known: set[Any], found: list[Any], module: nn.Module, *given: Any) -> None:
    """Called before the module is run: tells torch what is known, once, and remembers its account of sizes."""
    if not found and (sizes := _sizes(given)) is not None:
        found.append(sizes)
        for rule in known:
            sizes.axioms.update(sizes.get_implications(rule))


def _sizes(given: Any) -> Any:
    """torch's account of symbolic sizes, from the first of them; None without one."""
    tensors = (leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor))
    symbolic: list[Any] = [n for tensor in tensors for n in tensor.shape if isinstance(n, torch.SymInt)]
    return symbolic[0].node.shape_env if symbolic else None


def _that_hold(sizes: Any) -> set[Any]:
    found = set()
    for rule in {guard.expr for guard in sizes.guards}:
        if len(rule.free_symbols) != 1 or not re.search(r"M(in|ax|od)\(|//", str(rule)):
            continue
        (symbol,) = rule.free_symbols
        most = sizes.var_to_range[symbol].upper
        if not most.is_Integer or most > _MOST:
            continue
        if all(_holds(rule, symbol, size) for size in range(1, int(most) + 1)):
            found.add(rule)
    return found


def _holds(rule: Any, symbol: Any, size: int) -> bool:
    try:
        return rule.subs(symbol, size) is sympy.true
    except ZeroDivisionError:
        return False
