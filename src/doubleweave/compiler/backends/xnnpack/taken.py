"""Which operators XNNPACK's delegates take: those that its partitioner takes, without the ones that come out wrong.

`tests/compile/test_xnnpack_operators.py` compares each with eager torch. It knows nothing of how delegates are cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def configs() -> list[type]:
    """The partitioner's configs: each says of one operator whether the delegate takes it."""
    from executorch.backends.xnnpack.partition.config import (
        ALL_PARTITIONER_CONFIGS,
        generic_node_configs,
        node_configs,
    )

    narrower: dict[type, Callable[[Any], bool]] = {
        # None takes anything but a batch of images: the pass that puts channels last fails.
        generic_node_configs.MaxPool2dConfig: _has_batch,
        generic_node_configs.AvgPoolingConfig: _has_batch,
        node_configs.PreluConfig: _has_batch,
        # The pass that puts it into the weights fails.
        node_configs.BatchNormConfig: lambda node: not _is_grouped_transpose(node.args[0]),
        generic_node_configs.UpsampleBilinear2dConfig: _resizes_by_sizes,
        # It becomes a maximum that keeps its dim, of height or width alone.
        node_configs.MaxDimConfig: lambda node: False,
    }
    return [_narrower(config, narrower.get(config)) for config in ALL_PARTITIONER_CONFIGS]


def _narrower(config: Any, is_right: Callable[[Any], bool] | None) -> Any:
    if is_right is None:
        return config

    wanted = is_right

    class Narrower(config):  # type: ignore[misc]
        def check_constraints(self, node: Any, ep: Any) -> bool:
            return wanted(node) and bool(super().check_constraints(node, ep))

    return Narrower


def _has_batch(node: Any) -> bool:
    return len(node.args[0].meta["val"].shape) == 4


def _is_grouped_transpose(node: Any) -> bool:
    is_convolution = node.op == "call_function" and "convolution" in str(node.target)
    return is_convolution and bool(node.args[6]) and node.args[8] != 1


def _resizes_by_sizes(node: Any) -> bool:
    """Whether the factors of a resize are those of its sizes: the delegate knows no other.

    Given a factor of 1.7, torch reads every 1 / 1.7 pixels, whatever the rounded size is.
    """
    image, _, align_corners, factors = node.args
    if factors is None or align_corners:
        return True
    sizes, given = node.meta["val"].shape[2:], image.meta["val"].shape[2:]
    return all(size == factor * old for size, factor, old in zip(sizes, factors, given, strict=True))
