"""Several splits in one: further modules beside a model, in the same program. It knows nothing of what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.compiler.split.weights import JoinedWeights
from doubleweave.ir.split import Call, Function, Split


def joined(first: TorchSplit, others: Mapping[str, TorchSplit]) -> TorchSplit:
    """`first`, and behind its functions those of the others: each main function under the other's name, and all else of
    it under that name with a dot ("vision", "vision.glue_0"). `first` must have none of these names."""
    segments, functions = [*first.split.segments], [*first.split.functions]
    graphs = {**first.graphs}
    for name, other in others.items():
        # Structures get other names as well: a pass may have rewritten the first split's graph of the same digest.
        segments += [
            replace(segment, name=f"{name}.{segment.name}", structure=f"{name}.{segment.structure}")
            for segment in other.split.segments
        ]
        functions += [_renamed(function, name) for function in other.split.functions]
        graphs |= {f"{name}.{structure}": graph for structure, graph in other.graphs.items()}
    weights = JoinedWeights({"": first.weights, **{name: other.weights for name, other in others.items()}})
    return replace(first, split=Split(tuple(segments), tuple(functions)), graphs=graphs, weights=weights)


def _renamed(function: Function, name: str) -> Function:
    def call(found: Call) -> Call:
        return replace(found, segment=f"{name}.{found.segment}")

    own = f"{name}.{function.name}" if function.name else name
    return replace(function, name=own, calls=tuple(map(call, function.calls)))
