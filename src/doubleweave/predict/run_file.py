"""run.json: what running a program's prompts takes, worked out beforehand, for runners without Python.

All that depends on neither the prompt nor the schedule is in it: calls, values, the slots and dependencies of one
chunk, and what methods cost by a profile. What is left is to cut a prompt, to repeat the chunk's pattern, to make a
schedule and to bind it; doubleweave-run (native/runner) does that. It knows nothing of torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from doubleweave.errors import InputError
from doubleweave.files import written_whole
from doubleweave.ir.manifest import RUN_FILE, Manifest, ModelInfo
from doubleweave.ir.split import LOADS_ALONE, FixedSizes, Segment, SizeRanges, Split, most_rows
from doubleweave.predict.profile import Profile, uses_cache
from doubleweave.runtime.llm.text import render_chat
from doubleweave.schedule.choice import chunk_shape, overlapping_schedule
from doubleweave.schedule.scratch_groups import blocks, groups, num_groups
from doubleweave.schedule.task_graph import Pattern, has_instance_per_worker, pattern_of

VERSION = 2
# Chunks on their way at once: eight at most, or two a worker of a wavefront.
_MOST_LANES = 16
# Where estimates are taken; the run time goes along straight lines between them.
_CACHED = (0, 256, 1024, 4096, 16384)
_PROMPT = "doubleweave:prompt"


def write_run_file(folder: Path, manifest: Manifest, profile: Profile) -> None:
    """Write run.json into a language model's folder."""
    with written_whole(folder / RUN_FILE) as temporary:
        temporary.write_text(json.dumps(run_dict(manifest, profile)) + "\n")


def run_dict(manifest: Manifest, profile: Profile) -> dict[str, Any]:
    """What run.json says of a language model's program. Raises InputError for a profile that does not fit."""
    split, model = manifest.split, manifest.model
    assert model is not None
    shape = chunk_shape(split)
    shared = groups(split)
    per_worker = {call.segment: has_instance_per_worker(split, i) for i, call in enumerate(split.calls)}
    slots = pattern_of(split, "last", 1).slots
    counts = sorted({1, profile.threads or 1, *(decision.choice.threads for decision in profile.decisions)})
    return {
        "format": "doubleweave-run",
        "version": VERSION,
        "program_bytes": manifest.program_bytes,
        "vocab_size": model.vocab_size,
        "max_context": model.max_context,
        "eos_token_ids": list(model.eos_token_ids),
        "chat": _chat(model),
        "sizes": list(shape.sizes) if isinstance(shape, FixedSizes) else [],
        "most_rows": most_rows(shape),
        "overlapping": overlapping_schedule(split),
        "values": [[value.name, value.kind, value.row_bytes] for value in split.values],
        "segments": [
            {
                "name": segment.name,
                "device": segment.device,
                "is_static": isinstance(segment.shape, FixedSizes),
                "per_worker": per_worker[segment.name],
                "loads_alone": segment.backend in LOADS_ALONE,
                "group": shared.get(segment.name, -1),
                "inputs": [list(port.shape) for port in segment.inputs],
                "outputs": [list(port.shape) for port in segment.outputs],
                "times": _times(segment, profile, counts),
            }
            for segment in split.segments
        ],
        "calls": [
            {
                "name": call.name,
                "segment": call.segment,
                "reads": list(call.reads),
                "writes": list(call.writes),
                "last_row": call.rows == "last",
            }
            for call in split.calls
        ],
        "slots": slots.of,
        "slot_row_bytes": list(slots.row_bytes),
        "output": next(value.name for value in split.values if value.kind == "output"),
        "patterns": [_pattern(pattern_of(split, "last", lanes)) for lanes in range(1, _MOST_LANES + 1)],
        "blocks": blocks(split),
        "groups": num_groups(split),
        "costs": _costs(split, profile),
        "threads": profile.threads,
        "decisions": [
            {"tokens": decision.tokens, **decision.choice._asdict()} for decision in profile.decisions
        ],
    }


def _chat(model: ModelInfo) -> dict[str, Any] | bool:
    """What the chat template puts before and behind a prompt, and whether it strips that of white space; False for no
    template, True for one that does more than that."""
    if model.chat_template is None:
        return False

    def parts(prompt: str, shown: str) -> list[str]:
        messages = [{"role": "user", "content": prompt}]
        return render_chat(model.chat_template or "", messages, model.special_tokens).split(shown)

    try:
        plain = parts(_PROMPT, _PROMPT)
        spaced = f" \n{_PROMPT}\t\n"
        as_it_is, stripped = parts(spaced, spaced), parts(spaced, _PROMPT)
    except InputError:
        return True
    if len(plain) == 2 and plain in (as_it_is, stripped):
        return {"before": plain[0], "behind": plain[1], "strips": plain != as_it_is}
    return True


def _pattern(pattern: Pattern) -> dict[str, Any]:
    return {
        "body": pattern.body.tolist(),
        "last": pattern.last.tolist(),
        "body_waits": np.stack(pattern.body_waits, axis=1).tolist(),
        "last_waits": np.stack(pattern.last_waits, axis=1).tolist(),
    }


def _times(segment: Segment, profile: Profile, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Microseconds by rows and cached tokens, a table a number of threads."""
    if measured := profile.segments.get(segment.name):
        return [
            {
                "threads": threads,
                "rows": list(found.rows),
                "cached": list(found.cached),
                "us": [list(row) for row in found.us],
                "repeated": list(found.repeated),
            }
            for threads, found in measured.items()
        ]
    rows = segment.shape.sizes if isinstance(segment.shape, FixedSizes) else _rows_of(segment.shape)
    cached = _CACHED if uses_cache(segment) else (0,)

    def table(threads: int) -> list[list[float]]:
        before = np.array(cached, float)
        return [
            profile.time_us(segment, np.full(len(cached), n, float), before, threads).tolist() for n in rows
        ]

    return [
        {"threads": count, "rows": list(rows), "cached": list(cached), "us": table(count), "repeated": []}
        for count in counts
    ]


def _rows_of(shape: SizeRanges) -> tuple[int, ...]:
    most = most_rows(shape)
    return tuple(sorted({*(n for n in (1, 4, 8, 16, 32, 64) if n < most), most}))


def _costs(split: Split, profile: Profile) -> dict[str, Any]:
    devices = sorted({segment.device for segment in split.segments})
    return {
        "devices": devices,
        "hand_over_ns": [[round(profile.hand_over_us_of(a, b) * 1e3) for b in devices] for a in devices],
        "same_worker_ns": round(profile.same_worker_us * 1e3),
        "contention": [
            {"workers": workers, "shares": [[pairs.get((a, b), 0.0) for b in devices] for a in devices]}
            for workers, pairs in profile.contention.items()
        ],
    }
