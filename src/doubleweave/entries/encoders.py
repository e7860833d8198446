"""Encoders of a language model's program: modules that make rows of embeddings for it, compiled into the same program.

An encoder is compiled as `doubleweave.compile` does it, in float32 and by a policy of its own. It knows nothing of how
a model is quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from doubleweave.compiler.program_folder import Progress
from doubleweave.entries.compile_module import check_arguments, check_loads
from doubleweave.errors import DoubleweaveError, PolicyError
from doubleweave.ir.embeddings import behind_lookup, lookup_of, why_no_rows
from doubleweave.ir.manifest import PROGRAM_FILE, STATE_FILE, Manifest
from doubleweave.ir.split import Split
from doubleweave.runtime.instances import open_instances
from doubleweave.runtime.module.method import Method
from doubleweave.runtime.module.runner import Runner
from doubleweave.runtime.module.states import States
from doubleweave.runtime.module.submit import Workers

if TYPE_CHECKING:
    from torch import nn

    from doubleweave.compiler.pipeline_llm import Splits
    from doubleweave.compiler.policy import Policy
    from doubleweave.compiler.split.pieces import TorchSplit
    from doubleweave.sources.model import Model

_ENDS_S = 10.0  # how long the ends of an encoder's dims are tried


class Encoder(NamedTuple):
    """A module that makes rows of embeddings, and the example to compile it with: the arguments of
    `doubleweave.compile`. It returns one float32 tensor [..., width], as wide as the model's embeddings."""

    module: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any] | None = None
    dynamic_shapes: Any = None
    policy: Policy | None = None


def names_problem(encoders: Any) -> str:
    """What is wrong with a dict of encoders, by itself; "" where nothing is."""
    if encoders is None:
        return ""
    if not isinstance(encoders, Mapping):
        return f"encoders: found a {type(encoders).__name__}, expected a dict of doubleweave.Encoder by name"
    for name, encoder in encoders.items():
        if not isinstance(name, str) or not name.isidentifier():
            return f"encoders: found the name {name!r}, expected one such as 'vision'"
        if not isinstance(encoder, Encoder):
            return f"encoder {name!r}: found a {type(encoder).__name__}, expected a doubleweave.Encoder"
    return ""


def split_encoders(encoders: Mapping[str, Encoder], report: Progress) -> dict[str, TorchSplit]:
    """Trace and split each. Raises PolicyError and SplitError that name the encoder."""
    from doubleweave.compiler.split.split_module import split_module

    found = {}
    for name, encoder in encoders.items():
        report(f"tracing {name}", 0, 1)
        module, args, kwargs, dynamic_shapes, policy = encoder
        try:
            check_arguments(module, args, kwargs, policy)
            made = split_module(module, tuple(args), dict(kwargs or {}), dynamic_shapes, policy or {})
        except DoubleweaveError as error:
            raise type(error)(f"encoder {name!r}: {error}") from error
        if made.states:
            raise PolicyError(
                f"encoder {name!r}: its forward changes {next(iter(made.states))}, expected a module that keeps "
                "nothing from call to call; call .eval() where it is what training gathers"
            )
        found[name] = made.torch_split
    return found


def with_encoders(model: Model, splits: Splits, encoders: Mapping[str, TorchSplit]) -> TorchSplit:
    """The lowered split of the language model, with the encoders beside it. Raises PolicyError for a model
    that takes no rows, and for an encoder that makes others."""
    from doubleweave.compiler.split.join import joined

    if not encoders:
        return splits.lowered
    if model.kinds_of_tokens:
        raise PolicyError(
            f"encoders: {model.kinds_of_tokens}: the model does more with an image's tokens than to take their rows, "
            "such as to let them see each other, and here they would be as a text's; compile the model without them"
        )
    split = splits.lowered.split
    if why := why_no_rows(split) or _lookup_problem(model, splits.reference):
        raise PolicyError(f"encoders: {why}; compile the model without them")
    width = behind_lookup(split)[1].shape[2]
    for name, encoder in encoders.items():
        main = encoder.split.main
        if (
            len(main.results) != 1
            or main.results[0].dtype != "float32"
            or main.results[0].shape[-1:] != (width,)
        ):
            raise PolicyError(
                f"encoder {name!r}: gives {', '.join(value.type_text for value in main.results)}, expected one float32 "
                f"tensor of rows of {width} numbers, as the model's embeddings are; end it with what projects to them"
            )
        if taken := next((s.name for s in split.segments if s.name.partition(".")[0] == name), None):
            raise PolicyError(f"encoder {name!r}: is the name of the model's segment {taken}; choose another")
    return joined(splits.lowered, encoders)


def _lookup_problem(model: Model, reference: TorchSplit) -> str:
    """Rows stand for what the module's own input embeddings give: so must what the split looks up."""
    import torch

    module: Any = model.module
    table = module.get_input_embeddings()
    ids = torch.arange(min(8, model.vocab_size))[None]
    with torch.no_grad():
        (found,) = reference.module(lookup_of(reference.split).segment)(ids)
        wanted = table(ids)
    if found.shape == wanted.shape and torch.equal(found, wanted):
        return ""
    return f"what the model looks up is not what {type(table).__name__}, its input embeddings, gives"


def check_encoders(
    encoders: Mapping[str, Encoder], folder: Path, manifest: Manifest, check: bool, report: Progress
) -> None:
    """Load each encoder of a program and, with `check`, hold it against its module. Raises LowerError and CheckError.

    They are opened by themselves: the language model may be for a chip that is not here.
    """
    if not encoders:
        return
    alone = {segment.name for segment in manifest.split.decoder.segments}
    segments = tuple(segment for segment in manifest.split.segments if segment.name not in alone)
    split = Split(segments, manifest.split.functions[1:])
    check_loads(folder / PROGRAM_FILE, [name for segment in segments for name in segment.methods()])
    if not check:
        return
    from doubleweave.check.module import check_module

    runner = Runner(split, open_instances(folder, split), States(split, folder / STATE_FILE))
    workers = Workers()

    def compare(name: str, encoder: Encoder) -> None:
        method = Method(name, split.function(name), runner, workers)
        check_module(encoder.module, (encoder.args, encoder.kwargs or {}), lambda: method, report, _ENDS_S)

    for name, encoder in encoders.items():
        compare(name, encoder)
