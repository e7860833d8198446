"""A tiny Llama as Meta's reference code and llama2.c run it (rotary pairs side by side, as complex numbers), with
its params.json and tokenizers: what loading a checkpoint is held against.

The rules are those of llama-models (meta-llama/llama-models, models/llama3/model.py).
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ESSAY = Path(__file__).parent / "data" / "essay.txt"
PARAMS = {
    "dim": 64,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "max_seq_len": 256,
    "vocab_size": 400,
}
HIDDEN_DIM = 192  # two thirds of four times dim, rounded up to multiple_of


def state_dict(params: dict[str, Any] = PARAMS, hidden_dim: int = HIDDEN_DIM) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    dim, kv_dim = params["dim"], params["dim"] // params["n_heads"] * params["n_kv_heads"]

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    state = {
        "tok_embeddings.weight": weight(params["vocab_size"], dim),
        "norm.weight": weight(dim) + 1,
        "output.weight": weight(params["vocab_size"], dim),
    }
    for n in range(params["n_layers"]):
        state |= {
            f"layers.{n}.attention.wq.weight": weight(dim, dim),
            f"layers.{n}.attention.wk.weight": weight(kv_dim, dim),
            f"layers.{n}.attention.wv.weight": weight(kv_dim, dim),
            f"layers.{n}.attention.wo.weight": weight(dim, dim),
            f"layers.{n}.feed_forward.w1.weight": weight(hidden_dim, dim),
            f"layers.{n}.feed_forward.w2.weight": weight(dim, hidden_dim),
            f"layers.{n}.feed_forward.w3.weight": weight(hidden_dim, dim),
            f"layers.{n}.attention_norm.weight": weight(dim) + 1,
            f"layers.{n}.ffn_norm.weight": weight(dim) + 1,
        }
    return state


def logits(state: dict[str, Tensor], ids: list[int], params: dict[str, Any] = PARAMS) -> Tensor:
    """Of every token, float32 [T, vocab]."""
    heads, kv_heads = params["n_heads"], params["n_kv_heads"]
    width, length = params["dim"] // heads, len(ids)
    theta = params.get("rope_theta", 10000.0)
    frequencies = theta ** (-torch.arange(0, width, 2).float() / width)
    if params.get("use_scaled_rope"):
        frequencies = _scaled(frequencies, params["rope_scale_factor"])
    turns = torch.polar(torch.ones(1), torch.outer(torch.arange(length).float(), frequencies))[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * state[name]

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(-2)

    x = state["tok_embeddings.weight"][ids]
    hidden = torch.full((length, length), float("-inf")).triu(1)
    for n in range(params["n_layers"]):
        of = f"layers.{n}."
        y = norm(x, of + "attention_norm.weight")
        q, k, v = (
            (y @ state[f"{of}attention.{name}.weight"].T).view(length, count, width)
            for name, count in (("wq", heads), ("wk", kv_heads), ("wv", kv_heads))
        )
        q, k = turned(q), turned(k)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("qhw,khw->hqk", q, k) / width**0.5 + hidden
        attended = torch.einsum("hqk,khw->qhw", scores.softmax(-1), v).reshape(length, -1)
        x = x + attended @ state[of + "attention.wo.weight"].T
        y = norm(x, of + "ffn_norm.weight")
        gate = torch.nn.functional.silu(y @ state[of + "feed_forward.w1.weight"].T)
        x = x + (gate * (y @ state[of + "feed_forward.w3.weight"].T)) @ state[of + "feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ state.get("output.weight", state["tok_embeddings.weight"]).T


def _scaled(frequencies: Tensor, factor: float) -> Tensor:
    """Llama 3.1's: long waves are slowed down, those between 2,048 and 8,192 tokens in part."""
    low, high, original = 1.0, 4.0, 8192
    found = []
    for frequency in frequencies.tolist():
        wave = 2 * torch.pi / frequency
        smooth = (original / wave - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        found.append((1 - smooth) * frequency / factor + smooth * frequency)
    return torch.tensor(found)


def greedy(
    state: dict[str, Tensor], ids: list[int], count: int, params: dict[str, Any] = PARAMS
) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        found.append(int(logits(state, ids + found, params)[-1].argmax()))
    return found


def save(folder: Path, checkpoint: Any, params: dict[str, Any] = PARAMS, name: str = "stories.pt") -> Path:
    """Write the checkpoint and params.json; returns the checkpoint's path."""
    torch.save(checkpoint, folder / name)
    (folder / "params.json").write_text(json.dumps(params))
    return folder / name


def save_sentencepiece(path: Path, vocab_size: int = 400, **options: Any) -> Path:
    """Train a SentencePiece model as Llama 2's was: BPE, bytes for what is unknown, no normalization."""
    import sentencepiece

    given = {
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        **options,
    }
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(ESSAY.read_text().splitlines()),
            model_writer=file,
            vocab_size=vocab_size,
            minloglevel=2,
            **given,
        )
    return path


def save_tiktoken(path: Path, num_ranks: int) -> Path:
    """Train byte-pair ranks on the essay and write them as a tiktoken list."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=num_ranks, initial_alphabet=sorted(byte_of), show_progress=False)
    trained.train_from_iterator(ESSAY.read_text().splitlines(), trainer)
    vocab = trained.get_vocab()
    lines = [
        base64.b64encode(bytes(byte_of[letter] for letter in token)) + b" %d" % rank
        for token, rank in sorted(vocab.items(), key=lambda item: item[1])
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path
