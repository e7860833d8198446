"""Whether every weight of a loaded model came from its files: what transformers says it did not find, by rule.

Nothing is ever left as it was initialised. Knows nothing of tokenizers or programs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from doubleweave.errors import SourceError
from doubleweave.sources.tensor_files import listed

# Tensors that follow from the config, which older versions saved: tables of positions, masks, and state of training.
_TABLES = re.compile(
    r"(^|\.)((original_)?inv_freq|(cos|sin)_cache(d)?|freqs_c(is|os)|freqs_sin|position_ids|masked_bias|"
    r"_extra_state|num_batches_tracked|total_(ops|params))$"
)
_MASK = re.compile(r"(^|\.)(attn|attention|self_attn)\.bias$")
# Layers that draft tokens ahead of the model (multi-token prediction).
_DRAFT = re.compile(r"(^|\.)(mtp|nextn|eh_proj)(\.|_)")
_LAYER = re.compile(r"(^|\.)(?:layers|h|blocks)\.(\d+)\.")
# As safetensors and as torch write it.
_INTEGER = re.compile(r"[IU]\d+|BOOL|torch\.(u?int\d+|bool)")
# What a model for text leaves of one that sees and hears.
_SENSES = re.compile(
    r"(^|\.)(vision|visual|image|audio|speech|multi_?modal|mm_|embed_vision|embed_audio|talker|token2wav|code2wav)\w*\."
)


def check_loaded(
    path: Path, info: Mapping[str, Any], config: Any, shape_of: Callable[[str], tuple[int, ...]]
) -> None:
    """Raise SourceError where weights are missing, left over or of another shape.

    info: transformers' loading info. shape_of: the shape of a tensor in the files, () for another name.
    """
    if mismatched := info.get("mismatched_keys"):
        found = [f"{name} {_shape(saved)} (expected {_shape(wanted)})" for name, saved, wanted in mismatched]
        raise SourceError(
            f"{path}: {_count(found, 'weight has', 'weights have')} another shape than config.json says: "
            f"{listed(found)}; put the config and the weights of one model there"
        )
    if missing := info.get("missing_keys"):
        raise SourceError(
            f"{path}: {_count(missing, 'weight is', 'weights are')} in none of its files: {listed(missing)}; fetch "
            "the files again, or correct config.json"
        )
    left = [name for name in info.get("unexpected_keys", ()) if not is_harmless(name, shape_of(name), config)]
    if left:
        raise SourceError(
            f"{path}: {_count(left, 'tensor', 'tensors')} in its files belong to no weight of "
            f"{getattr(config, 'model_type', 'the model')}: {listed(left)}; correct config.json, or take them out of "
            "the files"
        )
    if errors := info.get("error_msgs"):
        raise SourceError(f"{path}: the weights cannot be read ({str(next(iter(errors)))[:200]})")


def check_dtypes(path: Path, module: Any, dtypes: Mapping[str, str]) -> None:
    """Raise SourceError where a weight of numbers with fractions is saved in integers: they mean nothing by themselves.

    `dtypes`: by the name of a tensor in the files.
    """
    wrong = [
        f"{name} ({dtypes[name].removeprefix('torch.')})"
        for name, weight in module.named_parameters()
        if name in dtypes and weight.is_floating_point() and _INTEGER.fullmatch(dtypes[name])
    ]
    if wrong:
        raise SourceError(
            f"{path}: {_count(wrong, 'weight is', 'weights are')} saved in integers, and config.json does not say how "
            f"they were quantized: {listed(wrong)}; expected bfloat16, float16 or float32, or a quantization_config"
        )


def is_harmless(name: str, shape: tuple[int, ...], config: Any) -> bool:
    """Whether a tensor that no weight is made of can be left out: it changes nothing that the model computes."""
    if _TABLES.search(name) or _DRAFT.search(name):
        return True
    # The causal mask that GPT-2's attention kept as a buffer.
    if _MASK.search(name) and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]:
        return True
    text = config.get_text_config(decoder=True)
    layer = _LAYER.search(name)
    if layer and getattr(text, "num_nextn_predict_layers", None):
        return int(layer[2]) >= int(text.num_hidden_layers)
    return _is_of_several(config) and bool(_SENSES.search(name))


def _is_of_several(config: Any) -> bool:
    """Whether the folder's model has parts besides text."""
    senses = ("vision_config", "audio_config", "speech_config", "visual", "image_config", "talker_config")
    return any(getattr(config, name, None) is not None for name in senses)


def _count(names: Iterable[str], one: str, several: str) -> str:
    number = len(list(names))
    return f"{number} {one if number == 1 else several}"


def _shape(found: Any) -> str:
    return " x ".join(map(str, found)) if len(found) else "scalar"
