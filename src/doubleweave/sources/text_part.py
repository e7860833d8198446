"""The text model inside one that also sees or hears: its class, its config and its tensors under its own names.

What is not its own (towers, projectors) is left in the files. Knows nothing of formats: it renames tensors.
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from doubleweave.errors import SourceError
from doubleweave.sources.saved_tensors import RenamedTensors
from doubleweave.sources.tensor_files import TensorFiles


def text_part_of(config: Any) -> Any | None:
    """The config of the text model that is loaded by itself, None for a model that is one as a whole.

    transformers' own causal class of a model is taken where it has one that makes no towers.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    inner = config.get_text_config(decoder=True)
    whole = known[type(config)].__name__ if type(config) in known else ""
    if inner is config or whole.endswith("ForCausalLM") or type(inner) not in known:
        return None
    return deepcopy(inner)


def kinds_of_tokens(whole: Any) -> str:
    """The class and the argument by which the model of the config `whole` is told which kind each token is of, "" where
    it is not told: such models let the tokens of an image see each other, or give them other positions."""
    import transformers

    for name in getattr(whole, "architectures", None) or ():
        kind = getattr(transformers, name, None)
        known = () if kind is None else inspect.signature(kind.forward).parameters
        if found := next((one for one in known if one.endswith("token_type_ids")), ""):
            return f"{name} takes {found}"
    return ""


class TextTensors(RenamedTensors):
    """The tensors of `files` that the text model of `config` has, under the names that its class gives them.

    Ties the head to the embedding in `config` where the files have no head and `whole`, the config of all parts, or
    `config` says that they are tied. Raises SourceError where no embedding is found.
    """

    is_plain = False

    def __init__(self, path: Path, files: TensorFiles, config: Any, whole: Any) -> None:
        from transformers import AutoModelForCausalLM

        auto: Any = AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(config)
        body = f"{model.base_model_prefix}."
        embedding = model.get_input_embeddings()
        first = next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)
        inner = first.removeprefix(body)
        before = [name.removesuffix(inner) for name in files if f".{name}".endswith(f".{inner}")]
        if not before:
            raise SourceError(
                f"{path}: none of its tensors is the embedding of its text model ({config.model_type}, {inner}); "
                "fetch the files again, or correct config.json"
            )
        wanted = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        # A tower may have an embedding of the same name.
        prefix = max(before, key=lambda one: sum(one + name.removeprefix(body) in files for name in wanted))
        saved = {body + name.removeprefix(prefix): name for name in files if name.startswith(prefix)}
        for name in wanted:
            if not name.startswith(body) and (found := _nearest(name, prefix, files)):
                saved[name] = found
        output = model.get_output_embeddings()
        head = next((f"{name}.weight" for name, module in model.named_modules() if module is output), "")
        tied = any(getattr(one, "tie_word_embeddings", False) for one in (config, whole))
        config.tie_word_embeddings = tied and head not in saved
        super().__init__(files, saved)


def _nearest(name: str, prefix: str, files: TensorFiles) -> str | None:
    """The tensor of this name that stands nearest to those with the prefix."""
    found = [saved for saved in files if f".{saved}".endswith(f".{name}")]
    return max(found, key=lambda saved: _common(saved, prefix), default=None)


def _common(one: str, other: str) -> int:
    """How many parts both begin with."""
    parts = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], parts))
