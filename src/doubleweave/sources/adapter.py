"""An adapter (LoRA and its kin) merged into a model by peft, and held against the model before it was merged.

Knows nothing of the base model's files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from doubleweave.errors import SourceError, first_line
from doubleweave.sources.folder_config import read_json
from doubleweave.sources.merged_weights import copy_of, file_weights_of, merge_when_read
from doubleweave.sources.tensor_files import listed

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# They put tokens before a prompt, which no weight can stand for.
_PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT")
_TOLERANCE = 1e-3  # of the largest logit, between the merged model and the adapter beside the model


def check_beside(path: Path) -> None:
    """Raise SourceError for a folder whose model has an adapter beside it, which nobody said is to be merged."""
    beside = next((name for name in (CONFIG, *_WEIGHTS) if (path / name).exists()), None)
    if beside is not None:
        raise SourceError(
            f"{path}: found a model with an adapter beside it ({beside}); give --adapter {path} to merge it, or "
            "remove the adapter's files to compile the model without it"
        )


def check_alone(path: Path) -> None:
    """Raise SourceError for a folder that has an adapter and no model."""
    if (path / CONFIG).exists():
        base = read_json(path / CONFIG).get("base_model_name_or_path") or "the model that it was trained on"
        raise SourceError(
            f"{path}: has no config.json; it is an adapter of {base}, without that model: give the model's folder as "
            f"SOURCE, and --adapter {path}"
        )


def check_adapter(adapter: Path) -> None:
    """Raise SourceError for a folder that is no adapter, or one that cannot be merged."""
    if not (adapter / CONFIG).exists():
        raise SourceError(f"adapter: found no {CONFIG} in {adapter}, expected the folder of an adapter")
    kind = str(read_json(adapter / CONFIG).get("peft_type"))
    if kind in _PROMPTS:
        raise SourceError(
            f"adapter: {adapter} is of the type {kind}, which cannot be merged into weights; use a LoRA adapter"
        )
    if not any((adapter / name).exists() for name in _WEIGHTS):
        raise SourceError(f"adapter: found none of {', '.join(_WEIGHTS)} in {adapter}; fetch them again")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise SourceError(
            "adapter: merging one needs peft, which is not installed; run: pip install 'doubleweave[adapter]'"
        ) from error


def merged(module: Any, adapter: Path) -> tuple[Any, Callable[[], str]]:
    """`module` with the adapter in its weights, and an audit of the merging (a sentence, or "").

    Raises SourceError for an adapter of another model, or one that peft cannot read.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    _untie(module)
    try:
        beside = PeftModel.from_pretrained(module, str(adapter), is_trainable=False).eval().float()
    except Exception as error:
        reason = first_line(error, "")
        raise SourceError(
            f"adapter: peft cannot put {adapter} on the model ({type(error).__name__}: {reason}); give an adapter of "
            "this model"
        ) from error
    _check_names(beside, adapter)
    for layer in beside.modules():
        if isinstance(layer, BaseTunerLayer) and file_weights_of(layer):
            merge_when_read(layer)
    ids = torch.arange(min(8, module.get_input_embeddings().weight.shape[0]))[None]
    wanted = _logits(beside, ids)
    try:
        whole = beside.merge_and_unload(safe_merge=True)
    except Exception as error:
        reason = first_line(error, "")
        raise SourceError(
            f"adapter: peft cannot merge {adapter} ({type(error).__name__}: {reason}); merge it where it was trained"
        ) from error
    off = float((_logits(whole, ids) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9))

    def audit() -> str:
        return (
            "" if off <= _TOLERANCE else f"the merged adapter changes the logits by {off:.1e} of the largest"
        )

    if message := audit():
        raise SourceError(f"adapter: {adapter} cannot be merged: {message}; merge it where it was trained")
    return whole.eval(), audit


def merges_by_layer(adapter: Path) -> bool:
    """Whether all that the adapter has is merged layer by layer, so that the layers' weights can stay in their files.

    Not so embeddings or heads of its own, which take the place of the model's, and experts, which are no layers.
    """
    from peft.utils.save_and_load import load_peft_weights

    config = read_json(adapter / CONFIG)
    if config.get("peft_type") != "LORA" or config.get("target_parameters"):
        return False
    try:
        return all(".lora_" in name for name in load_peft_weights(str(adapter), device="cpu"))
    except Exception:  # what is wrong is said when it is merged
        return False


def _untie(module: Any) -> None:
    """Give the head weights of its own, where it shares the embedding's: an adapter may change one of the two."""
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    if head is not None and getattr(head, "weight", None) is embedding.weight:
        head.weight = nn.Parameter(copy_of(head.weight.detach()), requires_grad=False)
        module.config.tie_word_embeddings = False
        module.config.get_text_config(decoder=True).tie_word_embeddings = False


def _check_names(beside: Any, adapter: Path) -> None:
    """Raise SourceError where tensors of the adapter's file have no place in the model, or places have no tensor."""
    from peft import get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    saved = set(load_peft_weights(str(adapter), device="cpu"))
    placed = set(get_peft_model_state_dict(beside, save_embedding_layers=False))
    # Embeddings may be saved with an adapter that leaves them as they are.
    left = {name for name in saved - placed if "embed" not in name and "lm_head" not in name}
    if left:
        raise SourceError(
            f"adapter: {len(left)} of the {len(saved)} tensors in {adapter} have no place in the model: {listed(left)}"
            "; give an adapter of this model"
        )
    if lacking := placed - saved:
        raise SourceError(
            f"adapter: {len(lacking)} tensors that {CONFIG} promises are not in {adapter}: {listed(lacking)}; fetch "
            "its files again"
        )


def _logits(module: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module(input_ids=ids, use_cache=False).logits
        return found
