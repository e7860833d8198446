"""manifest.json: what a program directory says about itself.

Read without torch. Unknown keys, another version, or a program file with another digest are refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from doubleweave.errors import ProgramError
from doubleweave.ir import ITEM_BYTES, Split, Static

FORMAT = "doubleweave-program"
VERSION = 1
PROGRAM_FILE = "program.pte"
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class ModelInfo:
    """What generating text needs to know of the model."""

    name: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    chat_template: str | None
    special_tokens: dict[str, str]
    quantize: str


@dataclass(frozen=True)
class Manifest:
    model: ModelInfo
    split: Split
    program_sha256: str
    program_bytes: int
    made_with: dict[str, str]

    def write(self, folder: Path) -> None:
        data = {
            "format": FORMAT,
            "version": VERSION,
            "program_sha256": self.program_sha256,
            "program_bytes": self.program_bytes,
            "made_with": self.made_with,
            "model": {**asdict(self.model), "eos_token_ids": list(self.model.eos_token_ids)},
            "split": self.split.to_dict(),
        }
        (folder / MANIFEST_FILE).write_text(json.dumps(data, indent=1) + "\n")


def read(folder: Path) -> Manifest:
    """Read and check a program directory's manifest and program file.

    Raises ProgramError that names the file, what is wrong with it, and what to do.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise ProgramError(
            f"{folder}: no such program folder; make one with: doubleweave compile SOURCE -o {folder}"
        )
    manifest = _parse(path)
    _check_program(folder / PROGRAM_FILE, manifest)
    return manifest


def _parse(path: Path) -> Manifest:
    again = "compile the program again"
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise ProgramError(f"{path}: missing; expected a folder made by doubleweave compile") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ProgramError(f"{path}: is not JSON ({error}); {again}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ProgramError(
            f"{path}: is not a {FORMAT} manifest; expected a folder made by doubleweave compile"
        )
    if data.get("version") != VERSION:
        raise ProgramError(f"{path}: found version {data.get('version')!r}, expected {VERSION}; {again}")
    expected = {"format", "version", *(field.name for field in fields(Manifest))}
    _check_keys(path, data, expected, "")
    _check_keys(path, data["model"], {field.name for field in fields(ModelInfo)}, "model.")
    try:
        model = ModelInfo(**{**data["model"], "eos_token_ids": tuple(data["model"]["eos_token_ids"])})
        split = Split.from_dict(data["split"])
        _check_keys(path, data["split"], {field.name for field in fields(Split)}, "split.")
        manifest = Manifest(
            model, split, data["program_sha256"], data["program_bytes"], dict(data["made_with"])
        )
        if not _conforms(manifest, Manifest):
            raise TypeError("a value is of another type than expected")
        if problem := _inconsistency(manifest):
            raise ValueError(problem)
        return manifest
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ProgramError(f"{path}: does not describe a program ({error}); {again}") from None


def _check_keys(path: Path, data: Any, expected: set[str], where: str) -> None:
    found = set(data) if isinstance(data, dict) else set()
    if unknown := sorted(found - expected):
        raise ProgramError(
            f"{path}: found unknown key {where + unknown[0]!r}, expected only "
            f"{', '.join(sorted(expected))}; compile the program again"
        )
    if missing := sorted(expected - found):
        raise ProgramError(f"{path}: key {where + missing[0]!r} is missing; compile the program again")


def _conforms(value: Any, kind: Any) -> bool:
    """Whether a value is what a type annotation says, all the way down."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in args
    if origin in (Union, UnionType):
        return any(_conforms(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_conforms(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_conforms(item, args[1]) for item in value.values())
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return type(value) is kind and all(_conforms(getattr(value, name), hints[name]) for name in hints)
    return type(value) is kind


def _inconsistency(manifest: Manifest) -> str | None:
    """What in the manifest does not fit together, or None."""
    split = manifest.split
    segments = {segment.name: segment for segment in split.segments}
    values = {value.name: value for value in split.values}
    written = [name for call in split.calls for name in call.writes]
    for call in split.calls:
        if call.segment not in segments or not values.keys() >= {*call.reads, *call.writes}:
            return f"call {call.name} names a segment or value that is not there"
        segment = segments[call.segment]
        if (len(call.reads), len(call.writes)) != (len(segment.inputs), len(segment.outputs)):
            return f"call {call.name} reads or writes another number of values than {segment.name} does"
    if sorted(written) != sorted(value.name for value in split.values if value.kind != "input"):
        return "a value has no writer or several"
    if any(value.dtype not in ITEM_BYTES or value.row_bytes < 1 for value in split.values):
        return "a value has an unknown dtype or no bytes"
    for segment in split.segments:
        shape = segment.shape
        if min(shape.sizes, default=0) < 1 if isinstance(shape, Static) else not 1 <= shape.low <= shape.high:
            return f"segment {segment.name} has no rows"
    if manifest.model.max_context < 1 or manifest.model.vocab_size < 1:
        return "the context or the vocabulary is empty"
    return None


def _check_program(path: Path, manifest: Manifest) -> None:
    try:
        size = path.stat().st_size
        if size != manifest.program_bytes:
            raise ProgramError(
                f"{path}: found {size} bytes, the manifest says {manifest.program_bytes}: the file is truncated or "
                "of another program; compile it again"
            )
        with open(path, "rb") as file:
            digest = (
                hashlib.file_digest(file, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else (hashlib.sha256(file.read()).hexdigest())
            )
    except OSError as error:
        raise ProgramError(f"{path}: cannot be read ({error.strerror}); compile the program again") from None
    if digest != manifest.program_sha256:
        raise ProgramError(
            f"{path}: its SHA-256 is {digest[:12]}…, the manifest says {manifest.program_sha256[:12]}…: the file was "
            "changed or damaged; compile it again"
        )
