"""A tiny random Llama with a byte-level tokenizer, in every form a model can come in.

Building the tokenizer, ModelInfo and split imports neither torch nor transformers; functions that build the
model import them when called.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from doubleweave.ir.manifest import ModelInfo
from doubleweave.ir.split import (
    Call,
    FixedSizes,
    Function,
    Port,
    Segment,
    SizeRanges,
    Split,
    Value,
    most_rows,
    rows,
)
from doubleweave.predict.profile import Profile, costs_of
from doubleweave.schedule.costs import Costs
from doubleweave.schedule.task_graph import TaskGraph

NAME = "toy"
END = "<|end|>"
SPECIAL_TOKENS = ("<|user|>", "<|assistant|>", END)
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS) + 5  # five ids without a text
EOS_ID = 256 + SPECIAL_TOKENS.index(END)
MAX_CONTEXT = 256
HIDDEN, INTERMEDIATE, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS = 64, 96, 3, 4, 2
HEAD_DIM = HIDDEN // NUM_HEADS
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> Any:
    """A `tokenizers.Tokenizer` with one token a byte, so that most characters are several tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return built


def model_info(**changes: Any) -> ModelInfo:
    fields = {
        "vocab_size": VOCAB_SIZE,
        "max_context": MAX_CONTEXT,
        "eos_token_ids": (EOS_ID,),
        "chat_template": CHAT_TEMPLATE,
        "special_tokens": {"eos_token": END},
        "quantize": "none",
    }
    return ModelInfo(**{**fields, **changes})


def unit_costs(graph: TaskGraph) -> Costs:
    """A microsecond a task."""
    return Costs(np.full(len(graph), 1000))


def costs(profile: Profile, graph: TaskGraph, threads: int = 1, workers: int = 1, **options: Any) -> Costs:
    """The costs of a graph's tasks by a profile."""
    return costs_of(profile.tables(graph.split), graph, threads, workers, **options)


def split(num_layers: int, shape: FixedSizes | SizeRanges, static_device: str = "cpu") -> Split:
    """The split of a decoder, written by hand: what the compiler makes of a Llama, without compiling it."""
    hidden = ("float32", (1, "T", 8))
    ids = ("int64", (1, "T"))
    logits = ("float32", (1, "T", 16))
    values = [Value("input_ids", *ids, "input"), Value("embedded", *hidden, "chunk")]
    segments = [_segment("embed_tokens", shape, [ids], [hidden], 512)]
    calls = [Call("embed_tokens", "embed_tokens", ("input_ids",), ("embedded",))]
    cached = ("float32", (1, "S", 8))
    attention = _segment("attention", rows(1, most_rows(shape), 64), [hidden, cached, cached], [hidden], 0)
    carried = "embedded"
    for layer in range(num_layers + 1):
        name = f"block_{layer}"
        reads = (carried,) if layer == 0 else (f"attended_{layer - 1}", carried)
        last = layer == num_layers
        writes = (name,) if last else (f"q_{layer}", f"k_{layer}", f"v_{layer}", name)
        segments.append(_segment(name, shape, [hidden] * len(reads), [hidden] * len(writes), 4096))
        calls.append(Call(name, name, reads, writes))
        kinds = ("chunk",) if last else ("chunk", "cache", "cache", "chunk")
        values += [Value(value, *hidden, kind) for value, kind in zip(writes, kinds, strict=True)]
        carried = name
        if not last:
            reads = (f"q_{layer}", f"k_{layer}", f"v_{layer}")
            calls.append(Call(f"attention_{layer}", "attention", reads, (f"attended_{layer}",)))
            values.append(Value(f"attended_{layer}", *hidden, "chunk"))
    head = FixedSizes(tuple(sorted({1, *shape.sizes}))) if isinstance(shape, FixedSizes) else shape
    segments += [attention, _segment("lm_head", head, [hidden], [logits], 8192)]
    calls.append(Call("lm_head", "lm_head", (carried,), ("logits",), "last"))
    values.append(Value("logits", *logits, "output"))
    segments = [s if s.name == "attention" else replace(s, device=static_device) for s in segments]
    return Split(tuple(segments), (Function("", tuple(calls), tuple(values), ("logits",)),))


def _segment(name: str, shape: Any, inputs: list[Any], outputs: list[Any], weight_bytes: int) -> Segment:
    portable = name == "attention"
    return Segment(
        name=name,
        device="cpu",
        backend="portable" if portable else "xnnpack",
        shape=shape,
        inputs=tuple(Port(f"in{i}", *port) for i, port in enumerate(inputs)),
        outputs=tuple(Port(f"out{i}", *port) for i, port in enumerate(outputs)),
        structure=name.partition("_")[0],
        weight_bytes=weight_bytes,
        num_operators=3,
        num_delegated=0 if portable else 2,
    )


def module(*, tied: bool = False, num_layers: int = NUM_LAYERS, seed: int = 0) -> Any:
    """A random LlamaForCausalLM; its weights are wide enough that the greedy token is never a close call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=num_layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=EOS_ID,
    )
    built = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if "norm" in name:  # ones otherwise: no two weights of the toy are equal
                weight.uniform_(0.5, 1.5)
    return built


def model(**changes: Any) -> Any:
    """The toy as a loaded `doubleweave.models.model.Model`."""
    from doubleweave.sources.model import Model

    return Model(
        name=NAME,
        module=module(**changes),
        max_context=MAX_CONTEXT,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(EOS_ID,),
        save_tokenizer=lambda folder: tokenizer().save(str(folder / "tokenizer.json")),
        chat_template=CHAT_TEMPLATE,
        special_tokens={"eos_token": END},
    )


def greedy(session: Any, token_ids: list[int], count: int) -> list[int]:
    """The tokens that a session gives behind a prompt, end tokens and all."""
    found = [int(session.append(token_ids).argmax())]
    while len(found) < count and session.length < session.max_context:
        found.append(int(session.append(found[-1:]).argmax()))
    return found


def greedy_in_torch(module: Any, token_ids: list[int], count: int) -> list[int]:
    """The same of a transformers module, without a cache."""
    import torch

    ids = list(token_ids)
    with torch.no_grad():
        while len(ids) < len(token_ids) + count:
            ids.append(int(module(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(token_ids) :]


def save_hugging_face(folder: Path) -> Path:
    """Write the toy as a folder in Hugging Face's layout: config, safetensors, tokenizer."""
    from transformers import PreTrainedTokenizerFast

    module().save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token=END)
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    return folder


def save_gguf(path: Path, architecture: str = "llama") -> Path:
    """Write the toy as a GGUF file in float32."""
    import gguf

    built = module()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(NAME)
    writer.add_context_length(MAX_CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(NUM_LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(built.config.rms_norm_eps)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(VOCAB_SIZE)
    add_gguf_tokenizer(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, NUM_LAYERS)
    for name, tensor in built.state_dict().items():
        data = tensor.numpy()
        for projection, heads in (("q_proj", NUM_HEADS), ("k_proj", NUM_KV_HEADS)):
            if projection in name:  # GGUF keeps the two halves of a rotary pair side by side
                data = data.reshape(heads, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_gguf_tokenizer(writer: Any) -> None:
    import gguf

    vocab = tokenizer().get_vocab()
    tokens = sorted(vocab, key=lambda token: vocab[token])
    tokens += [f"[unused{index}]" for index in range(VOCAB_SIZE - len(tokens))]
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in tokens])
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_eos_token_id(EOS_ID)
    writer.add_chat_template(CHAT_TEMPLATE)
