"""Which tensors of the files a module's weights are made of, by transformers' own rules: renamed, stacked, joined.

Experts, which files have one by one, are stacked whenever the weight is read; transformers would keep all of them in
memory. Knows nothing of how weights are held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from doubleweave.sources.saved_tensors import Rows, Saved, in_float32


@dataclass
class Made:
    """How a weight is made: of the tensors `names` of the files, in this order, which have the `patterns` of
    transformers' converter; without one of a single tensor, as it is."""

    names: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    converter: Any = None

    def of(self, name: str, saved: Sequence[Saved], module: Any) -> Saved:
        """The weight `name` of the module, in the tensors' dtype."""
        if self.converter is None:
            (only,) = saved
            return only
        tensors = [in_float32(one) if isinstance(one, Rows) else one for one in saved]
        converter = deepcopy(self.converter)  # it collects tensors
        for source, pattern, tensor in zip(self.names, self.patterns, tensors, strict=True):
            converter.add_tensor(name, source, pattern, lambda tensor=tensor: tensor)
        found: Tensor = converter.convert(name, model=module, config=module.config)[name]
        return found


def made_weights(
    module: Any, shapes: Mapping[str, tuple[int, ...]], is_harmless: Callable[[str, tuple[int, ...]], bool]
) -> dict[str, Made] | None:
    """By the name of each weight of the module, how it is made of tensors of these shapes.

    None where that is not so for each of them, or for a tensor that is not harmless to leave out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(module, add_legacy=False)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    if len(renamings) + len(converters) < len(mapping) or any(len(c.target_patterns) > 1 for c in converters):
        return None  # what makes several weights of one tensor is not asked for one of them
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    wanted = {name: tuple(weight.shape) for name, weight in module.state_dict().items()}
    found: dict[str, Made] = {}
    for source in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters)
        if name not in wanted and source in wanted:
            name, pattern = source, None
        if name not in wanted:
            if not is_harmless(source, shapes[source]):
                return None
            continue
        made = found.setdefault(name, Made())
        made.names.append(source)
        made.patterns.append(pattern or source)
        made.converter = by_pattern[pattern] if pattern is not None else None
    if any(_shape(name, made, shapes, module) != wanted[name] for name, made in found.items()):
        return None
    return found


def is_converted(module: Any) -> bool:
    """Whether transformers renames or makes any weight of such a module."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(module, add_legacy=False))


def _shape(
    name: str, made: Made, shapes: Mapping[str, tuple[int, ...]], module: Any
) -> tuple[int, ...] | None:
    """The shape that comes out; None where transformers cannot make it."""
    tensors = [torch.empty(shapes[source], device="meta") for source in made.names]
    try:
        return tuple(made.of(name, tensors, module).shape)
    except Exception:  # two tensors for one weight, one that is missing among the experts, and the like
        return None
