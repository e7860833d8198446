"""manifest.json: what a program directory says about itself.

Read without torch. Unknown keys, another version, or a program file with another digest are refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from doubleweave.errors import ProgramError
from doubleweave.ir import Split

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
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
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
        return Manifest(
            model, split, str(data["program_sha256"]), int(data["program_bytes"]), dict(data["made_with"])
        )
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
