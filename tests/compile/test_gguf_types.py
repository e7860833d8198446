"""GGUF files in the quantizations people have: the compiled float32 program gives eager torch's greedy tokens on the
weights as the format says they are. Quantized blocks are read here by rules of our own.

The formats are those of ggml (ggml-org/llama.cpp, ggml/src/ggml-common.h and ggml-quants.c).
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import toys
from doubleweave.errors import SourceError

HIDDEN, LAYERS, HEADS, KV_HEADS = 256, 2, 8, 4  # K-quants have blocks of 256
HEAD_DIM = HIDDEN // HEADS
TYPES = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
PROMPT = [5, 100, 17, 17, 200, 42, 8, 99, 3]


# Reading the formats


def halves(data):
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def legacy(data, with_least):
    """Q4_0 and Q4_1: a scale (and a least value) for 32 weights, the first 16 in the low nibbles."""
    head = 4 if with_least else 2
    scale, nibbles = halves(data[:, :2]), data[:, head:]
    values = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.float32)
    return values * scale + halves(data[:, 2:4]) if with_least else (values - 8) * scale


def scales_and_mins(packed):
    """Eight 6-bit scales and eight 6-bit least values in twelve bytes."""
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    mins = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    return scales.astype(np.float32), mins.astype(np.float32)


def k4_or_k5(data, fifth_bits):
    scale, least = halves(data[:, :2]), halves(data[:, 2:4])
    scales, mins = scales_and_mins(data[:, 4:16])
    nibbles = data[:, 48:] if fifth_bits else data[:, 16:]
    parts = []
    for part in range(8):
        of = nibbles[:, part // 2 * 32 : part // 2 * 32 + 32]
        values = (of >> 4 if part % 2 else of & 15).astype(np.float32)
        if fifth_bits:
            values += 16 * (data[:, 16:48] >> part & 1)
        parts.append(scale * scales[:, part, None] * values - least * mins[:, part, None])
    return np.concatenate(parts, axis=1)


def k6(data):
    low, high = data[:, :128], data[:, 128:192]
    scales, scale = data[:, 192:208].view(np.int8).astype(np.float32), halves(data[:, 208:])
    parts = []
    for part in range(8):
        half, quarter = divmod(part, 4)
        nibbles = low[:, half * 64 + quarter % 2 * 32 :][:, :32]
        bits = high[:, half * 32 : half * 32 + 32] >> (2 * quarter) & 3
        values = ((nibbles >> 4 if quarter > 1 else nibbles & 15) | bits << 4).astype(np.float32) - 32
        parts.append(scale * np.repeat(scales[:, 2 * part : 2 * part + 2], 16, axis=1) * values)
    return np.concatenate(parts, axis=1)


READ = {
    "F16": halves,
    "BF16": lambda data: (np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16).view(
        np.float32
    ),
    "Q8_0": lambda data: data[:, 2:].view(np.int8).astype(np.float32) * halves(data[:, :2]),
    "Q4_0": lambda data: legacy(data, False),
    "Q4_1": lambda data: legacy(data, True),
    "Q4_K": lambda data: k4_or_k5(data, False),
    "Q5_K": lambda data: k4_or_k5(data, True),
    "Q6_K": k6,
}


def quantized(weights, kind):
    """Bytes of a type for float32 weights [rows, columns]; of K-quants, any valid blocks of about that size."""
    import gguf

    of = gguf.GGMLQuantizationType[kind]
    if not kind.endswith("_K"):
        return gguf.quants.quantize(weights, of).view(np.uint8).reshape(len(weights), -1)
    _, size = gguf.GGML_QUANT_SIZES[of]
    generator = np.random.default_rng(int(abs(weights[0, 0]) * 1e6))
    data = generator.integers(0, 256, (weights.size // 256, size), dtype=np.uint8)
    # Scales for weights around zero: the least value is half a block's span.
    scales = {"Q4_K": {0: 7e-4, 2: 7e-4 * 7.5}, "Q5_K": {0: 3.5e-4, 2: 3.5e-4 * 15.5}, "Q6_K": {208: 7e-5}}
    for place, scale in scales[kind].items():
        numbers = generator.uniform(0.9, 1.1, (len(data), 1)) * scale
        data[:, place : place + 2] = numbers.astype(np.float16).view(np.uint8)
    return data.reshape(len(weights), -1)


def read(data, kind):
    import gguf

    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return READ[kind](data.reshape(-1, size)).reshape(len(data), -1)


# The model


def bare_module():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=toys.VOCAB_SIZE,
        max_position_embeddings=toys.MAX_CONTEXT,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=toys.EOS_ID,
    )
    return LlamaForCausalLM(config).eval()


def paired(weight, heads):
    """GGUF keeps the two halves of a rotary pair side by side."""
    return weight.reshape(heads, 2, HEAD_DIM // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def unpaired(weight, heads):
    return weight.reshape(heads, HEAD_DIM // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(path, kind):
    """A GGUF file with every matrix in `kind`; returns the module with the weights that the file stands for."""
    import gguf

    module = bare_module()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("typed")
    writer.add_context_length(toys.MAX_CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(module.config.rms_norm_eps)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(toys.VOCAB_SIZE)
    toys.add_gguf_tokenizer(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            wanted, stored = names.get_name(name, try_suffixes=(".weight",)), tensor.numpy()
            if stored.ndim == 1:
                writer.add_tensor(wanted, stored)
                continue
            heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
            data = quantized(paired(stored, heads) if heads else stored, kind)
            writer.add_tensor(wanted, data, raw_dtype=gguf.GGMLQuantizationType[kind])
            found = read(data, kind)
            tensor.copy_(torch.from_numpy(unpaired(found, heads) if heads else found))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return module


@pytest.mark.parametrize("kind", TYPES)
def test_the_compiled_program_gives_the_tokens_of_the_dequantized_weights(tmp_path, lowered_once, kind):
    import doubleweave as dw

    module = write(tmp_path / f"{kind}.gguf", kind)
    dw.compile_llm(tmp_path / f"{kind}.gguf", tmp_path / "out", quantize="none")
    ids = toys.greedy(dw.open(tmp_path / "out").session(), PROMPT, 16)
    assert ids == toys.greedy_in_torch(module, PROMPT, 16)
    assert len(set(ids)) > 3, "a text of one token alone says little"


def test_a_type_that_cannot_be_read_is_named_with_those_that_can(tmp_path):
    import gguf

    from doubleweave.sources import load

    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    writer.add_tensor("x", np.zeros((2, 40), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        SourceError, match=r"x is of type Q8_1, expected one of F32, .*; use another file"
    ) as error:
        load(tmp_path / "odd.gguf")
    assert "\n" not in str(error.value)
    assert set(TYPES) <= set(re.findall(r"\w+", str(error.value)))
