"""The smaller and the larger of two sizes, for torch.export.

torch.export follows arithmetic with sizes, but Python's own `min` and `max` ask which is the smaller, and the answer
for the example would hold for every size. This module knows nothing of models.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import nn


@contextmanager
def sizes_as_operators(model: nn.Module) -> Iterator[None]:
    """Within, `min` and `max` of two sizes in the files that define the model's modules are torch's operators."""
    files = {type(module).__module__ for module in model.modules()}
    scopes = [
        vars(sys.modules[name]) for name in files if name in sys.modules and not name.startswith("torch.")
    ]
    scopes = [scope for scope in scopes if not {"min", "max"} & scope.keys()]
    own = {"min": smaller, "max": larger}
    try:
        for scope in scopes:
            scope.update(own)
        yield
    finally:
        for scope in scopes:
            del scope["min"], scope["max"]


def _of_sizes(usual: Any, operator: Any, relation: Any) -> Any:
    def of(*args: Any, **kwargs: Any) -> Any:
        kinds = {type(arg) for arg in args}
        if len(args) != 2 or torch.SymInt not in kinds or not kinds <= {torch.SymInt, int} or kwargs:
            return usual(*args, **kwargs)
        found = operator(*args)
        if isinstance(found, torch.SymInt):
            # torch does not see by itself that the smaller of two is no larger than either.
            known = found.node.shape_env
            for arg in args:
                fact = relation(found.node.expr, arg.node.expr if isinstance(arg, torch.SymInt) else arg)
                if fact is not sympy.true:
                    known.axioms.update(known.get_implications(known.simplify(fact)))
        return found

    return of


# The smaller and the larger of two sizes, ints or SymInts; of anything else what Python's own give.
smaller = _of_sizes(builtins.min, torch.sym_min, sympy.Le)
larger = _of_sizes(builtins.max, torch.sym_max, sympy.Ge)
