"""Lower a split to one ExecuTorch program: each structure once, in parallel processes.

It knows nothing of language models; it reads a TorchSplit and writes a .pte.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx

from doubleweave.compiler.backends import backends, find_backend
from doubleweave.compiler.backends.export_segment import export_segment
from doubleweave.compiler.lower.forked import each_forked
from doubleweave.compiler.lower.pte_file import ProgramWriter
from doubleweave.compiler.lower.templates import Template, made_up_weights, make_templates
from doubleweave.compiler.split.fold_constants import fold, is_constant
from doubleweave.compiler.split.pieces import TorchSplit, with_weights
from doubleweave.compiler.split.transform import transform_segments
from doubleweave.errors import LowerError
from doubleweave.ir.split import Range, Segment, SizeRanges, Split
from doubleweave.vendors.library import library_of

Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Job:
    """One lowering of a segment at one size (None: dynamic), or at several whose methods share a context; over
    its own weights or, where other segments share its structure, over made-up ones."""

    segment: Segment
    sizes: tuple[int | None, ...]
    is_shared: bool

    @property
    def methods(self) -> dict[str, int | None]:
        return {name: size for name, size in self.segment.methods().items() if size in self.sizes}

    def __str__(self) -> str:
        return ", ".join(self.methods)


def prepare(torch_split: TorchSplit) -> TorchSplit:
    """Let each segment's backend rewrite its graph."""
    used = dict.fromkeys(segment.backend for segment in torch_split.split.segments)
    found = [find_backend(name, backends()) for name in used]
    # Without inputs ExecuTorch 1.5 loses the names of constants; and there is nothing to compute twice.
    constant = frozenset(
        s.name for s in torch_split.split.segments if is_constant(torch_split.graphs[s.structure])
    )
    prepared = transform_segments(torch_split, fold, constant)
    for backend in found:
        if backend.prepare is not None:
            names = frozenset(segment.name for segment in prepared.split.segments_of(backend.name))
            prepared = transform_segments(prepared, backend.prepare, names)
    return prepared


_Key = tuple[str, int | tuple[Range, ...]]


def _key(segment: Segment, size: int | None) -> _Key:
    """What is lowered once: a structure at a size, or for the ranges of its sizes."""
    if size is not None:
        return segment.structure, size
    return segment.structure, segment.shape.ranges if isinstance(segment.shape, SizeRanges) else ()


def jobs(split: Split) -> list[_Job]:
    """What must be lowered: each structure once a size, longest first; the last one must not be an NPU's.

    It may be done in this process (forked.py), and the libraries of NPUs do not outlive a fork.
    """
    count = Counter(segment.structure for segment in split.segments)
    found: dict[_Key, _Job] = {}
    for segment in split.segments:
        for sizes in _together(segment):
            job = _Job(segment, sizes, count[segment.structure] > 1)
            found.setdefault(_key(segment, sizes[0]), job)
    return sorted(
        found.values(),
        key=lambda job: (
            not library_of(job.segment.backend).is_npu,
            -len(job.segment.inputs) - len(job.segment.outputs),
        ),
    )


def _together(segment: Segment) -> list[tuple[int | None, ...]]:
    """The sizes of a segment, those together that are lowered together."""
    sizes = tuple(segment.methods().values())
    return [sizes] if segment.contexts == 1 else [(size,) for size in sizes]


def lower(
    torch_split: TorchSplit, path: Path, progress: Progress, num_processes: int | None = None
) -> tuple[Split, str]:
    """Lower `torch_split` into the file `path`; returns the split with sizes filled in and the file's SHA-256.

    `progress` gets the name of each method once it is lowered.
    """
    prepared = prepare(torch_split)
    templates = _lower_shared(prepared, progress, num_processes)
    writer = ProgramWriter()
    segments = []
    for segment in prepared.split.segments:
        weight_bytes, template, moves = 0, None, []
        for name, size in segment.methods().items():
            template = templates[segment.name, size]
            weight_bytes = writer.add(name, template, prepared.weights[segment.name])
            if template.traffic is not None and size is not None:
                moves.append(template.traffic._replace(size=size))
        assert template is not None
        segments.append(
            replace(
                segment,
                weight_bytes=weight_bytes,
                traffic=tuple(moves),
                num_operators=template.num_operators,
                num_delegated=template.num_delegated,
            )
        )
    progress("writing program.pte")
    digest = writer.write(path)
    return replace(prepared.split, segments=tuple(segments)), digest


def no_kernel(method: str, operator: str) -> LowerError:
    return LowerError(
        f"segment {method}: ExecuTorch has no kernel for aten.{operator}; replace the operator, or take it out of the "
        "model"
    )


_Templates = dict[tuple[str, int | None], Template]  # by (segment, size)


def _lower_shared(torch_split: TorchSplit, progress: Progress, num_processes: int | None) -> _Templates:
    """Lower each structure once; those whose weights cannot be found again, once a segment."""
    split = torch_split.split
    done = _lower_all(torch_split, jobs(split), progress, num_processes)
    by_key = {_key(split.segment(name), size): template for (name, size), template in done.items()}
    again = [
        _Job(segment, (size,), False)
        for segment in split.segments
        for size in segment.methods().values()
        if not by_key[_key(segment, size)].is_complete
    ]
    own = _lower_all(torch_split, again, progress, num_processes) if again else {}
    return {
        (segment.name, size): own.get((segment.name, size)) or by_key[_key(segment, size)]
        for segment in split.segments
        for size in segment.methods().values()
    }


def _lower_all(
    torch_split: TorchSplit, todo: list[_Job], progress: Progress, num_processes: int | None
) -> _Templates:
    def lower_one(job: _Job) -> dict[int | None, Template]:
        segment = job.segment
        weights = torch_split.weights[segment.name]
        try:
            return lower_graph(
                torch_split.graphs[segment.structure],
                weights,
                segment,
                job.methods,
                is_shared=job.is_shared,
            )
        except LowerError as error:
            way_out = backends()[segment.backend].way_out
            if not way_out:
                raise
            raise LowerError(f"segment {job}: {error}; {way_out.format(segment.name)}") from error
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            missing = re.search(r"Missing out variants: {'aten::(\w+)'", first)
            if missing:
                raise no_kernel(str(job), missing[1]) from error
            raise LowerError(
                f"segment {job}: {segment.backend} cannot lower it ({type(error).__name__}: {first})"
            ) from error

    templates = {}
    done: set[str] = set()
    try:
        with closing(each_forked(lower_one, todo, num_processes)) as lowered:
            for job, found in lowered:
                templates.update({(job.segment.name, size): template for size, template in found.items()})
                done.add(str(job))
                progress(str(job))
    except BrokenProcessPool as error:
        left = [str(job) for job in todo if str(job) not in done]
        raise LowerError(
            f"a process that compiled one of {', '.join(left[:4])}{', …' if len(left) > 4 else ''} ended in the "
            "middle: its compiler crashed, or the machine has too little memory; nothing was written"
        ) from error
    return templates


def lower_graph(
    graph_module: fx.GraphModule,
    weights: tuple[Tensor, ...],
    segment: Segment,
    methods: Mapping[str, int | None],
    *,
    is_shared: bool = False,
) -> dict[int | None, Template]:
    """Lower one structure to methods by name, each of one size or (None) for its range of sizes.

    `is_shared`: over made-up weights in place of the given ones, so that the template serves every segment of the
    structure.
    """
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass

    used = made_up_weights(weights) if is_shared else weights
    module = with_weights(graph_module.graph, used)
    exported = {name: export_segment(module, segment, size) for name, size in methods.items()}
    lowered = backends()[segment.backend].to_edge(exported, segment.target, segment.recipe)
    edge = lowered.edge
    counts = {name: _count(edge.exported_program(name)) for name in methods}
    # Inputs and outputs live in buffers that the runtime owns.
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    manager = edge.to_executorch(
        ExecutorchBackendConfig(memory_planning_pass=planning, emit_stacktrace=False)
    )
    made_up = frozenset(i for i, (a, b) in enumerate(zip(used, weights, strict=True)) if a is not b)
    templates = make_templates(manager._emitter_output.program, manager._named_data, used, made_up)
    return {
        size: replace(
            templates[name],
            num_operators=counts[name][0],
            num_delegated=counts[name][1],
            traffic=lowered.traffic.get(name),
        )
        for name, size in methods.items()
    }


def _count(program: torch.export.ExportedProgram) -> tuple[int, int]:
    """(operators, those inside delegates), getitem and the like not counted."""
    total = delegated = 0
    for node in program.graph_module.graph.nodes:
        if node.op != "call_function" or "getitem" in str(node.target):
            continue
        if "executorch_call_delegate" in str(node.target):
            lowered = getattr(program.graph_module, node.args[0].target)
            inner = lowered.original_module.graph_module.graph.nodes
            count = sum(n.op == "call_function" and "getitem" not in str(n.target) for n in inner)
            delegated += count
            total += count
        elif "sym_size" not in str(node.target):
            total += 1
    return total, delegated
