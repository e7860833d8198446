"""Compile a language model into a program directory: load, export, split, quantize, lower, write.

Nothing half-written is left behind: the directory is made beside its place and renamed into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from doubleweave.compiler.pipeline_llm import Options, quantized_llm
from doubleweave.compiler.policy import DEFAULT_SIZES, MOST_ROWS
from doubleweave.compiler.program_folder import Progress, check_target, made_beside
from doubleweave.errors import PolicyError, SourceError
from doubleweave.ir.manifest import PROGRAM_FILE, Manifest, ModelInfo
from doubleweave.ir.split import FixedSizes, SizeRanges, rows
from doubleweave.predict.find_profile import find_profile
from doubleweave.predict.run_file import write_run_file

if TYPE_CHECKING:
    from doubleweave.sources.model import Model

SHAPES = ("bounded", "static")
ATTENTIONS = ("dynamic", "static")
DEVICES = ("cpu", "npu")  # of dynamic attention
# The recipes of each backend, its default first; quantize.py and backends/qnn_quantize.py say what they are.
RECIPES = {
    "xnnpack": ("8da8w", "8da4w", "none"),
    "qnn": ("16a8w", "16a4w", "8a8w"),
    "openvino": ("8w", "none"),
}


def compile_llm(
    source: str | Path | Model,
    out: str | Path,
    *,
    backend: str = "xnnpack",
    quantize: str | None = None,
    shape: str | None = None,
    chunk: Sequence[int] = (),
    max_context: int | None = None,
    attention: str = "dynamic",
    attention_device: str = "cpu",
    soc: str | None = None,
    device: str | None = None,
    calibrate: str | Path | None = None,
    keep: Mapping[str, str] | None = None,
    emulate: bool = False,
    params: str | Path | None = None,
    tokenizer: str | Path | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Compile `source` (alias, GGUF file, Hugging Face folder, Llama checkpoint, or a loaded Model) into the folder
    `out`. `params` and `tokenizer` name the other files of a Llama checkpoint (default: params.json and
    tokenizer.model beside it).

    backend: "xnnpack" (any CPU), "qnn" (the NPU of the Snapdragon `soc`) or "openvino" (Intel's; `device` "CPU", the
    default, "GPU" or "NPU", with "8w" (default) or "none" to quantize). quantize: "none", "8da8w" (default) or
    "8da4w" for xnnpack; "16a8w" (default), "16a4w" or "8a8w" for qnn, which calibrates on the text `calibrate`, with
    other recipes ("cpu" for none) for segments by pattern in `keep`; without `emulate` the program is for the chip
    alone, with it for the emulator on this machine. shape: "bounded" (linears take 1 to max(chunk)
    rows, default 128) or "static" (one method for each size in `chunk`, default 1, 32, 128; XNNPACK stands in for the
    NPU); qnn is always static. attention: "dynamic" (over a cache that grows, on the CPU) or "static" (inlined, over a
    cache of `max_context` tokens, which must be given: the all-static way); attention_device "npu" asks QNN for dynamic
    attention. Raises PolicyError, SourceError, SplitError, LowerError or BackendError; `out` is then
    as it was before.
    """
    for_qnn = {"soc": soc, "calibrate": calibrate, "keep": keep, "emulate": emulate}
    recipe, shape = _options(backend, quantize, shape, {"qnn": for_qnn, "openvino": {"device": device}})
    shape = _check_attention(attention, shape, max_context)
    _check_attention_device(attention_device, attention, backend)
    sizes = _sizes(shape or "bounded", chunk)
    report = progress or (lambda what, done, total: None)
    folder = Path(out)
    check_target(folder)
    to_qnn = None
    if backend == "qnn":
        from doubleweave.compiler.backends.qnn.compile import QnnOptions
        from doubleweave.compiler.backends.qnn.lower import check_soc  # torch is imported from here on
        from doubleweave.vendors.qnn_sdk import find_sdk, keep_from_downloading

        find_sdk()  # its errors come before the work
        keep_from_downloading()
        to_qnn = QnnOptions(check_soc(soc or ""), recipe, keep or {}, calibrate, emulate)
    if backend == "openvino":
        from doubleweave.vendors.openvino_sdk import check_device, check_nncf

        device = check_device(device or "CPU")
        if recipe != "none":
            check_nncf()
    from doubleweave.sources.model import Model

    report("loading the model", 0, 1)
    model = source if isinstance(source, Model) else _load(source, params, tokenizer)
    context = model.max_context if max_context is None else max_context
    if not 1 <= context <= model.max_context:
        raise PolicyError(
            f"max-context: found {context}, expected 1 to {model.max_context} (what the model was trained for)"
        )
    with made_beside(folder) as temporary:
        options = Options(recipe, sizes, context, attention, attention_device, to_qnn, device)
        return _compile(model, temporary, options, report)


def _options(
    backend: str,
    quantize: str | None,
    shape: str | None,
    given: Mapping[str, Mapping[str, object]],
) -> tuple[str, str | None]:
    """The recipe and the shape (None: as usual); PolicyError for options that do not go together."""
    if backend not in RECIPES:
        raise PolicyError(f"backend: found {backend!r}, expected one of {', '.join(RECIPES)}")
    recipe = RECIPES[backend][0] if quantize is None else quantize
    if recipe not in RECIPES[backend]:
        raise PolicyError(
            f"quantize: found {recipe!r}, expected one of {', '.join(RECIPES[backend])} for {backend}"
        )
    for other, options in given.items():
        if other != backend and (wrong := [name for name, value in options.items() if value]):
            raise PolicyError(
                f"{wrong[0]}: is an option of the {other} backend; add backend {other} or leave it out"
            )
    if backend == "xnnpack":
        return recipe, shape
    if shape == "bounded":
        raise PolicyError(
            f"shape: found 'bounded', but {backend} takes fixed sizes only; use static or leave it out"
        )
    if backend == "qnn" and not given["qnn"]["soc"]:
        raise PolicyError("soc: qnn compiles for one chip; name it, such as SM8650")
    return recipe, shape or "static"


def _check_attention(attention: str, shape: str | None, max_context: int | None) -> str | None:
    """The shape; PolicyError where attention, shape and context do not go together."""
    if attention not in ATTENTIONS:
        raise PolicyError(f"attention: found {attention!r}, expected one of {', '.join(ATTENTIONS)}")
    if attention == "dynamic":
        return shape
    if shape == "bounded":
        raise PolicyError(
            "shape: found 'bounded', but static attention takes fixed sizes; use static or leave it out"
        )
    if max_context is None:
        raise PolicyError(
            "max-context: static attention reads the whole cache in every run; say how many tokens it has, such as 1024"
        )
    return "static"


def _check_attention_device(device: str, attention: str, backend: str) -> None:
    if device not in DEVICES:
        raise PolicyError(f"attention-device: found {device!r}, expected one of {', '.join(DEVICES)}")
    if device == "npu" and (backend != "qnn" or attention != "dynamic"):
        raise PolicyError(
            f"attention-device: found 'npu' with {attention} attention for {backend}; expected dynamic attention for "
            "qnn (static attention is where the static segments are)"
        )


def _compile(model: Model, folder: Path, options: Options, report: Progress) -> Manifest:
    from doubleweave.compiler.lower.lower import jobs, lower

    torch_split = quantized_llm(model, options, folder, report)
    total = len(jobs(torch_split.split)) + 1
    done = 0
    report("lowering", done, total)

    def step(what: str) -> None:
        nonlocal done
        done += 1
        report(f"lowered {what}" if done < total else what, done, total)

    split, digest = lower(torch_split, folder / PROGRAM_FILE, step)
    manifest = Manifest(
        name=model.name,
        model=ModelInfo(
            model.vocab_size,
            options.max_context,
            model.eos_token_ids,
            model.chat_template,
            model.special_tokens,
            options.recipe,
        ),
        split=split,
        program_sha256=digest,
        program_bytes=(folder / PROGRAM_FILE).stat().st_size,
        state_sha256="",
        made_with={name: version(name) for name in ("doubleweave", "executorch", "torch", "transformers")},
    )
    manifest.write(folder)
    write_run_file(folder, manifest, find_profile(folder, manifest))
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


def _load(source: str | Path, params: str | Path | None, tokenizer: str | Path | None) -> Model:
    try:
        from doubleweave.sources import load
    except ImportError as error:
        raise SourceError(
            f"compiling needs {error.name}, which is not installed; run: pip install 'doubleweave[compile]'"
        ) from error
    return load(source, params=params, tokenizer=tokenizer)
