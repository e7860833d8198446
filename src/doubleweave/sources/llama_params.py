"""params.json of a Llama checkpoint in Meta's layout, and the tensors that a checkpoint of these parameters has."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doubleweave.errors import SourceError

_ROPE_THETA_3 = 500000.0  # of Llama 3; Llama 1 and 2 have 10,000
Shapes = Mapping[str, tuple[int, ...]]
# The tensors of a layer: transformers' name, and the sizes, which are attributes of LlamaParams.
LAYER: dict[str, tuple[str, ...]] = {
    "attention.wq.weight": ("self_attn.q_proj.weight", "dim", "dim"),
    "attention.wk.weight": ("self_attn.k_proj.weight", "kv_dim", "dim"),
    "attention.wv.weight": ("self_attn.v_proj.weight", "kv_dim", "dim"),
    "attention.wo.weight": ("self_attn.o_proj.weight", "dim", "dim"),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", "hidden_dim", "dim"),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", "dim", "hidden_dim"),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", "hidden_dim", "dim"),
    "attention_norm.weight": ("input_layernorm.weight", "dim"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "dim"),
}


@dataclass(frozen=True)
class LlamaParams:
    """The parameters, with the defaults of Meta's reference code; `rope_scaling` in transformers' words."""

    path: Path
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    hidden_dim: int
    norm_eps: float
    rope_theta: float
    max_seq_len: int
    rope_scaling: dict[str, Any] | None

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim

    def shapes(self) -> Shapes:
        """The tensors of a checkpoint, by name; without output.weight the output layer is the embedding."""
        of_layer = {name: tuple(getattr(self, size) for size in sizes) for name, (_, *sizes) in LAYER.items()}
        return {
            "tok_embeddings.weight": (self.vocab_size, self.dim),
            "norm.weight": (self.dim,),
            "output.weight": (self.vocab_size, self.dim),
            **{f"layers.{n}.{name}": shape for n in range(self.n_layers) for name, shape in of_layer.items()},
        }


def read_params(path: Path, found: Shapes, known: Mapping[str, Any], *, is_tied: bool) -> LlamaParams:
    """Read the file; a missing number comes from `known`, the parameters in the checkpoint itself, then from defaults.

    The defaults of sizes are those of the tensors `found`. `is_tied`: the output layer is the embedding. Raises
    SourceError for a missing file, a missing parameter, or a value out of range.
    """
    given = _Given(path, known)
    dim, n_heads = given.whole("dim"), given.whole("n_heads")
    n_kv_heads = given.whole("n_kv_heads", n_heads)
    for name, whole, part in (("n_heads", dim, n_heads), ("n_kv_heads", n_heads, n_kv_heads)):
        if whole % part:
            raise SourceError(f"{path}: {name} is {part}, expected a divisor of {whole}")
    if dim // n_heads % 2:
        raise SourceError(
            f"{path}: dim {dim} over n_heads {n_heads} is {dim // n_heads}, expected an even number"
        )
    rows = found["tok_embeddings.weight"][0]
    return LlamaParams(
        path,
        dim,
        given.whole("n_layers"),
        n_heads,
        n_kv_heads,
        rows if given.values.get("vocab_size") == -1 else given.whole("vocab_size", rows),
        _hidden_dim(given, dim, found),
        given.number("norm_eps", 1e-5),
        given.number("rope_theta", 10000.0),
        given.whole("max_seq_len", _trained_context(given)),
        _rope_scaling(given, is_tied),
    )


class _Given:
    """The file's numbers, checked; a missing number or null has its default."""

    def __init__(self, path: Path, known: Mapping[str, Any]) -> None:
        self.path = path
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise SourceError(f"{path}: no such file: name the checkpoint's params.json (-p)") from None
        except (OSError, ValueError, RecursionError) as error:
            raise SourceError(f"{path}: cannot be read as JSON ({error})") from None
        if not isinstance(values, dict):
            raise SourceError(
                f"{path}: found a JSON {type(values).__name__}, expected an object with dim, n_layers and n_heads"
            )
        # A null, as llama2.c writes it, is a missing number.
        self.values = {
            name: value for given in (known, values) for name, value in given.items() if value is not None
        }

    def number(self, name: str, default: float) -> float:
        value = self.values.get(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise SourceError(f"{self.path}: {name} is {value!r}, expected a number above 0")
        return float(value)

    def whole(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name, default)
        if value is None:
            raise SourceError(f"{self.path}: has no {name}; expected dim, n_layers and n_heads at least")
        if type(value) is not int or value <= 0:
            raise SourceError(f"{self.path}: {name} is {value!r}, expected a whole number above 0")
        return value


def _hidden_dim(given: _Given, dim: int, found: Shapes) -> int:
    """The given width, or the width by the rule of Meta's reference code, or that of the checkpoint's tensors."""
    from_tensors = found.get("layers.0.feed_forward.w1.weight", (dim,))[0]
    if "hidden_dim" in given.values or "multiple_of" not in given.values:
        return given.whole("hidden_dim", from_tensors)
    multiple = given.whole("multiple_of")
    # FeedForward in Meta's model.py: two thirds of 4 * dim, times the multiplier, up to the next multiple.
    hidden = int(int(8 * dim / 3) * given.number("ffn_dim_multiplier", 1.0))
    return -(-hidden // multiple) * multiple


def _trained_context(given: _Given) -> int:
    """The trained context of the released models of these parameters, which Meta's own files leave out."""
    if given.values.get("use_scaled_rope"):
        return 131072  # Llama 3.1 and 3.2
    if given.number("rope_theta", 10000.0) == _ROPE_THETA_3:
        return 8192
    return 4096 if given.number("norm_eps", 1e-5) == 1e-5 else 2048  # Llama 2, and 1


def _rope_scaling(given: _Given, is_tied: bool) -> dict[str, Any] | None:
    """Meta's code has a factor for each release: 8 for Llama 3.1, 32 for the small models of 3.2, which are tied."""
    if not given.values.get("use_scaled_rope"):
        return None
    return {
        "rope_type": "llama3",
        "factor": given.number("rope_scale_factor", 32.0 if is_tied else 8.0),
        "low_freq_factor": 1.0,
        "high_freq_factor": given.number("high_freq_factor", 4.0),
        "original_max_position_embeddings": 8192,
    }
