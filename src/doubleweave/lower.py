"""Lower a split to one ExecuTorch program: each structure once, in parallel processes.

It knows nothing of language models; it reads a TorchSplit and writes a .pte.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx

from doubleweave.backends import portable, xnnpack
from doubleweave.emit import Template, made_up_weights, make_template
from doubleweave.errors import LowerError, PolicyError
from doubleweave.ir import Dynamic, Segment, Split
from doubleweave.pte import ProgramWriter
from doubleweave.split import TorchSplit, transform_segments, with_weights

BACKENDS = {xnnpack.NAME: xnnpack, portable.NAME: portable}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Job:
    """One lowering: a segment that stands for its structure, at one size (None: dynamic)."""

    segment: Segment
    size: int | None

    @property
    def key(self) -> tuple[str, int | None]:
        return self.segment.structure, self.size

    def __str__(self) -> str:
        return self.segment.name if self.size is None else f"{self.segment.name}@{self.size}"


def prepare(torch_split: TorchSplit) -> TorchSplit:
    """Let each segment's backend rewrite its graph."""
    names = frozenset(s.name for s in torch_split.split.segments if s.backend == xnnpack.NAME)
    unknown = {s.backend for s in torch_split.split.segments} - set(BACKENDS)
    if unknown:
        raise PolicyError(f"backend {sorted(unknown)[0]!r}: expected one of {', '.join(BACKENDS)}")
    return transform_segments(torch_split, xnnpack.prepare, names)


def jobs(split: Split) -> list[_Job]:
    """What must be lowered: each structure once a size, longest first."""
    found: dict[tuple[str, int | None], _Job] = {}
    for segment in split.segments:
        for size in segment.methods().values():
            job = _Job(segment, size)
            found.setdefault(job.key, job)
    return sorted(found.values(), key=lambda job: -len(job.segment.inputs) - len(job.segment.outputs))


def lower(
    torch_split: TorchSplit, path: Path, progress: Progress, num_processes: int | None = None
) -> tuple[Split, str]:
    """Lower `torch_split` into the file `path`; returns the split with sizes filled in and the file's SHA-256.

    `progress` gets the name of each method when its lowering starts being waited for.
    """
    prepared = prepare(torch_split)
    templates = _lower_all(prepared, progress, num_processes)
    writer = ProgramWriter()
    segments = []
    for segment in prepared.split.segments:
        weight_bytes, template = 0, None
        for name, size in segment.methods().items():
            template = templates[segment.structure, size]
            weight_bytes = writer.add(name, template, prepared.weights[segment.name])
        assert template is not None
        segments.append(
            replace(
                segment,
                weight_bytes=weight_bytes,
                num_operators=template.num_operators,
                num_delegated=template.num_delegated,
            )
        )
    progress("writing program.pte")
    digest = writer.write(path)
    return replace(prepared.split, segments=tuple(segments)), digest


_inherited: TorchSplit | None = None  # what forked workers read: tensors need no pickling this way


def _lower_all(
    torch_split: TorchSplit, progress: Progress, num_processes: int | None
) -> dict[tuple[str, int | None], Template]:
    global _inherited
    todo = jobs(torch_split.split)
    _inherited = torch_split
    templates = {}
    workers = max(1, min(num_processes or len(os.sched_getaffinity(0)), len(todo)))
    _import_lowering()
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet_worker)
    try:
        with _interrupts_held():
            futures = {pool.submit(_lower_one, job): job for job in todo}
        for future in as_completed(futures):
            job = futures[future]
            try:
                templates[job.key] = future.result()
            except LowerError:
                raise
            except Exception as error:
                first = str(error).strip().splitlines()[0] if str(error).strip() else ""
                raise LowerError(
                    f"segment {job}: {job.segment.backend} cannot lower it ({type(error).__name__}: {first})"
                ) from error
            progress(str(job))
        pool.shutdown()
    except BaseException:
        _stop(pool)
        raise
    finally:
        _inherited = None
    return templates


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while processes fork: raised there it is lost in a fork handler, or a process is.

    Blocking the signal would not do: any other thread may take it, and Python raises in this one.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield  # Python raises nothing here
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        signal.raise_signal(signal.SIGINT)


def _stop(pool: ProcessPoolExecutor) -> None:
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)


def _import_lowering() -> None:
    """Import what the workers need before they are forked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import executorch.backends.xnnpack.partition.xnnpack_partitioner
        import executorch.exir  # noqa: F401


def _quiet_worker() -> None:
    import logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides, and stops us
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _lower_one(job: _Job) -> Template:
    assert _inherited is not None
    structure = job.segment.structure
    weights = made_up_weights(_inherited.weights[job.segment.name])
    return lower_graph(_inherited.graphs[structure], weights, job.segment, job.size)


def lower_graph(
    graph_module: fx.GraphModule, weights: tuple[Tensor, ...], segment: Segment, size: int | None
) -> Template:
    """Lower one structure over the given weights, at one size or (None) for its range of rows."""
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    exported = _export(with_weights(graph_module.graph, weights), segment, size)
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=BACKENDS[segment.backend].partitioners(),
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    num_operators, num_delegated = _count(edge.exported_program())
    # Inputs and outputs live in buffers that the runtime owns.
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    manager = edge.to_executorch(
        ExecutorchBackendConfig(memory_planning_pass=planning, emit_stacktrace=False)
    )
    template = make_template(manager._emitter_output.program, manager._named_data, weights)
    return replace(template, num_operators=num_operators, num_delegated=num_delegated)


def _export(module: fx.GraphModule, segment: Segment, size: int | None) -> torch.export.ExportedProgram:
    shape = segment.shape
    rows: dict[str, int] = {"T": size or 33, "S": 65}
    dims = {}
    if size is None:
        assert isinstance(shape, Dynamic)
        dims["T"] = torch.export.Dim("T", min=1, max=max(2, shape.high))
        dims["S"] = torch.export.Dim("S", min=1, max=max(2, shape.max_cached))
        rows["T"] = max(2, min(33, shape.high))
    args, dynamic = [], []
    for port in segment.inputs:
        sizes = [rows[s] if isinstance(s, str) else s for s in port.shape]
        args.append(torch.zeros(sizes, dtype=getattr(torch, port.dtype)))
        dynamic.append({i: dims[s] for i, s in enumerate(port.shape) if isinstance(s, str) and s in dims})
    with torch.no_grad():
        return torch.export.export(module, tuple(args), dynamic_shapes=tuple(dynamic), strict=False)


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
