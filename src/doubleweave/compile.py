"""Compile a language model into a program directory: load, export, split, quantize, lower, write.

Nothing half-written is left behind: the directory is made beside its place and renamed into it.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from doubleweave.errors import LowerError, PolicyError, SourceError
from doubleweave.ir import Dynamic, Static
from doubleweave.manifest import MANIFEST_FILE, PROGRAM_FILE, TOKENIZER_FILE, Manifest, ModelInfo

if TYPE_CHECKING:
    from doubleweave.models.model import Model

SHAPES = ("bounded", "static")
DEFAULT_SIZES = (1, 32, 128)
_MOST_ROWS = 4096

# Gets (what is being done, steps done, steps in all).
Progress = Callable[[str, int, int], None]


def compile_llm(
    source: str | Path | Model,
    out: str | Path,
    *,
    quantize: str = "8da8w",
    shape: str = "bounded",
    chunk: Sequence[int] = (),
    max_context: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Compile `source` (alias, GGUF file, Hugging Face folder, or a loaded Model) into the folder `out`.

    quantize: "none", "8da8w" or "8da4w". shape: "bounded" (linears take 1 to max(chunk) rows, default 128)
    or "static" (one method for each size in `chunk`, default 1, 32, 128; XNNPACK stands in for the NPU).
    Raises PolicyError, SourceError, SplitError or LowerError; `out` is then as it was before.
    """
    sizes = _sizes(shape, chunk)
    report = progress or (lambda what, done, total: None)
    folder = Path(out)
    _check_target(folder)
    from doubleweave.quantize import RECIPES  # torch is imported from here on

    if quantize not in RECIPES:
        raise PolicyError(f"quantize: found {quantize!r}, expected one of {', '.join(RECIPES)}")
    from doubleweave.models.model import Model

    report("loading the model", 0, 1)
    model = source if isinstance(source, Model) else _load(source)
    context = model.max_context if max_context is None else max_context
    if not 1 <= context <= model.max_context:
        raise PolicyError(
            f"max-context: found {context}, expected 1 to {model.max_context} (what the model was trained for)"
        )
    temporary = _make_beside(folder)
    try:
        manifest = _compile(model, temporary, quantize, sizes, context, report)
        _replace(temporary, folder)
    except OSError as error:
        raise LowerError(
            f"{folder}: cannot be written: {error.strerror}; choose another folder with -o"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _compile(
    model: Model, folder: Path, recipe: str, sizes: Static | Dynamic, context: int, report: Progress
) -> Manifest:
    from doubleweave.export import export_llm, owned_modules
    from doubleweave.lower import jobs, lower
    from doubleweave.quantize import quantize
    from doubleweave.split import split_graph

    report("exporting the graph", 0, 1)
    most = sizes.high if isinstance(sizes, Dynamic) else max(sizes.sizes)
    graph = export_llm(model.module, most)
    torch_split = split_graph(
        graph,
        owned_modules(model.module),
        last_row=frozenset({"lm_head"}),
        static=sizes,
        max_context=context,
        backend="xnnpack",
        static_device="cpu" if isinstance(sizes, Dynamic) else "npu",
    )
    report(f"quantizing ({recipe})", 0, 1)
    torch_split = quantize(torch_split, recipe)
    total = len(jobs(torch_split.split)) + 1
    done = 0
    report("lowering", done, total)

    def step(what: str) -> None:
        nonlocal done
        done += 1
        report(f"lowered {what}" if done < total else what, done, total)

    split, digest = lower(torch_split, folder / PROGRAM_FILE, step)
    if model.save_tokenizer is not None:
        _save_tokenizer(model.save_tokenizer, folder)
    manifest = Manifest(
        model=ModelInfo(
            model.name,
            model.vocab_size,
            context,
            model.eos_token_ids,
            model.chat_template,
            model.special_tokens,
            recipe,
        ),
        split=split,
        program_sha256=digest,
        program_bytes=(folder / PROGRAM_FILE).stat().st_size,
        made_with={name: version(name) for name in ("doubleweave", "executorch", "torch", "transformers")},
    )
    manifest.write(folder)
    return manifest


def _save_tokenizer(save: Callable[[Path], None], folder: Path) -> None:
    try:
        save(folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises a plain Exception with what the system said
        raise OSError(errno.EIO, f"{TOKENIZER_FILE}: {error}") from error


def _sizes(shape: str, chunk: Sequence[int]) -> Static | Dynamic:
    if shape not in SHAPES:
        raise PolicyError(f"shape: found {shape!r}, expected one of {', '.join(SHAPES)}")
    for size in chunk:
        if not 1 <= size <= _MOST_ROWS:
            raise PolicyError(f"chunk: found {size}, expected 1 to {_MOST_ROWS} tokens")
    if shape == "bounded":
        return Dynamic(1, max(chunk, default=max(DEFAULT_SIZES)))
    return Static(tuple(sorted(set(chunk or DEFAULT_SIZES))))


def _load(source: str | Path) -> Model:
    try:
        from doubleweave.models import load
    except ImportError as error:
        raise SourceError(
            f"compiling needs {error.name}, which is not installed; run: pip install 'doubleweave[compile]'"
        ) from error
    return load(source)


def _check_target(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise LowerError(f"{folder}: is a file, expected a folder to write; choose another one with -o")
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    # The whole folder is replaced, so nothing that is not ours may be in it.
    if found and (PROGRAM_FILE not in found or found - {PROGRAM_FILE, MANIFEST_FILE, TOKENIZER_FILE}):
        raise LowerError(
            f"{folder}: is a folder with other files in it, expected an empty or missing folder or an older "
            "program; choose another one with -o"
        )


def _make_beside(folder: Path) -> Path:
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    except OSError as error:
        raise LowerError(
            f"{folder}: cannot be made: {error.strerror}; choose another folder with -o"
        ) from error


def _replace(temporary: Path, folder: Path) -> None:
    """Put the finished directory in its place; an older program goes only once the new one is there."""
    os.chmod(temporary, 0o777 & ~_umask())
    if not folder.exists():
        temporary.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.absolute().parent)) / "program"
    folder.rename(old)
    try:
        temporary.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
