"""Models with an encoder: Whisper, Bart and T5, tiny and random, give transformers' logits and its greedy tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

import doubleweave as dw
import toys
from doubleweave.compiler.graph.ops import attention_reference, cross_attention_reference
from doubleweave.sources.hugging_face import from_module
from native_runner import needs_runner, sentence

VOCAB, LAYERS, NEW_TOKENS = 300, 2, 16
MELS, HOP, RATE = 16, 160, 16000
FRAMES = 100  # of a second
BOUND = 1e-4
TOKENS = 60
_BODY = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}


def whisper():
    config = transformers.WhisperConfig(
        **_BODY, num_mel_bins=MELS, max_source_positions=FRAMES // 2, max_target_positions=96
    )
    return transformers.WhisperForConditionalGeneration(config)


def bart():
    config = transformers.BartConfig(
        **_BODY,
        max_position_embeddings=128,
        forced_eos_token_id=None,
        scale_embedding=True,
        tie_word_embeddings=False,
    )
    return transformers.BartForConditionalGeneration(config)


def _t5(**more):
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=LAYERS,
        num_heads=4,
        decoder_start_token_id=3,
        eos_token_id=2,
        # Distances up to 24 are told apart: tests go beyond.
        relative_attention_num_buckets=12,
        relative_attention_max_distance=24,
        **more,
    )
    return transformers.T5ForConditionalGeneration(config)


def t5():
    return _t5()


def t5_gated():
    return _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)


MODELS = {made.__name__: made for made in (whisper, bart, t5, t5_gated)}


def _module(name):
    torch.manual_seed(7)
    module = MODELS[name]().eval()
    with torch.no_grad():
        for path, weight in module.named_parameters():
            weight.mul_(_factor(path, weight))
    return module


def _factor(path, weight):
    """A random model's token is mostly followed by itself: layers and positions count for more here than tokens."""
    if "relative_attention_bias" in path or "embed_positions" in path:
        return 4.0
    if "shared" in path or "embed_tokens" in path:
        return 0.3
    scores = (".q.weight", ".k.weight", "q_proj.weight", "k_proj.weight")
    return (
        1.0 if weight.ndim != 2 or path.startswith(("lm_head", "proj_out")) or path.endswith(scores) else 2.0
    )


def _features(seed):
    """What transformers' feature extractor makes of a second of two tones and noise."""
    time = np.arange(RATE) / RATE
    noise = np.random.default_rng(seed).normal(size=RATE)
    wave = np.sin(2 * np.pi * 300 * seed * time) + 0.5 * np.sin(2 * np.pi * 1700 * time**2) + 0.1 * noise
    extract = transformers.WhisperFeatureExtractor(
        feature_size=MELS, sampling_rate=RATE, hop_length=HOP, chunk_length=1
    )
    found = extract(wave.astype(np.float32), sampling_rate=RATE, return_tensors="pt").input_features
    assert found.shape == (1, MELS, FRAMES)
    return found


def _inputs(name):
    """What the encoder is given: two for each model, for text of different lengths."""
    if name == "whisper":
        return [_features(1), _features(2)]
    random = np.random.default_rng(5)
    return [torch.tensor(random.integers(4, VOCAB, (1, length))) for length in (41, 5)]


@pytest.fixture(scope="module", params=list(MODELS))
def compiled(request, tmp_path_factory):
    module = _module(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "out"
    dw.compile_llm(from_module(module, request.param, None), folder, quantize="none", max_context=96)
    return request.param, module, dw.open(folder)


def _ids():
    return np.concatenate([[3], np.random.default_rng(0).integers(4, VOCAB, TOKENS - 1)])


def _logits(module, encoder_input, ids):
    given = {module.main_input_name: encoder_input, "decoder_input_ids": torch.tensor(ids)[None]}
    with torch.no_grad():
        return module(**given).logits[0].numpy()


def _greedy(module, encoder_input):
    config = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, decoder_start_token_id=3, eos_token_id=2, pad_token_id=0
    )
    # Whisper's own generate cuts sound into pieces; one piece is what every model generates from.
    found = transformers.GenerationMixin.generate(module, encoder_input, generation_config=config)
    return [token for token in found[0].tolist()[1:] if token != 2]


def test_logits_and_tokens_are_transformers(compiled):
    name, module, program = compiled
    ids = _ids()
    session = program.session()
    for encoder_input in _inputs(name):
        wanted = _logits(module, encoder_input, ids)
        bound = BOUND * max(1.0, float(np.abs(wanted).max()))
        session.encode(encoder_input)
        assert session.length == 0
        assert np.abs(session.score(ids) - wanted).max() < bound
        session.reset()
        for start in range(0, TOKENS, 7):
            end = min(start + 7, TOKENS)
            assert np.abs(session.append(ids[start:end]) - wanted[end - 1]).max() < bound
        # What was encoded stays where tokens are taken back.
        session.truncate(20)
        for at in range(20, TOKENS):
            assert np.abs(session.append(ids[at : at + 1]) - wanted[at]).max() < bound
        answer = program.generate(max_new_tokens=NEW_TOKENS, encoder_input=encoder_input)
        assert list(answer.token_ids) == _greedy(module, encoder_input)
        assert answer.new_tokens >= 4


def test_the_encoder_counts(compiled):
    """Other sound or text gives other logits, so that comparing them says something."""
    name, module, _ = compiled
    one, other = (_logits(module, given, _ids()) for given in _inputs(name))
    assert np.abs(one - other).max() > 0.05 * np.abs(one).max()


@pytest.mark.parametrize("schedule", ["lockstep", "pipelined", "out_of_order", "wavefront"])
def test_every_schedule_gives_the_same(compiled, schedule):
    name, _, program = compiled
    given = _inputs(name)[0]
    ids = _ids()
    plain, other = program.session("sequential", 1), program.session(schedule, 2, chunk=16)
    plain.encode(given)
    other.encode(given)
    assert np.abs(plain.score(ids) - other.score(ids)).max() < 1e-4
    assert other.encoded_bytes == plain.encoded_bytes > 0


def test_nothing_is_generated_before_something_is_encoded(compiled):
    name, _, program = compiled
    with pytest.raises(dw.InputError, match=r"nothing was encoded; call session\.encode"):
        program.session().append([3])
    with pytest.raises(dw.InputError, match="found neither of a prompt"):
        program.generate()
    with pytest.raises(dw.InputError, match="encoder"):
        program.session().encode(np.zeros((1, 1, 1, 1), np.float32))
    if name == "whisper":
        with pytest.raises(dw.InputError, match="100"):
            program.session().encode(np.zeros((1, MELS, FRAMES + 2), np.float32))
    assert program.session().encodes_tokens == (name != "whisper")


def test_the_encoder_is_a_method_of_the_program(compiled):
    name, module, program = compiled
    given = _inputs(name)[0]
    first = program.methods["encoder"](given)[0]
    with torch.no_grad():
        rows = module.get_encoder()(given).last_hidden_state
    assert first.shape[:2] == rows.shape[:2]


def test_static_attention_is_refused(tmp_path):
    model = from_module(_module("bart"), "bart", None)
    with pytest.raises(
        dw.PolicyError, match="bart has an encoder, whose rows its decoder attends to: expected back"
    ):
        dw.compile_llm(model, tmp_path / "out", attention="static", max_context=64)


def test_a_folder_in_eight_bits_and_fixed_sizes(tmp_path, cli):
    """The folder's decoder is compiled with its encoder, its linears take a recipe, and a text is what is encoded."""
    _module("bart").save_pretrained(tmp_path / "bart")
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=toys.tokenizer(), eos_token=toys.END)
    wrapped.save_pretrained(tmp_path / "bart")
    dw.compile_llm(tmp_path / "bart", tmp_path / "out", quantize="8da8w", shape="static", chunk=(1, 32))
    program = dw.open(tmp_path / "out")
    given, ids = _inputs("bart")[0], _ids()
    session = program.session()
    session.encode(given)
    wanted = _logits(_module("bart"), given, ids)
    found = session.score(ids)
    assert np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean()) < 0.2
    assert program.model.start_token_ids == (3,)
    text = "a text"
    answer = program.generate(max_new_tokens=4, encoder_input=text)
    ids = toys.tokenizer().encode(text).ids
    assert answer.token_ids == program.generate([3], 4, encoder_input=[ids]).token_ids
    assert answer.text is not None
    _, out, _ = cli("run", tmp_path / "out", "-p", text, "-n", 4, "--json")
    assert tuple(json.loads(out.splitlines()[-1])["token_ids"]) == answer.token_ids


@needs_runner
def test_doubleweave_run_says_what_it_does_not_run(compiled):
    _, _, program = compiled
    said = sentence(program.folder, "-p", "x")
    assert said.endswith(
        "its model has an encoder, which doubleweave-run does not run; run it from Python with "
        "doubleweave.open"
    )


def test_cross_attention_sees_every_row():
    """It is attention of one query behind all keys; distances are added by how far a key lies behind."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 5, 32), torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    found = cross_attention_reference(q, k, v, 4, 4, 0.3, 0, 0.0)
    rows = [attention_reference(q[:, t : t + 1], k, v, 4, 4, 0.3, 0, 0.0) for t in range(5)]
    assert torch.allclose(found, torch.cat(rows, 1), atol=1e-6)
    keys, table = torch.randn(1, 5, 32), torch.randn(4, 3)
    found = attention_reference(q, keys, keys, 4, 4, 0.3, 0, 0.0, distances=table)
    behind = (torch.arange(5)[:, None] - torch.arange(5)).clamp(0, 2)
    heads = [x.view(5, 4, 8).transpose(0, 1) for x in (q[0], keys[0])]
    scores = 0.3 * heads[0] @ heads[1].transpose(1, 2) + table[:, behind]
    hidden = torch.ones(5, 5).triu(1).bool()
    wanted = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ heads[1]
    assert torch.allclose(found[0], wanted.transpose(0, 1).reshape(5, 32), atol=1e-5)
