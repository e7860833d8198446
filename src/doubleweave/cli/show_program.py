"""A program as plain dictionaries (for --json) and as text: after compiling it, and of its manifest."""

from __future__ import annotations

import resource
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from doubleweave.cli.show_scores import score_dict, score_lines
from doubleweave.compiler.backends import backends
from doubleweave.ir.manifest import TOKENIZER_FILE, Manifest
from doubleweave.ir.split import FixedSizes, Function, Segment
from doubleweave.tables import format_table
from doubleweave.vendors.library import libraries_of, library_of


def compile_summary(out: str, manifest: Manifest, seconds: float) -> dict[str, Any]:
    return {
        "program": out,
        "model": manifest.name,
        "quantize": None if manifest.model is None else manifest.model.quantize,
        "segments": len(manifest.split.segments),
        "calls": len(manifest.split.calls),
        "methods": sum(len(segment.methods()) for segment in manifest.split.segments),
        "program_bytes": manifest.program_bytes,
        "tokenizer": (Path(out) / TOKENIZER_FILE).exists(),
        "seconds": seconds,
        "check": None if manifest.check is None else asdict(manifest.check),
        "scores": [score_dict(score) for score in manifest.scores],
        "peak_memory_bytes": _peak_memory_bytes(),
        "snr_db": {s.name: s.snr_db for s in manifest.split.segments if s.snr_db is not None},
    }


def _peak_memory_bytes() -> int:
    """The largest resident size of this process, or of one of its children, so far."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(one).ru_maxrss for one in who) * 1024  # Linux counts KiB


_SHOWN = 5  # segments with the worst signal-to-noise ratio
_POOR_DB = 20.0


def quality_lines(manifest: Manifest) -> list[str]:
    """The segments with the most noise from fixed scales, and a hint at a recipe with less."""
    found = [(s.snr_db, s) for s in manifest.split.segments if s.snr_db is not None]
    if not found:
        return []
    found.sort(key=lambda pair: pair[0])
    lines = ["signal to noise against float32, on the calibration text, worst first:"]
    lines += [
        f"  {segment.name:12} {decibels:5.1f} dB  {segment.recipe}" for decibels, segment in found[:_SHOWN]
    ]
    if len(found) > _SHOWN:
        lines.append(f"  … {len(found) - _SHOWN} more, up to {found[-1][0]:.1f} dB")
    worst_db, worst = found[0]
    if worst_db < _POOR_DB and (better := backends()[worst.backend].quieter(worst)):
        lines.append(f"hint: {better} compiles the worst one with less noise")
    return lines


def check_lines(manifest: Manifest) -> list[str]:
    """What was compared with the source before the program was written, and how far it was off."""
    check = manifest.check
    if check is None:
        return ["check: none (--no-check)"]
    layers = f" in its first {check.layers} layers" if check.layers else ""
    what = "the program" if check.ran == "program" else f"the split in eager torch ({check.reason})"
    tokens = layers + f" on {check.num_tokens} tokens" if check.num_tokens else ""
    far = f" and around {', '.join(map(str, check.positions))}" if check.positions else ""
    lines = [
        f"check: {what} against the source{tokens}{far}: off by {check.source_off:.1e} of the largest number"
    ]
    if check.unsettled:
        lines.append(f"  without {check.unsettled} tokens that rounding decides in the source itself")
    if check.segment_noise is not None:
        lines.append(f"  noise of segments {check.segment_noise:.1e} against the quantized split")
    if check.logits_noise is not None:
        lines.append(f"  noise of logits {check.logits_noise:.2f} against the quantized split")
    if check.weights_noise is not None:
        lines.append(f"  noise of all its segments {check.weights_noise:.1e} against float32")
    if check.top1 is not None:
        lines.append(
            f"  against float32: {check.top1:.1%} of next tokens equal, divergence {check.kl:.3f} nats"
        )
    return lines


def inspect_dict(manifest: Manifest) -> dict[str, Any]:
    model = manifest.model
    about: dict[str, Any] = {"model": manifest.name, "program_bytes": manifest.program_bytes}
    about["check"] = None if manifest.check is None else asdict(manifest.check)
    about["scores"] = [score_dict(score) for score in manifest.scores]
    if model is not None:
        about.update(quantize=model.quantize, max_context=model.max_context, cache=_cached_bytes(manifest))
        about.update(recipe=model.recipe, keep=model.keep, calibrated=model.calibrated)
    else:
        about.update(states={value.name: value.type_text for value in manifest.split.states})
    about["functions"] = [
        {
            "name": function.name,
            "inputs": {value.name: value.type_text for value in function.inputs},
            "outputs": [value.type_text for value in function.results],
            "ranges": {r.symbol: [r.low, r.high] for r in function.ranges},
        }
        for function in _callable(manifest)
    ]
    for name in backends():
        if (build := library_of(name).build) is not None:
            segments = manifest.split.segments_of(name)
            about[name] = build(segments) if segments else None
    about["segments"] = [
        {
            "name": segment.name,
            "device": segment.device,
            "backend": segment.backend,
            "shape": shape_text(segment),
            "methods": list(segment.methods()),
            "operators": segment.num_operators,
            "delegated": segment.num_delegated,
            "weight_bytes": segment.weight_bytes,
            "recipe": segment.recipe,
            "stored": [item._asdict() for item in segment.stored],
            "snr_db": segment.snr_db,
            "contexts": segment.contexts,
            "traffic": [item._asdict() for item in segment.traffic],
            "rows": segment.rows,
            "calls": len(manifest.split.calls_of(segment.name)),
        }
        for segment in manifest.split.segments
    ]
    return about


def inspect_table(manifest: Manifest) -> str:
    """One row a segment; weight bytes of a segment are those it reads, shared ones included."""
    rows = [["segment", "device", "backend", "shape", "delegated", "weights KiB", "calls"]]
    rows += [
        [
            segment.name,
            segment.device,
            segment.backend,
            shape_text(segment),
            f"{segment.num_delegated}/{segment.num_operators}",
            f"{segment.weight_bytes / 1024:.1f}",
            str(len(manifest.split.calls_of(segment.name))),
        ]
        for segment in manifest.split.segments
    ]
    model = manifest.model
    about = "" if model is None else f" {model.quantize}, context {model.max_context},"
    head = f"{manifest.name},{about} program {manifest.program_bytes / 2**20:.1f} MiB"
    parts = [head + "\n" + format_table(rows)]
    for name, library in libraries_of(manifest.split).items():
        parts += library.build_lines(manifest.split.segments_of(name))
    if lines := _module_lines(manifest):
        parts += [lines]
    parts += _recipe_lines(manifest)
    if found := _cached_bytes(manifest):
        formats = ", ".join(f"{count:,} bytes a token in {dtype}" for dtype, count in found.items())
        parts.append(f"cache: {formats}")
    parts += [*check_lines(manifest), *score_lines(manifest.scores)]
    return "\n".join(parts)


def _recipe_lines(manifest: Manifest) -> list[str]:
    """What was asked for, what weights are kept in by the roles of linears, and the texts that they were fitted to."""
    model = manifest.model
    lines = []
    if model is not None and (model.recipe or model.keep):
        kept = ", ".join(f"{pattern} in {into}" for pattern, into in model.keep.items())
        named = f"recipe {model.recipe}: {model.quantize}" if model.recipe else model.quantize
        lines.append(named + (f", but {kept}" if kept else ""))
    counts: Counter[str] = Counter()
    roles: dict[str, list[str]] = {}
    for segment in manifest.split.segments:
        for item in segment.stored:
            counts[item.format] += item.weights
            if item.role not in (of := roles.setdefault(item.format, [])):
                of.append(item.role)
    kept_in = (
        f"{count / 1e6:,.1f} million in {name} ({', '.join(roles[name])})"
        for name, count in counts.most_common()
    )
    if counts:
        lines.append(f"weights: {'; '.join(kept_in)}")
    if model is not None and model.calibrated:
        lines.append(f"calibrated on {model.calibrated}")
    return lines


def _cached_bytes(manifest: Manifest) -> dict[str, int]:
    """The bytes that a token takes in the cache, by the format that they are kept in."""
    found: dict[str, int] = {}
    for value in manifest.split.values if manifest.model else ():
        if value.kind == "cache":
            found[value.dtype] = found.get(value.dtype, 0) + value.row_bytes
    return found


def _callable(manifest: Manifest) -> tuple[Function, ...]:
    """The functions that are called as modules: all, or a language model's encoders."""
    return manifest.split.functions if manifest.model is None else manifest.split.functions[1:]


def _module_lines(manifest: Manifest) -> str:
    """Functions with what they take and give, states, and how rows of chunked segments were shown independent."""
    lines = [f.signature_text(f.name or manifest.name) for f in _callable(manifest)]
    lines += [f"state {value.name}: {value.type_text}" for value in manifest.split.states]
    lines += [
        f"rows of {segment.name}: {segment.rows}" for segment in manifest.split.segments if segment.rows
    ]
    return "\n".join(lines)


def shape_text(segment: Segment) -> str:
    shape = segment.shape
    if isinstance(shape, FixedSizes):
        return "static " + ",".join(map(str, shape.sizes)) if shape.sizes else "static"
    return "dynamic " + ", ".join(f"{r.symbol} {r.low}..{r.high}" for r in shape.ranges)
