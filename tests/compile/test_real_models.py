"""Models that nobody tuned for, of transformers, small and random: one nested part dynamic, the rest static."""

from __future__ import annotations

import torch
import transformers
from torch.export import Dim

import doubleweave as dw

TOLERANCE = 1e-5
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max())


NUM_TOKENS = Dim("N", min=1, max=64)
DIMS = {"hidden_states": {1: NUM_TOKENS}, "attention_mask": {2: NUM_TOKENS, 3: NUM_TOKENS}}


def check_attention_alone(
    program: dw.ModuleProgram, model: torch.nn.Module, name: str, has_positions: bool = False
) -> None:
    """The dynamic part by itself, on lengths that the whole model is not compiled for."""
    for count in (1, 5, 64):
        hidden, mask = torch.randn(1, count, 32), torch.ones(1, 1, count, count, dtype=torch.bool)
        given = {"position_ids": None} if has_positions else {}  # BERT hands it on
        with torch.no_grad():
            wanted = model.get_submodule(name)(hidden, mask, **given)[0]
        assert difference(program.methods[name](hidden, mask, **given)[0], wanted) < TOLERANCE


def test_bert():
    from transformers.models.bert.modeling_bert import BertAttention

    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=99, max_position_embeddings=64, **WIDTH)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    program = dw.compile(
        model,
        (),
        {"input_ids": torch.randint(0, 99, (1, 12))},
        policy={"": dw.Static(device="npu"), BertAttention: dw.Dynamic(DIMS)},
    )
    assert {s.device for s in program.split.segments if "attention" not in s.name} == {"npu"}
    ids = torch.randint(0, 99, (1, 12))
    found = program(input_ids=ids)
    with torch.no_grad():
        wanted = model(input_ids=ids)
    assert type(found) is type(wanted)
    assert difference(found.last_hidden_state, wanted.last_hidden_state) < TOLERANCE
    check_attention_alone(program, model, "encoder.layer.1.attention", has_positions=True)


def test_vit():
    from transformers.models.vit.modeling_vit import ViTAttention

    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=32, patch_size=8, **WIDTH)
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    images = torch.randn(1, 3, 32, 32)
    program = dw.compile(
        model, (images,), policy={"": dw.Static(device="npu"), ViTAttention: dw.Dynamic(DIMS)}
    )
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = model(images)
    assert difference(program(images).last_hidden_state, wanted.last_hidden_state) < TOLERANCE
    check_attention_alone(program, model, "layers.0.attention")


def test_whisper():
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=30,
        max_target_positions=40,
        num_mel_bins=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = transformers.WhisperModel(config).eval()
    features = torch.randn(1, 16, 60)

    def arguments(count: int) -> dict[str, object]:
        ids = torch.randint(3, 99, (1, count))
        return {"input_features": features, "decoder_input_ids": ids, "use_cache": False}

    program = dw.compile(
        model,
        (),
        arguments(7),
        dynamic_shapes={"decoder_input_ids": {1: Dim("T", min=1, max=40)}},
        policy={"encoder": dw.Static(device="npu"), "decoder": dw.Dynamic(device="cpu")},
    )
    assert [(s.name, s.device) for s in program.split.segments] == [("decoder", "cpu"), ("encoder", "npu")]
    for count in (7, 1, 40):
        given = arguments(count)
        found = program(**given)
        with torch.no_grad():
            wanted = model(**given)
        assert type(found) is type(wanted)
        assert difference(found.last_hidden_state, wanted.last_hidden_state) < TOLERANCE
        assert difference(found.encoder_last_hidden_state, wanted.encoder_last_hidden_state) < TOLERANCE
