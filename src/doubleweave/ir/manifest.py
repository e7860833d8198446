"""manifest.json: a program folder's own description, written by the compiler and read by everything else.

Reading it takes no torch. Unknown keys, another version, or a program file with another digest are refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from doubleweave.errors import ProgramError
from doubleweave.files import sha256_of
from doubleweave.ir import known_files
from doubleweave.ir.chat import ChatTemplate
from doubleweave.ir.check import Check
from doubleweave.ir.rules import language_model_problem, split_problem
from doubleweave.ir.seal import digest_of, is_whole, sealed
from doubleweave.ir.split import FixedSizes, Range, SizeRanges, Split
from doubleweave.ir.text_score import TextScore
from doubleweave.ir.trees import Tree

FORMAT = "doubleweave-program"
VERSION = 9  # programs of another version are refused, not converted: they can be compiled again
PROGRAM_FILE = "program.pte"
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
STATE_FILE = "state.bin"
RUN_FILE = "run.json"  # predict/run_file.py


@dataclass(frozen=True)
class ModelInfo:
    """The facts about a language model that generating text needs; `max_context` is in tokens.

    `chat_template` is a Jinja template, several by name, or None. `recipe` is the name of the file that said how
    weights are kept, `keep` what was asked for by pattern, and `calibrated` says which texts weights and scales were
    fitted to; all three may be empty. `start_token_ids` are what the text of a decoder with an encoder begins with. A
    text of more than `rotary_border` tokens has LongRoPE's long frequencies; 0: none has."""

    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    chat_template: ChatTemplate
    special_tokens: dict[str, str]
    quantize: str
    recipe: str = ""
    keep: dict[str, str] = field(default_factory=dict)
    calibrated: str = ""
    start_token_ids: tuple[int, ...] = ()
    rotary_border: int = 0


@dataclass(frozen=True)
class Manifest:
    """A program folder's own description.

    `name` is the source's or the module's; `model` is None for a module that is no language model. state.bin holds the
    first values of the states, in the order of `Split.states`; its digest is "" where there are none. `check` is what
    was compared with the source before the program was written, None for a program that was compiled without.
    `scores` are those of the package's texts, empty unless they were asked for.
    `tokenizer_digest` is that of tokenizer.json (seal.py), "" where there is none.
    """

    name: str
    model: ModelInfo | None
    split: Split
    program_sha256: str
    program_bytes: int
    state_sha256: str
    made_with: dict[str, str]
    check: Check | None = None
    tokenizer_digest: str = ""
    scores: tuple[TextScore, ...] = ()

    def write(self, folder: Path) -> None:
        data = {"format": FORMAT, "version": VERSION, **to_plain(self)}
        (folder / MANIFEST_FILE).write_bytes(sealed(data, indent=1))


def read(folder: Path, *, verify: bool = False) -> Manifest:
    """Read and check a program directory's manifest and program file. A large file is hashed once, and again where it
    was written since (known_files.py) or with `verify`.

    Raises ProgramError that names the file, its fault, and the remedy.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise ProgramError(
            f"{folder}: no such program folder; make one with: doubleweave compile SOURCE -o {folder}"
        )
    manifest = _parse(path)
    _check_file(folder / PROGRAM_FILE, manifest.program_sha256, manifest.program_bytes, verify=verify)
    if manifest.state_sha256:
        _check_file(folder / STATE_FILE, manifest.state_sha256)
    return manifest


def check_tokenizer(folder: Path, manifest: Manifest) -> None:
    """Raises ProgramError for a tokenizer.json that is not the one that the program was compiled with."""
    path = folder / TOKENIZER_FILE
    try:
        found = digest_of(path)
    except OSError as error:
        raise ProgramError(f"{path}: cannot be read ({error.strerror}); compile the program again") from None
    if found not in ("", manifest.tokenizer_digest):
        raise ProgramError(
            f"{path}: its digest is {found}, the manifest says {manifest.tokenizer_digest!r}: the file was changed or "
            "damaged; compile the program again"
        )


def _parse(path: Path) -> Manifest:
    again = "compile the program again"
    try:
        content = path.read_bytes()
        data = json.loads(content)
    except FileNotFoundError:
        raise ProgramError(f"{path}: missing; expected a folder made by doubleweave compile") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ProgramError(f"{path}: is not JSON ({error}); {again}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ProgramError(
            f"{path}: is not a {FORMAT} manifest; expected a folder made by doubleweave compile"
        )
    if data.get("version") != VERSION:
        raise ProgramError(
            f"{path}: found version {str(data.get('version'))[:20]!r}, expected {VERSION}; {again}"
        )
    if not is_whole(content):
        raise ProgramError(f"{path}: its seal is of another text: the file was changed or damaged; {again}")
    names = {each.name for each in fields(Manifest)}
    _check_keys(path, data, {"format", "version", "seal", *names}, "")
    if data["model"] is not None:
        _check_keys(path, data["model"], {each.name for each in fields(ModelInfo)}, "model.")
    _check_keys(path, data["split"], {each.name for each in fields(Split)}, "split.")
    try:
        manifest: Manifest = from_plain(Manifest, {name: data[name] for name in names})
        if problem := _problem(manifest):
            raise ValueError(problem)
        return manifest
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        reason = ascii(str(error))[1:-1][:300]  # of what the file has, which may be long and of several lines
        raise ProgramError(f"{path}: does not describe a program ({reason}); {again}") from None


def _check_keys(path: Path, data: Any, expected: set[str], where: str) -> None:
    found = set(data) if isinstance(data, dict) else set()
    if unknown := sorted(found - expected):
        raise ProgramError(
            f"{path}: found unknown key {where + unknown[0][:60]!r}, expected only "
            f"{', '.join(sorted(expected))}; compile the program again"
        )
    if missing := sorted(expected - found):
        raise ProgramError(f"{path}: key {where + missing[0]!r} is missing; compile the program again")


_hints = cache(get_type_hints)


def to_plain(value: Any) -> Any:
    """A manifest's part as JSON has it: dataclasses by their fields, tuples and named tuples as lists."""
    if isinstance(value, Tree):
        return value.to_dict()
    if isinstance(value, FixedSizes):
        return {"static": to_plain(value.sizes)}
    if isinstance(value, SizeRanges):
        return {"dynamic": to_plain(value.ranges)}
    if is_dataclass(value):
        return {each.name: to_plain(getattr(value, each.name)) for each in fields(value)}
    return list(map(to_plain, value)) if isinstance(value, tuple) else value


def from_plain(kind: Any, data: Any) -> Any:
    """Parse the data of `to_plain` as a value of the annotated type; raises KeyError, TypeError, ValueError or
    AttributeError for anything else."""
    # JSON gives whatever the file has, and dataclasses check nothing.
    origin, args = get_origin(kind), get_args(kind)
    if kind is Tree:
        return Tree.from_dict(data)
    if kind == FixedSizes | SizeRanges:
        if "static" in data:
            return FixedSizes(from_plain(tuple[int, ...], data["static"]))
        return SizeRanges(from_plain(tuple[Range, ...], data["dynamic"]))
    if origin in (Union, UnionType):
        return from_plain(
            next((arg for arg in args if (get_origin(arg) or arg) is type(data)), args[0]), data
        )
    if origin is tuple and type(data) is list:
        return tuple(from_plain(args[0], item) for item in data)
    if origin is dict and type(data) is dict:
        return {key: from_plain(args[1], item) for key, item in data.items()}
    if hasattr(kind, "_fields") and type(data) is list:  # a named tuple
        return kind(*map(from_plain, _hints(kind).values(), kind(*data)))
    if isinstance(kind, type) and is_dataclass(kind) and type(data) is dict:
        hints = _hints(kind)
        return kind(**{key: from_plain(hints.get(key, Any), item) for key, item in data.items()})
    if type(data) is str:
        data.encode()  # half a character cannot be handed on
    if kind is Any or type(data) is kind or (origin is Literal and data in args):
        return data
    raise TypeError("a value is of another type than expected")


def _problem(manifest: Manifest) -> str | None:
    """The first rule that a manifest breaks, or None: everything that reads a split relies on there being none."""
    split, model = manifest.split, manifest.model
    if problem := split_problem(split):
        return problem
    if model is None:
        has_none = any(function.interface is None for function in split.functions)
        return "a function has no interface" if has_none else None
    if not all(0 <= token < model.vocab_size for token in (*model.eos_token_ids, *model.start_token_ids)):
        return "a start or end token is not in the vocabulary"
    if not 0 <= model.rotary_border < max(1, model.max_context):
        return "its rotary_border is not within the context"
    return language_model_problem(split, model.vocab_size, model.max_context)


def _check_file(path: Path, sha256: str, num_bytes: int | None = None, *, verify: bool = False) -> None:
    """Check size, where it is known, and digest: a damaged program would end the process where it is run."""
    try:
        size = path.stat().st_size
        if num_bytes not in (None, size):
            raise ProgramError(
                f"{path}: found {size} bytes, the manifest says {num_bytes}: the file is truncated or "
                "of another program; compile it again"
            )
        if not verify and known_files.is_known(path, sha256):
            return
        digest = sha256_of(path)
    except OSError as error:
        raise ProgramError(f"{path}: cannot be read ({error.strerror}); compile the program again") from None
    if digest != sha256:
        raise ProgramError(
            f"{path}: its SHA-256 is {digest[:12]}…, the manifest says {sha256[:12]}…: the file was "
            "changed or damaged; compile it again"
        )
    known_files.note(path, sha256)
