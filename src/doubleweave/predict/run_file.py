"""run.json: the part of planning a run that depends on neither the prompt nor the schedule, for runners without Python.

It has calls, values, the slots and dependencies of one chunk, and the costs of methods by a profile. doubleweave-run
(native/runner) cuts the prompt, repeats the chunk's pattern, makes a schedule and binds it. It knows nothing of torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from doubleweave.files import written_whole
from doubleweave.ir.chat import affixes_of
from doubleweave.ir.manifest import PROGRAM_FILE, RUN_FILE, Manifest, ModelInfo
from doubleweave.ir.seal import chunk_digests, sealed
from doubleweave.ir.split import FixedSizes, Segment, most_rows
from doubleweave.predict.plan_run import overlapping_schedule
from doubleweave.predict.profile import Profile
from doubleweave.schedule.buffer_slots import assign
from doubleweave.schedule.choice import chunk_shape, devices_of, static_device
from doubleweave.schedule.pattern import has_instance_per_worker, pattern_of
from doubleweave.schedule.scratch_groups import blocks, groups, num_groups
from doubleweave.vendors.library import library_of

VERSION = 8
_PATTERN = ("body", "last", "body_waits", "last_waits")
_MEASURED = ("rows", "cached", "us", "repeated")


def write_run_file(folder: Path, manifest: Manifest, profile: Profile) -> None:
    """Write run.json into a language model's folder."""
    with written_whole(folder / RUN_FILE) as temporary:
        data = run_dict(manifest, profile)
        data["program_digests"] = chunk_digests(folder / PROGRAM_FILE)
        temporary.write_bytes(sealed(data))


def run_dict(manifest: Manifest, profile: Profile) -> dict[str, Any]:
    """The content of run.json for a language model's program. Raises InputError for a profile that does not fit."""
    split, model = manifest.split.decoder, manifest.model
    assert model is not None
    shape = chunk_shape(split)
    shared = groups(split)
    per_worker = {call.segment: has_instance_per_worker(split, i) for i, call in enumerate(split.calls)}
    slots, pattern, devices = assign(split), pattern_of(split, "last"), devices_of(split)
    return {
        "format": "doubleweave-run",
        "version": VERSION,
        "name": manifest.name,
        "program_bytes": manifest.program_bytes,
        "program_sha256": manifest.program_sha256,
        "weight_bytes": manifest.split.weight_bytes,
        "tokenizer_digest": manifest.tokenizer_digest,
        "vocab_size": model.vocab_size,
        "max_context": model.max_context,
        "rotary_border": model.rotary_border,
        "eos_token_ids": list(model.eos_token_ids),
        "chat": _chat(model),
        "sizes": list(shape.sizes) if isinstance(shape, FixedSizes) else [],
        "most_rows": most_rows(shape),
        "overlapping": overlapping_schedule(split),
        "values": [[value.name, value.kind, value.row_bytes, value.window] for value in split.values],
        "segments": [
            {
                "name": segment.name,
                "device": segment.device,
                "is_static": isinstance(segment.shape, FixedSizes),
                "per_worker": per_worker[segment.name],
                "loads_alone": library_of(segment.backend).loads_alone,
                "group": shared.get(segment.name, -1),
                "each_row": segment.each_row,
                "weight_bytes": segment.weight_bytes,
                "inputs": [list(port.shape) for port in segment.inputs],
                "outputs": [list(port.shape) for port in segment.outputs],
                **_times(segment, profile),
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
        "pattern": {key: getattr(pattern, key).tolist() for key in _PATTERN},
        "blocks": blocks(split),
        "groups": num_groups(split),
        "devices": devices,
        "static_device": static_device(split),
        "most_tasks": profile.most_tasks(devices),
        "hand_over_ns": profile.hand_overs_ns(devices),
        "same_worker_ns": round(profile.same_worker_us * 1e3),
        "contention": [
            {"workers": workers, "shares": shares} for workers, shares in profile.contentions(devices).items()
        ],
        "threads": profile.threads,
        "decisions": [
            {"tokens": decision.tokens, **decision.choice._asdict()} for decision in profile.decisions
        ],
    }


def _chat(model: ModelInfo) -> dict[str, Any] | bool:
    """`chat` in run.json: the template's affixes, False for no template, True for one that affixes do not render."""
    if model.chat_template is None:
        return False
    affixes = affixes_of(model.chat_template, model.special_tokens)
    return True if affixes is None else affixes._asdict()


def _times(segment: Segment, profile: Profile) -> dict[str, Any]:
    """A segment's times: measured, by numbers of threads, or estimated."""
    measured = profile.segments.get(segment.name, {})
    tables = [
        {"threads": threads, **{key: getattr(table, key) for key in _MEASURED}}
        for threads, table in measured.items()
    ]
    return {"measured": tables, "estimated": None if tables else profile.estimate(segment)._asdict()}
