"""Compile a language model into a program directory: load, export, split, quantize, lower, write.

Nothing half-written is left behind: the directory is made beside its place and renamed into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from doubleweave.compiler.backends import find_backend, llm_backends, option_owners, own_options
from doubleweave.compiler.backends.backend import Backend, Options
from doubleweave.compiler.free_memory import give_back_free_memory
from doubleweave.compiler.less_overhead import with_less_overhead
from doubleweave.compiler.memory_limit import naming_memory
from doubleweave.compiler.pipeline_llm import splits_of
from doubleweave.compiler.policy import DEFAULT_BACKEND, DEFAULT_SIZES, MOST_ROWS, TABLE_FORMATS
from doubleweave.compiler.program_folder import Progress, check_target, made_beside
from doubleweave.compiler.recipe_file import NAME, beside_given, read_recipe
from doubleweave.entries.encoders import Encoder, check_encoders, names_problem, split_encoders, with_encoders
from doubleweave.entries.llm_manifest import write_beside
from doubleweave.errors import PolicyError, SourceError
from doubleweave.ir.cache_format import CACHE_FORMATS
from doubleweave.ir.manifest import PROGRAM_FILE, Manifest
from doubleweave.ir.split import FixedSizes, SizeRanges, rows
from doubleweave.sources import OPTIONS as SOURCE_OPTIONS
from doubleweave.sources import load

if TYPE_CHECKING:
    from doubleweave.sources.model import Model

SHAPES = ("bounded", "static")
ATTENTIONS = ("dynamic", "static")


def compile_llm(
    source: str | Path | Model,
    out: str | Path,
    *,
    backend: str = DEFAULT_BACKEND,
    quantize: str | None = None,
    recipe: str | Path | None = None,
    shape: str | None = None,
    chunk: Sequence[int] = (),
    max_context: int | None = None,
    attention: str = "dynamic",
    cache: str | None = None,
    table: str | None = None,
    encoders: Mapping[str, Encoder] | None = None,
    check: bool | Literal["whole"] = True,
    score: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Manifest:
    """Compile `source` (alias, GGUF file, Hugging Face folder, Llama checkpoint, or a loaded Model) into the folder
    `out`.

    backend: "xnnpack" (any CPU), "qnn" (Qualcomm's NPUs) or "openvino" (Intel's chips). quantize: a recipe of the
    backend, by default its first: "8da8w", "8da4w" or "none" for xnnpack; "16a8w", "16a4w_block", "16a4w" or "8a8w" for
    qnn; "8w" or "none" for openvino. recipe: a TOML file with options that belong together, such as what single linears
    are kept in (compiler/recipe_file.py); what is given beside it counts before it.
    shape: "bounded" (linears take 1 to max(chunk) rows, default 128) or "static" (one method for each size in `chunk`,
    default 1, 32, 128; XNNPACK stands in for the NPU); NPUs' backends are always static.
    attention: "dynamic" (over a cache that grows, on the CPU) or "static" (inlined, over a cache of `max_context`
    tokens, which must be given: the all-static way).
    cache: what keys and values are kept in: "float32", "bfloat16", "float16" or "int8" (a scale for each head of a
    row); by default bfloat16 for quantized programs of the xnnpack backend and float32 for others. Keys and values
    that a model's own operators read stay float32.

    table: what rows of embeddings are kept in where the recipe rounds weights: "int8" (a scale a row; default: a table
    that is tied to the head takes no room), "int4" (a scale and an offset for each 32 numbers) or "bfloat16".

    options: the backend's own and the source's. xnnpack: `keep`, what linears are kept in ("int4", "int8", "float32")
    by role, segment or pattern. qnn: `soc`, the Snapdragon to compile for; `calibrate`, the text that
    scales are found on; `keep`, other recipes ("cpu" for none) for segments by pattern; `emulate`, for the emulator on
    this machine in place of the chip; `attention_device` "npu", which asks QNN for dynamic attention. openvino:
    `device` "CPU" (default), "GPU" or "NPU". A Llama checkpoint: `params` and `tokenizer`, its other files (default:
    params.json and tokenizer.model beside it). A Hugging Face folder: `adapter`, the folder of a LoRA adapter to merge;
    `trust_remote_code`, which lets the folder's own Python code run (it never runs otherwise).

    encoders: modules by name that make rows of embeddings for the model, from an image or anything else, in the same
    program: `program.methods[name]`, and `Session.append_embeddings` takes their result (entries/encoders.py).

    check: run the program against the source before it is written (check/language_model.py). Of a model of more than 2
    GiB of float32 weights the first layers are run, as many as have every kind of layer, and each segment by itself;
    "whole" runs all layers, which takes several times as long. False leaves the check out. The manifest says which.

    score: run the program over the package's texts, 18,000 tokens of prose, documentation, code, conversations and
    German, against float32, and keep perplexity, divergence and equal next tokens in the manifest (`Manifest.scores`).

    Raises PolicyError, SourceError, SplitError, LowerError, CheckError or BackendError; `out` is then as it was before.
    """
    report = progress or (lambda what, done, total: None)
    recipe_name = ""
    if recipe is not None:
        found = read_recipe(Path(recipe))
        recipe_name = found[NAME]
        given = {"quantize": quantize, "table": table, "cache": cache, **options}
        options = beside_given(found, given)
        quantize, table, cache = (options.pop(key, None) for key in ("quantize", "table", "cache"))
    if check not in (True, False, "whole"):
        raise PolicyError(f"check: found {check!r}, expected True, False or 'whole'")
    chosen = find_backend(backend, llm_backends())
    rounded = _recipe(chosen, quantize)
    _check_names(options)
    of_source = {name: options.pop(name) for name in SOURCE_OPTIONS if name in options}
    shape = _shape(chosen, attention, shape, max_context)
    own_given = own_options(chosen, attention, options)
    sizes = _sizes(shape, chunk)
    folder = Path(out)
    # Mistakes are found before torch is imported and the model loaded, which takes long.
    check_target(folder)
    _check_installed()
    if problem := names_problem(encoders):
        raise PolicyError(problem)
    own = chosen.check(rounded, attention, own_given)
    _check_cache(attention, cache)
    _check_table(rounded, table)
    from doubleweave.sources.model import Model  # torch is imported from here on

    if isinstance(source, Model) and (
        name := next((name for name, value in of_source.items() if value), None)
    ):
        raise PolicyError(
            f"{name}: is an option of a source that is loaded here; leave it out for a loaded Model"
        )
    with naming_memory(report) as told:
        told("loading the model", 0, 1)
        if isinstance(source, Model):
            model = source
        else:
            model = load(source, **of_source)
            give_back_free_memory()
        model = _as_decoder(model, backend, attention)
        if score and (problem := _no_scores(model)):
            raise PolicyError(f"score: {model.name} {problem}; leave it out")
        if table == "int4" and getattr(model.module.config, "tie_word_embeddings", False):
            raise PolicyError(
                f"table: found 'int4', but the table of {model.name} is its head's weights too, which are in the "
                "program once, as int8; leave it out"
            )
        context = _context(model, max_context)
        with made_beside(folder) as temporary:
            chosen_options = Options(
                chosen, rounded, sizes, context, attention, cache, own, table, recipe_name
            )
            return _compile(model, encoders or {}, temporary, chosen_options, check, score, told)


def _check_names(options: Iterable[str]) -> None:
    known = (*option_owners(), *SOURCE_OPTIONS)
    if unknown := next((name for name in options if name not in known), None):
        raise PolicyError(
            f"{unknown}: is no option of a backend or a source; expected one of {', '.join(known)}"
        )


def _recipe(backend: Backend, quantize: str | None) -> str:
    """The recipe, by default the backend's first; PolicyError where the backend does not have it."""
    recipe = next(iter(backend.recipes)) if quantize is None else quantize
    if recipe not in backend.recipes:
        raise PolicyError(
            f"quantize: found {recipe!r}, expected one of {', '.join(backend.recipes)} for {backend.name}"
        )
    return recipe


def _check_table(recipe: str, table: str | None) -> None:
    if table is None:
        return
    if table not in TABLE_FORMATS:
        raise PolicyError(f"table: found {table!r}, expected one of {', '.join(TABLE_FORMATS)}")
    if recipe == "none":
        raise PolicyError(
            f"table: found {table!r}, but recipe none keeps every weight as it is; leave it out"
        )


def _check_cache(attention: str, cache: str | None) -> None:
    if cache is not None and cache not in CACHE_FORMATS:
        raise PolicyError(f"cache: found {cache!r}, expected one of {', '.join(CACHE_FORMATS)}")
    if cache not in (None, "float32") and attention != "dynamic":
        raise PolicyError(
            f"cache: found {cache!r}, but static attention computes over float32; use float32 or leave it out"
        )


def _shape(backend: Backend, attention: str, shape: str | None, max_context: int | None) -> str:
    """The shape, or its default; PolicyError where backend, attention, shape and context do not go together."""
    if shape == "bounded" and backend.takes_fixed_sizes_only:
        raise PolicyError(
            f"shape: found 'bounded', but {backend.name} takes fixed sizes only; use static or leave it out"
        )
    if attention not in ATTENTIONS:
        raise PolicyError(f"attention: found {attention!r}, expected one of {', '.join(ATTENTIONS)}")
    if attention == "dynamic":
        return shape or ("static" if backend.takes_fixed_sizes_only else "bounded")
    if shape == "bounded":
        raise PolicyError(
            "shape: found 'bounded', but static attention takes fixed sizes; use static or leave it out"
        )
    if max_context is None:
        raise PolicyError(
            "max-context: static attention reads the whole cache in every run; say how many tokens it has, such as 1024"
        )
    return "static"


def _context(model: Model, max_context: int | None) -> int:
    """The longest context; PolicyError where it is more than the model's, or neither is known."""
    context = model.max_context if max_context is None else max_context
    if context is None:
        raise PolicyError(
            f"max-context: found none, and the config of {model.name} does not say how many tokens it was trained for; "
            "say how many, such as 2048"
        )
    if context < 1 or (model.max_context is not None and context > model.max_context):
        most = "at least 1" if model.max_context is None else f"1 to {model.max_context}"
        raise PolicyError(f"max-context: found {context}, expected {most} (what the model was trained for)")
    return context


def _as_decoder(model: Model, backend: str, attention: str) -> Model:
    """The model, or the decoder of one with an encoder; PolicyError where that does not go with the options."""
    from doubleweave.sources.encoder_decoder import Decoder, is_encoder_decoder

    if not is_encoder_decoder(model.module):
        return model
    if backend != DEFAULT_BACKEND or attention != "dynamic":
        raise PolicyError(
            f"{model.name} has an encoder, whose rows its decoder attends to: expected backend {DEFAULT_BACKEND} and "
            "dynamic attention"
        )
    return replace(model, module=Decoder(model.module, model.name))


def _no_scores(model: Model) -> str:
    """Why texts cannot be scored, "" where they can."""
    from doubleweave.sources.encoder_decoder import Decoder

    if model.save_tokenizer is None:
        return "has no tokenizer that can be read"
    return "has an encoder, whose input no text is" if isinstance(model.module, Decoder) else ""


def _check_installed() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise SourceError(
            f"compiling needs {error.name}, which is not installed; run: pip install 'doubleweave[compile]'"
        ) from error


@with_less_overhead
def _compile(
    model: Model,
    encoders: Mapping[str, Encoder],
    folder: Path,
    options: Options,
    check: bool | Literal["whole"],
    score: bool,
    report: Progress,
) -> Manifest:
    from doubleweave.compiler.lower.lower import lower
    from doubleweave.entries.check_compiled import check_compiled
    from doubleweave.entries.score_compiled import score_compiled

    beside = split_encoders(encoders, report)
    splits = splits_of(model, options, folder, report)
    lowered = lower(with_encoders(model, splits, beside), folder / PROGRAM_FILE, report)
    manifest = write_beside(model, options, splits, lowered, folder)
    check_encoders(encoders, folder, manifest, bool(check), report)
    if check:
        whole = check == "whole"
        found = check_compiled(
            model, options, splits, lowered.templates, folder, manifest, report, whole=whole
        )
        manifest = replace(manifest, check=found)
    if score:
        manifest = replace(manifest, scores=score_compiled(splits, folder, manifest, report))
    if check or score:
        manifest.write(folder)
    return manifest


def _sizes(shape: str, chunk: Sequence[int]) -> FixedSizes | SizeRanges:
    if shape not in SHAPES:
        raise PolicyError(f"shape: found {shape!r}, expected one of {', '.join(SHAPES)}")
    for size in chunk:
        if not 1 <= size <= MOST_ROWS:
            raise PolicyError(f"chunk: found {size}, expected 1 to {MOST_ROWS} tokens")
    if shape == "bounded":
        return rows(1, max(chunk, default=max(DEFAULT_SIZES)))
    return FixedSizes(tuple(sorted(set(chunk or DEFAULT_SIZES))))
