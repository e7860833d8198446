"""A piece of a program as a callable: a segment's method, a nested module, or the whole module.

Its arguments and results are the module's, in the caller's kind of tensors.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any, Literal

from doubleweave.errors import InputError
from doubleweave.ir.interface import Interface, Parameter
from doubleweave.ir.sizes import symbols
from doubleweave.ir.split import ROWS, Call, Function, Port, Range, Segment, SizeRanges, Value
from doubleweave.ir.trees import Tree
from doubleweave.runtime.module import arrays
from doubleweave.runtime.module.runner import Runner
from doubleweave.runtime.module.submit import Result, Workers
from doubleweave.schedule.module_steps import Tensor


class Method:
    """Call it as the module it comes from: tensors in, results that the caller owns out.

    `out=` gives the tensors to write results into (one, or a sequence in the order of the results). Tensors are
    neither copied in nor out if they are contiguous and of the right dtype. The GIL is released while it runs.
    Calls from several threads are safe: those of one method, and of methods that share one, take turns; others
    run at the same time. `submit` runs it on its device's worker and returns a future at once.
    """

    def __init__(self, name: str, function: Function, runner: Runner, workers: Workers) -> None:
        self.name = name
        self.function = function
        assert function.interface is not None
        self.interface: Interface = function.interface
        self.__signature__: inspect.Signature = self.interface.signature()
        self.__name__ = name
        self._runner = runner
        self._workers = workers

    def __repr__(self) -> str:
        return f"<method {self.function.signature_text(self.name)}>"

    def __call__(self, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        """Run it. Raises InputError for an argument, dtype or shape that does not fit, naming the allowed ones."""
        return self._run(args, kwargs, out, self._workers.threads)

    def submit(self, *args: Any, out: Any = None, after: Sequence[Result] = (), **kwargs: Any) -> Result:
        """Run it on its device's worker, one thread, when the futures among its arguments have results.

        `after`: further futures to wait for, such as those of calls that write into memory this one reads.
        """
        if after and any(p.name == "after" for p in self.interface.parameters):
            kwargs, after = {**kwargs, "after": after}, ()
        # One thread each: with several, methods wait for one another's threads.
        run = functools.partial(self._run, threads=1)
        return self._workers.submit(self.device, run, (args, kwargs, out), after)

    @property
    def device(self) -> str:
        """The device of its first segment; "cpu" where it has none."""
        return self._runner.device(self.function)

    def _run(self, args: Sequence[Any], kwargs: dict[str, Any], out: Any, threads: int) -> Any:
        if out is not None and any(p.name == "out" for p in self.interface.parameters):
            kwargs, out = {**kwargs, "out": out}, None
        tensors = self.interface.bind(self.name, args, kwargs)
        kind = arrays.kind_of(tensors)
        names = self.interface.input_names
        inputs = [
            arrays.readable(tensor, f"{self.name}, {name}")
            for tensor, name in zip(tensors, names, strict=True)
        ]
        wanted = [value.dtype for value in self.function.inputs]
        found = tuple(
            (_dtype(tensor, dtype), tuple(int(size) for size in tensor.shape))
            for tensor, dtype in zip(tensors, wanted, strict=True)
        )
        prepared = self._runner.prepare(self.function, self.name, found, threads)
        # A tensor that is returned twice is one result.
        places = {tensor: prepared.plan.tensors[tensor] for tensor in prepared.plan.outputs}
        outputs = self._outputs(out, kind, list(places.values()))
        self._runner.run(prepared, inputs, outputs, threads, self._workers.record)
        if out is None:
            outputs = [
                arrays.finish(kind, array, place.dtype)
                for array, place in zip(outputs, places.values(), strict=True)
            ]
        by_place = dict(zip(places, outputs, strict=True))
        return self.interface.result(by_place[tensor] for tensor in prepared.plan.outputs)

    def _outputs(self, out: Any, kind: arrays.Kind, results: Sequence[Tensor]) -> list[Any]:
        if out is None:
            return [arrays.empty(kind, result.sizes, result.dtype) for result in results]
        given = list(out) if isinstance(out, (tuple, list)) else [out]
        if len(given) != len(results):
            raise InputError(f"{self.name}, out: found {len(given)} tensors, expected {len(results)}")
        return [
            arrays.writable(array, result.sizes, result.dtype, f"{self.name}, out")
            for array, result in zip(given, results, strict=True)
        ]


def _dtype(tensor: Any, wanted: str) -> str:
    name = arrays.dtype_name(tensor)  # NumPy has no bfloat16: uint16 is taken for it
    return wanted if name == "uint16" and wanted == "bfloat16" else name


def of_segment(segment: Segment, size: int | None) -> Function:
    """A function that is one call of a segment at one of its sizes: the segment's method called by itself."""
    ranges: tuple[Range, ...] = segment.shape.ranges if isinstance(segment.shape, SizeRanges) else ()

    def value(name: str, port: Port, kind: Literal["input", "output"]) -> Value:
        shape = tuple(size if s == ROWS and size is not None else s for s in port.shape)
        return Value(name, port.dtype, shape, kind)

    reads = tuple(f"in{i}" for i in range(len(segment.inputs)))
    writes = tuple(f"out{i}" for i in range(len(segment.outputs)))
    values = [value(name, port, "input") for name, port in zip(reads, segment.inputs, strict=True)]
    values += [value(name, port, "output") for name, port in zip(writes, segment.outputs, strict=True)]
    used = {symbol for v in values for s in v.shape for symbol in symbols(s)}
    tensor = Tree("tensor")
    interface = Interface(
        tuple(Parameter(name, "POSITIONAL_OR_KEYWORD", tensor, None) for name in reads),
        tensor if len(writes) == 1 else Tree("tuple", (tensor,) * len(writes)),
    )
    return Function(
        name=segment.name,
        calls=(Call(segment.name, segment.name, reads, writes),),
        values=tuple(values),
        outputs=writes,
        ranges=tuple(r for r in ranges if r.symbol in used),
        interface=interface,
    )


def segment_functions(segments: Sequence[Segment]) -> dict[str, Function]:
    """The functions of every segment's methods, by the method's name."""
    return {
        name: of_segment(segment, size) for segment in segments for name, size in segment.methods().items()
    }
