"""Load a Llama checkpoint in Meta's layout: a .pt or .pth file, its params.json and its tokenizer.

llama2.c writes the same layout. Tensors get the names, and queries and keys the order of rotary pairs, that
transformers' Llama has.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from doubleweave.errors import SourceError, first_line
from doubleweave.sources.audit import audit
from doubleweave.sources.llama_params import LAYER, LlamaParams, read_params
from doubleweave.sources.model import Model
from doubleweave.sources.saved_tensors import Saved, SavedTensors, in_float32
from doubleweave.sources.streamed_module import streamed_module
from doubleweave.sources.tokenizer_file import LlamaTokenizer, read_tokenizer

SUFFIXES = (".pt", ".pth")
PARAMS, TOKENIZER = "params.json", "tokenizer.model"
# Vocabularies are padded to a multiple of at most this.
_MOST_PADDING = 128
_WRAPPER = "_orig_mod."  # torch.compile's, in checkpoints of llama2.c
_TABLES = ("rope.", "freqs_")  # tensors that follow from the parameters


def load(path: Path, params: Path | None = None, tokenizer: Path | None = None) -> Model:
    """Load the checkpoint `path`; `params` and `tokenizer` default to params.json and tokenizer.model beside it.

    Raises SourceError for files that are damaged, not of this layout, or contradict one another.
    """
    beside = path.parent / TOKENIZER
    if tokenizer is None and beside.exists():
        tokenizer = beside
    _check_whole(path)
    tensors, known = _read(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    is_tied = _is_tied(tensors)
    found = read_params(params or path.parent / PARAMS, shapes, known, is_tied=is_tied)
    _check_tensors(found, tensors, path)
    text = None if tokenizer is None else _tokenizer_for(found, tokenizer)
    saved = _LlamaTensors(path, found, tensors, is_tied)
    module = _module(found, saved, may_stream=zipfile.is_zipfile(path))
    return Model(
        name=path.stem,
        module=module,
        max_context=found.max_seq_len,
        vocab_size=found.vocab_size,
        eos_token_ids=() if text is None else text.eos_token_ids,
        save_tokenizer=None
        if text is None
        else lambda folder: text.tokenizer.save(str(folder / "tokenizer.json")),
        chat_template=None,
        special_tokens={} if text is None else {"bos_token": text.bos, "eos_token": text.eos},
        audit=lambda: audit(_by_new_name(_read(path)[0]), module),
    )


def checkpoint_in(folder: Path) -> Path | None:
    """The checkpoint of a folder in Meta's layout, None for another folder. Raises SourceError for a model in parts."""
    if not (folder / PARAMS).exists():
        return None
    found = sorted(path for suffix in SUFFIXES for path in folder.glob(f"*{suffix}"))
    if len(found) > 1:
        raise SourceError(
            f"{folder}: found {len(found)} checkpoint files ({found[0].name} …), expected one: name it, or, of a model "
            "in parts, use its Hugging Face folder"
        )
    return found[0] if found else None


def _check_whole(path: Path) -> None:
    """SourceError for one part of a model in parts, consolidated.00.pth beside consolidated.01.pth."""
    found = re.fullmatch(r"(.*\.)\d\d", path.stem)
    parts = sorted(path.parent.glob(f"{found[1]}[0-9][0-9]{path.suffix}")) if found else []
    if len(parts) > 1:
        raise SourceError(f"{path}: is one of {len(parts)} parts of a model; use its Hugging Face folder")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and the parameters that llama2.c saves in the checkpoint itself (model_args)."""
    try:
        # A file from before torch 1.6 is no archive, which could be mapped.
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        reason = first_line(error, most=200)
        raise SourceError(
            f"{path}: is not a whole checkpoint of tensors alone ({reason}); fetch it again"
        ) from error
    state = found.get("model", found) if isinstance(found, dict) else {}
    tensors = {
        str(name).removeprefix(_WRAPPER): value
        for name, value in (state.items() if isinstance(state, dict) else ())
        if isinstance(value, Tensor)
    }
    if "tok_embeddings.weight" not in tensors:
        first = next(iter(tensors), "no tensor at all")
        raise SourceError(
            f"{path}: found {first}, expected a checkpoint in Meta's layout (with tok_embeddings.weight)"
        )
    known = found.get("model_args")
    return (
        {name: value for name, value in tensors.items() if not name.startswith(_TABLES)},
        known if isinstance(known, dict) else {},
    )


def _is_tied(tensors: Mapping[str, Tensor]) -> bool:
    embedding = tensors["tok_embeddings.weight"]
    # The output layer of a tied model is missing, or is a second copy of the embedding.
    return torch.equal(tensors.get("output.weight", embedding), embedding)


def _check_tensors(params: LlamaParams, tensors: Mapping[str, Tensor], path: Path) -> None:
    expected = params.shapes()
    for name, shape in expected.items():
        if name == "output.weight" and name not in tensors:
            continue
        if name not in tensors:
            raise SourceError(f"{path}: has no {name}, but {params.path} says n_layers {params.n_layers}")
        if tuple(tensors[name].shape) != shape:
            raise SourceError(
                f"{path}: {name} is {list(tensors[name].shape)}, but by {params.path} it would be {list(shape)}; they "
                "are not of one model"
            )
    if more := sorted(set(tensors) - set(expected)):
        raise SourceError(
            f"{path}: has {more[0]}, but by {params.path} (n_layers {params.n_layers}) there is none: they are not of "
            "one model, or it is no Llama"
        )


def _tokenizer_for(params: LlamaParams, path: Path) -> LlamaTokenizer:
    text = read_tokenizer(path)
    size = text.tokenizer.get_vocab_size()
    if not params.vocab_size - _MOST_PADDING < size <= params.vocab_size:
        raise SourceError(
            f"{path}: has {size} tokens, but the model has {params.vocab_size}; name the model's own tokenizer "
            "(--tokenizer)"
        )
    return text


def _module(params: LlamaParams, tensors: _LlamaTensors, may_stream: bool) -> torch.nn.Module:
    from doubleweave.sources.hugging_face import quiet

    with quiet():
        import transformers

        typed: Any = transformers  # its types leave out what configurations share
        config = typed.LlamaConfig(
            hidden_size=params.dim,
            intermediate_size=params.hidden_dim,
            num_hidden_layers=params.n_layers,
            num_attention_heads=params.n_heads,
            num_key_value_heads=params.n_kv_heads,
            vocab_size=params.vocab_size,
            max_position_embeddings=params.max_seq_len,
            rms_norm_eps=params.norm_eps,
            rope_parameters={
                "rope_theta": params.rope_theta,
                **(params.rope_scaling or {"rope_type": "default"}),
            },
            tie_word_embeddings=tensors.is_tied,
            attn_implementation="eager",
        )
        module = None
        if may_stream:
            module = streamed_module(typed.LlamaForCausalLM, config, tensors, lambda name, shape: False)
        if module is None:
            module = _whole(typed.LlamaForCausalLM, config, tensors)
    found: torch.nn.Module = module.eval()
    return found


def _whole(kind: Any, config: Any, tensors: _LlamaTensors) -> Any:
    with tensors.opened(list(tensors)) as found:
        state = {name: in_float32(saved) for name, saved in zip(tensors, found, strict=True)}
    if tensors.is_tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    # Without memory for initial weights: the checkpoint's tensors take their places.
    with torch.device("meta"):
        module = kind(config)
    module.load_state_dict(state, assign=True)
    module.tie_weights()
    # The tables of rotary embedding are in no state dict, and were made on the meta device, without numbers.
    module.model.rotary_emb = type(module.model.rotary_emb)(config=config)
    return module


class _LlamaTensors(SavedTensors):
    """The `tensors` of the checkpoint `path` by transformers' names, queries and keys in its order of rows."""

    def __init__(self, path: Path, params: LlamaParams, tensors: Mapping[str, Tensor], is_tied: bool) -> None:
        self.is_tied = is_tied
        self._path, self._width = path, params.head_dim
        self._names = {_new_name(name): name for name in tensors if not (is_tied and name == "output.weight")}
        # Not the tensors: what was read of a mapped one stays in memory as long as it lives.
        self._about = {
            name: (tuple(tensors[saved].shape), str(tensors[saved].dtype))
            for name, saved in self._names.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        with self.opened([name]) as (tensor,):
            return tensor[:]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._about[name][0]

    def dtype(self, name: str) -> str:
        return self._about[name][1]

    @contextmanager
    def opened(self, names: Sequence[str]) -> Iterator[list[Saved]]:
        tensors, _ = _read(self._path)
        found: list[Saved] = []
        for saved in map(self._names.__getitem__, names):
            is_turned = re.search(r"attention\.w[qk]\.", saved)
            found.append(_halves(tensors[saved], self._width) if is_turned else tensors[saved])
        yield found


def _by_new_name(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The file's own tensors, in its types and its order of rows, by transformers' names."""
    for name, tensor in tensors.items():
        yield _new_name(name), tensor


def _new_name(name: str) -> str:
    """transformers' name of the tensor."""
    whole = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    return f"model.layers.{layer[1]}.{LAYER[layer[2]][0]}" if layer else whole[name]


def _halves(weight: Tensor, width: int) -> Tensor:
    """Reorder rows from Meta's rotary pairs, neighbours (0 1, 2 3, …), to transformers' halves (0 2 …, 1 3 …)."""
    rows, columns = weight.shape
    return weight.view(rows // width, width // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
