"""Lower a split to one ExecuTorch program: each structure once, in parallel processes.

It knows nothing of language models; it reads a TorchSplit and writes a .pte.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._sympy.value_ranges import bound_sympy

from doubleweave.compiler.backends import backends, find_backend
from doubleweave.compiler.backends.export_segment import export_segment
from doubleweave.compiler.backends.lowered import operators
from doubleweave.compiler.backends.unchanged_graphs import unchanged_graphs_kept
from doubleweave.compiler.backends.unread_weights import LEAST_BYTES
from doubleweave.compiler.graph.nodes import expression, is_call, is_tensor, output_node
from doubleweave.compiler.graph.table_ops import TABLE_ROWS
from doubleweave.compiler.lower.equal_structures import Job, Key, jobs, shared_key
from doubleweave.compiler.lower.forked import each_forked
from doubleweave.compiler.lower.pte_file import Method, ProgramWriter
from doubleweave.compiler.lower.templates import (
    MadeUp,
    Template,
    as_they_are,
    made_up,
    make_templates,
    may_be_made_up,
)
from doubleweave.compiler.program_folder import Progress, counted
from doubleweave.compiler.quantize.tables import tables
from doubleweave.compiler.split.fold_constants import fold, is_constant
from doubleweave.compiler.split.pieces import TorchSplit, weight_bytes, with_weights
from doubleweave.compiler.split.transform import transform_segments
from doubleweave.compiler.split.weights import without_numbers
from doubleweave.errors import LowerError
from doubleweave.ir.sizes import shape_of
from doubleweave.ir.split import ROWS, Segment, SizeRanges, Split
from doubleweave.sources.file_weights import in_memory

_UNBOUNDED = 1 << 62
_LARGE_BYTES = 256 << 20
_Templates = dict[tuple[str, int | None], Template]  # by (segment, size)


def prepare(torch_split: TorchSplit) -> TorchSplit:
    """Let each segment's backend rewrite its graph."""
    # Without inputs ExecuTorch 1.5 loses the names of constants; and there is nothing to compute twice.
    constant = frozenset(
        s.name for s in torch_split.split.segments if is_constant(torch_split.graphs[s.structure])
    )
    prepared = transform_segments(torch_split, fold, constant)
    for used in dict.fromkeys(segment.backend for segment in prepared.split.segments):
        backend = find_backend(used, backends())
        if backend.prepare is not None:
            names = frozenset(segment.name for segment in prepared.split.segments_of(backend.name))
            prepared = transform_segments(prepared, backend.prepare, names)
    return prepared


class Lowering(NamedTuple):
    """The split with sizes filled in, the file's SHA-256, and the templates that serve any segment of a structure."""

    split: Split
    digest: str
    templates: Mapping[Key, Template]


def lower(
    torch_split: TorchSplit, path: Path, report: Progress, known: Mapping[Key, Template] | None = None
) -> Lowering:
    """Lower `torch_split` into the file `path`. `known`: templates of structures that were lowered before.

    Raises LowerError for a segment that its backend refuses, or a file that cannot be written.
    """
    report("lowering", 0, 1)
    prepared = prepare(torch_split)
    by_key = dict(known or {})
    todo = [
        job
        for job in jobs(prepared.split, _large(prepared))
        if not all(shared_key(job.segment, size) in by_key for size in job.sizes)
    ]
    templates = _lower_shared(prepared, todo, by_key, counted(report, len(todo)))
    split, digest = _written(prepared, templates, path, report)
    shared = {shared_key(job.segment, size) for job in todo if job.is_shared for size in job.sizes}
    return Lowering(split, digest, {key: by_key[key] for key in shared if by_key[key].is_complete})


def _written(
    torch_split: TorchSplit, templates: _Templates, path: Path, report: Progress
) -> tuple[Split, str]:
    """Put each segment's weights into its templates, one segment after the other, and write them."""
    split = torch_split.split
    sizes = weight_bytes(torch_split)
    done, total = 0, sum(sizes.values())
    methods = {
        segment.name: [
            Method(name, templates[segment.name, size]) for name, size in segment.methods().items()
        ]
        for segment in split.segments
    }
    segments = []
    with ProgramWriter(path, [method for each in methods.values() for method in each]) as writer:
        for segment in split.segments:
            report("writing program.pte", done, max(1, total))
            done += sizes[segment.name]
            weights, used, moves = torch_split.weights[segment.name], 0, []
            for method, size in zip(methods[segment.name], segment.methods().values(), strict=True):
                used = writer.add(method, weights)
                if method.template.traffic is not None and size is not None:
                    moves.append(method.template.traffic._replace(size=size))
            looked_up = tables(torch_split.graphs[segment.structure].graph)
            segments.append(
                replace(
                    segment,
                    weight_bytes=used,
                    table_bytes=min(used, sum(weights[int(name[1:])].nbytes for name in looked_up)),
                    traffic=tuple(moves),
                    num_operators=method.template.num_operators,
                    num_delegated=method.template.num_delegated,
                )
            )
        digest = writer.finish()
    return replace(split, segments=tuple(segments)), digest


def no_kernel(method: str, operator: str) -> LowerError:
    return LowerError(
        f"segment {method}: ExecuTorch has no kernel for aten.{operator}; replace the operator, or take it out of the "
        "model"
    )


def _lower_shared(
    torch_split: TorchSplit, todo: list[Job], by_key: dict[Key, Template], step: Callable[[str], None]
) -> _Templates:
    """Lower each structure once, into `by_key`; a structure whose weights cannot be found again, once a segment."""
    split = torch_split.split
    methods = [(segment, size) for segment in split.segments for size in segment.methods().values()]
    done = _lower_all(torch_split, todo, step)
    by_key.update(
        (shared_key(split.segment(name), size), template) for (name, size), template in done.items()
    )
    again = [Job(s, (size,), False) for s, size in methods if not by_key[shared_key(s, size)].is_complete]
    own = _lower_all(torch_split, again, step)
    return {(s.name, size): own.get((s.name, size)) or by_key[shared_key(s, size)] for s, size in methods}


def _lower_all(torch_split: TorchSplit, todo: list[Job], step: Callable[[str], None]) -> _Templates:
    def lower_one(job: Job) -> dict[int | None, Template]:
        segment = job.segment
        graph = torch_split.graphs[segment.structure]
        try:
            return lower_graph(graph, _weights_of(torch_split, job), segment, job.methods)
        except LowerError as error:
            way_out = backends()[segment.backend].way_out
            if not way_out:
                raise
            raise LowerError(f"segment {job}: {error}; {way_out.format(segment.name)}") from error
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), "")
            missing = re.search(r"Missing out variants: {'aten::(\w+)'", first)
            if missing:
                raise no_kernel(str(job), missing[1]) from error
            raise LowerError(
                f"segment {job}: {segment.backend} cannot lower it ({type(error).__name__}: {first})"
            ) from error

    templates = {}
    try:
        with closing(each_forked(lower_one, todo)) as lowered:
            for job, found in lowered:
                templates.update({(job.segment.name, size): template for size, template in found.items()})
                step(f"lowered {job}")
    except BrokenProcessPool as error:
        left = [str(job) for job in todo if (job.segment.name, job.sizes[0]) not in templates]
        raise LowerError(
            f"a process that compiled one of {', '.join(left[:4])}{', …' if len(left) > 4 else ''} ended in the "
            "middle: its compiler crashed, or the machine has too little memory; nothing was written"
        ) from error
    return templates


def _large(torch_split: TorchSplit) -> set[str]:
    """The structures whose weights are better not in memory while they are lowered: those of a large model."""
    segments = [segment for segment in torch_split.split.segments if backends()[segment.backend].serialized]
    sizes = weight_bytes(torch_split)
    is_large = sum(sizes[segment.name] for segment in segments) >= _LARGE_BYTES
    return {segment.structure for segment in segments} if is_large else set()


def _weights_of(torch_split: TorchSplit, job: Job) -> MadeUp:
    """What a job is lowered over: the segment's own weights, or others in their place."""
    name = job.segment.name
    if job.is_shared and backends()[job.segment.backend].serialized:
        weights = without_numbers(torch_split.weights, name, LEAST_BYTES)
        if all(may_be_made_up(weight) for weight in weights if isinstance(weight, FakeTensor)):
            return made_up(weights, matrices(torch_split.graphs[job.segment.structure].graph))
    weights = torch_split.weights[name]
    return made_up(weights) if job.is_shared else as_they_are(tuple(map(in_memory, weights)))


def matrices(graph: fx.Graph) -> frozenset[int]:
    """The weights whose numbers no backend looks at: integers, tables, and what operators of aten alone read (no
    scales)."""
    looked_at = {
        node.target
        for node in graph.find_nodes(op="get_attr")
        if node.meta["val"].dtype != torch.int8
        and any(getattr(user.target, "namespace", "") != "aten" for user in node.users)
        and not all(is_call(user, TABLE_ROWS) and user.args[0] is node for user in node.users)
    }
    names = {node.target for node in graph.find_nodes(op="get_attr")}
    return frozenset(int(name[1:]) for name in names - looked_at)


def lower_graph(
    graph_module: fx.GraphModule, over: MadeUp, segment: Segment, methods: Mapping[str, int | None]
) -> dict[int | None, Template]:
    """Lower one structure to methods by name, each of one size or (None) for its range of sizes.

    Over made-up weights the templates serve every segment of the structure.
    """
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass

    module = with_weights(graph_module.graph, over.weights)
    exported = {name: export_segment(module, segment, size) for name, size in methods.items()}
    backend = backends()[segment.backend]
    serialized = backend.serialized or nullcontext
    with unchanged_graphs_kept(), over.unread.emitted(), serialized(over.unread):
        lowered = backend.to_edge(exported, segment.target, segment.recipe)
        edge = lowered.edge
        counts = {name: _count(edge.exported_program(name)) for name in methods}  # before allocations come in
        # Inputs and outputs live in buffers that the runtime owns.
        planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
        manager = edge.to_executorch(
            ExecutorchBackendConfig(memory_planning_pass=planning, emit_stacktrace=False)
        )
    for name, size in methods.items():
        _check_bounds(segment, name, size, graph_module.graph, manager.exported_program(name))
    templates = make_templates(manager._emitter_output.program, manager._named_data, over)
    return {
        size: replace(templates[name], traffic=lowered.traffic.get(name), **counts[name])
        for name, size in methods.items()
    }


def _check_bounds(
    segment: Segment, method: str, size: int | None, graph: fx.Graph, program: torch.export.ExportedProgram
) -> None:
    """Raise LowerError where a method's tensors have less room than the segment's largest sizes need.

    ExecuTorch plans a size that it lost track of for the example that the segment was exported with.
    """
    ranges = segment.shape.ranges if isinstance(segment.shape, SizeRanges) else ()
    most = {symbol: high for symbol, _, high in ranges} | ({} if size is None else {ROWS: size})
    placeholders = program.graph.find_nodes(op="placeholder")
    inputs = placeholders[len(placeholders) - len(segment.inputs) :]  # those before are weights
    (outputs,) = output_node(program.graph).args
    ports = zip((*segment.inputs, *segment.outputs), (*inputs, *outputs), strict=True)
    for port, node in ports:
        needed = shape_of(port.shape, most)
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        found = [_upper_bound(length, program) for length in value.shape]
        if any(have < need for have, need in zip(found, needed, strict=True)):
            raise LowerError(
                f"segment {method}: {segment.backend} lowers it for {port.name} of at most {found}, expected "
                f"{list(needed)}{_fixing(graph)}; keep the size fixed, or make the tensor in another way"
            )


def _upper_bound(size: Any, program: torch.export.ExportedProgram) -> int:
    if isinstance(size, int):
        return size
    bound = bound_sympy(expression(size), program.range_constraints).upper
    return int(bound) if bound.is_Integer else _UNBOUNDED


def _fixing(graph: fx.Graph) -> str:
    """The operators that make tensors from sizes alone: of them a lowering may lose the range."""
    made = {
        str(node.target).removesuffix(".default")
        for node in graph.nodes
        if node.op == "call_function"
        and is_tensor(node)
        and node.target is not operator.getitem
        and not any(is_tensor(source) for source in node.all_input_nodes)
    }
    return f", as one of {', '.join(sorted(made))} has a size that varies" if made else ""


def _count(program: torch.export.ExportedProgram) -> dict[str, Any]:
    """The template's numbers of operators and of those inside delegates, getitem and the like not counted."""
    outside = delegated = 0
    for node in operators(program):
        if "executorch_call_delegate" in str(node.target):
            delegated += len(operators(getattr(program.graph_module, node.args[0].target).original_module))
        elif "sym_size" not in str(node.target):  # reads a size, computes nothing
            outside += 1
    return {"num_operators": outside + delegated, "num_delegated": delegated}
