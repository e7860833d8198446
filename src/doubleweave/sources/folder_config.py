"""What a Hugging Face folder's config says, with an answer for everything that it may leave out.

Knows nothing of weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doubleweave.errors import SourceError

# The names under which configs say how many tokens a model was trained for.
_CONTEXTS = (
    "max_target_positions",
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_seq_length",
    "seq_length",
    "n_ctx",
    "model_max_length",
)
_TRUST = "read that code, then give --trust-remote-code (trust_remote_code=True)"


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file; SourceError for a file that holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise SourceError(
            f"{path.parent}: transformers cannot load it: {path.name} is no JSON ({type(error).__name__}); fetch it "
            "again"
        ) from error
    if not isinstance(found, dict):
        raise SourceError(
            f"{path.parent}: transformers cannot load it: {path.name} is a {type(found).__name__}, expected an object; "
            "fetch it again"
        )
    return found


def check_code(path: Path, described: Mapping[str, Any]) -> None:
    """Raise SourceError for a model that only Python code in its folder can make: it is not run unasked."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    code = described.get("auto_map")
    # A folder may have code for a model that transformers has of its own by now, which is taken instead.
    if code and described.get("model_type") not in known:
        raise SourceError(
            f"{path}: config.json's auto_map wants the folder's own Python code ({_code(code)}), and transformers has "
            f"no model {described.get('model_type')!r} of its own; {_TRUST}, or use a model that transformers has"
        )


def code_of_tokenizer(path: Path) -> str:
    """The code that tokenizer_config.json's auto_map names, "" for none, and what to do about it."""
    file = path / "tokenizer_config.json"
    code = read_json(file).get("auto_map") if file.exists() else None
    if not code:
        return ""
    return f"tokenizer_config.json's auto_map wants the folder's own Python code ({_code(code)}); {_TRUST}"


def max_context_of(config: Any) -> int | None:
    """How many tokens the model was trained for, None where the config does not say."""
    for part in (config.get_text_config(decoder=True), config):
        for name in _CONTEXTS:
            found = getattr(part, name, None)
            if isinstance(found, int) and found > 0:
                return found
    return None


def vocab_size_of(path: Path | str, module: Any) -> int:
    """How many tokens the model knows; SourceError where neither its config nor its embedding says."""
    config = module.config
    for part in (config.get_text_config(decoder=True), config):
        found = getattr(part, "vocab_size", None)
        if isinstance(found, int) and found > 0:
            return found
    rows = getattr(module.get_input_embeddings(), "weight", None)
    if rows is None:
        raise SourceError(f"{path}: config.json has no vocab_size; put the number of tokens there")
    return int(rows.shape[0])


def end_tokens(module: Any, tokenizer: Any | None) -> tuple[int, ...]:
    """The tokens that end a text."""
    # They may name other tokens: a chat model's end of turn is often in one of them alone.
    config = module.config
    eos: list[int] = []
    for part in (
        getattr(module, "generation_config", None),
        config,
        config.get_text_config(decoder=True),
        tokenizer,
    ):
        found = getattr(part, "eos_token_id", None)
        eos += found if isinstance(found, list) else [found] if isinstance(found, int) else []
    return tuple(dict.fromkeys(eos))


def _code(auto_map: Any) -> str:
    names = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    flat = [str(one) for name in names for one in (name if isinstance(name, list) else [name]) if one]
    files = dict.fromkeys(f"{name.rpartition('.')[0].replace('--', ': ')}.py" for name in flat)
    return ", ".join(files)
