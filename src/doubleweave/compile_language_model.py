"""Compile a language model into a program directory: load, export, split, quantize, lower, write.

Nothing half-written is left behind: the directory is made beside its place and renamed into it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from doubleweave.errors import PolicyError, SourceError
from doubleweave.ir import Dynamic, Static, most_rows, rows
from doubleweave.manifest import PROGRAM_FILE, TOKENIZER_FILE, Manifest, ModelInfo
from doubleweave.policy import DEFAULT_SIZES, MOST_ROWS
from doubleweave.program_folder import Progress, check_target, made_beside

if TYPE_CHECKING:
    from doubleweave.models.model import Model

SHAPES = ("bounded", "static")


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
    check_target(folder)
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
    with made_beside(folder) as temporary:
        return _compile(model, temporary, quantize, sizes, context, report)


def _compile(
    model: Model, folder: Path, recipe: str, sizes: Static | Dynamic, context: int, report: Progress
) -> Manifest:
    from doubleweave.export import export_llm, owned_modules
    from doubleweave.lower import jobs, lower
    from doubleweave.quantize import quantize
    from doubleweave.split_llm import default_policy, split_llm

    report("exporting the graph", 0, 1)
    most = most_rows(sizes)
    graph = export_llm(model.module, most)
    torch_split = split_llm(
        graph,
        owned_modules(model.module),
        default_policy(sizes),
        last_row=frozenset({"lm_head"}),
        max_context=context,
        backend="xnnpack",
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
        name=model.name,
        model=ModelInfo(
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
        state_sha256="",
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
        if not 1 <= size <= MOST_ROWS:
            raise PolicyError(f"chunk: found {size}, expected 1 to {MOST_ROWS} tokens")
    if shape == "bounded":
        return rows(1, max(chunk, default=max(DEFAULT_SIZES)))
    return Static(tuple(sorted(set(chunk or DEFAULT_SIZES))))


def _load(source: str | Path) -> Model:
    try:
        from doubleweave.models import load
    except ImportError as error:
        raise SourceError(
            f"compiling needs {error.name}, which is not installed; run: pip install 'doubleweave[compile]'"
        ) from error
    return load(source)
