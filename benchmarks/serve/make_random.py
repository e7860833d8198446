"""Write random weights of a decoder in true shapes, as a Hugging Face folder and as a GGUF file of the same numbers:
make_random.py SHAPE FOLDER FILE. It runs in Doubleweave's environment, which has transformers and gguf."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

# LFM2-350M's shape (10 convolutions, 6 layers that attend), and a mixture of 64 experts, 8 a token: 1.1 B parameters.
LFM2: dict[str, Any] = {
    "vocab_size": 65536,
    "hidden_size": 1024,
    "intermediate_size": 4608,
    "block_auto_adjust_ff_dim": False,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "conv_L_cache": 3,
    "layer_types": ["full_attention" if n in (2, 5, 8, 10, 12, 14) else "conv" for n in range(16)],
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
TWELVE = {**LFM2, "num_hidden_layers": 12, "layer_types": LFM2["layer_types"][:12]}
MOE = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "moe_intermediate_size": 320,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, tuple[str, gguf.MODEL_ARCH, dict[str, Any]]] = {
    "lfm2-350m": ("Lfm2", gguf.MODEL_ARCH.LFM2, LFM2),
    # Twelve layers of it, for how well the simulator tells what schedules take.
    "lfm2-12": ("Lfm2", gguf.MODEL_ARCH.LFM2, TWELVE),
    "moe-1b": ("Qwen3Moe", gguf.MODEL_ARCH.QWEN3MOE, MOE),
}
CONTEXT = 4096


def main() -> None:
    shape, folder, file = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    name, arch, settings = SHAPES[shape]
    config = getattr(transformers, f"{name}Config")(
        **settings, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().to(torch.float16)
    model.save_pretrained(folder)
    write_gguf(model, arch, file)


def write_gguf(model: Any, arch: gguf.MODEL_ARCH, file: Path) -> None:
    config, layers = model.config, model.config.num_hidden_layers
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", None) or config.norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    heads = [config.num_key_value_heads if kind == "full_attention" else 0 for kind in kinds]
    writer.add_head_count_kv(heads if 0 in heads else heads[0])
    if arch == gguf.MODEL_ARCH.LFM2:
        writer.add_shortconv_l_cache(config.conv_L_cache)
    else:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    names = gguf.get_tensor_name_map(arch, layers)
    for name, tensor in tensors(model):
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target, f"{name}: no tensor of this name in a GGUF of {arch}"
        is_matrix = tensor.ndim > 1 and "shortconv.conv" not in target
        writer.add_tensor(target, tensor.numpy().astype(np.float16 if is_matrix else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True):
                yield name.replace("gate_up_proj", f"{part}.weight"), half.contiguous()
        elif name.endswith("experts.down_proj"):
            yield f"{name}.weight", tensor
        elif name.endswith("conv.conv.weight"):
            yield name, tensor.squeeze(1)
        else:
            yield name, tensor


if __name__ == "__main__":
    main()
