"""Checkpoints in Meta's layout: the numbers and tokens of Meta's own rules, and a sentence for each contradiction."""

from __future__ import annotations

import base64
import json

import pytest
import torch

import meta_llama
from doubleweave.errors import PolicyError, SourceError
from doubleweave.sources import streamed_module
from doubleweave.sources.file_weights import FileWeight
from meta_llama import PARAMS

pytestmark = pytest.mark.usefixtures("lowered_once")

TEXTS = (
    "plain words",
    "ends in a line\n",
    "\ttab  and  more  ",
    " a  space before",
    "né 😀 日本",
    "12345 + 6.7",
    "line\nbreak\ttab",
    "Ünïcode ﬁne ① x",
)
IDS = [5, 300, 17, 17, 399, 42, 8]


@pytest.fixture(scope="module")
def state():
    return meta_llama.state_dict()


@pytest.fixture
def checkpoint(tmp_path, state):
    return meta_llama.save(tmp_path, state)


def load(*args, **kwargs):
    from doubleweave.sources import load

    return load(*args, **kwargs)


def logits_of(model):
    with torch.no_grad():
        return model.module(input_ids=torch.tensor([IDS])).logits[0]


@pytest.mark.parametrize("stays_in_files", [False, True])
@pytest.mark.parametrize("layout", ["plain", "llama2.c", "bfloat16", "tied", "with tables"])
def test_a_checkpoint_computes_what_metas_rules_say(tmp_path, state, layout, stays_in_files, monkeypatch):
    monkeypatch.setattr(streamed_module, "LEAST_BYTES", 0 if stays_in_files else 1 << 40)
    monkeypatch.setattr(streamed_module, "_SMALL_BYTES", 0)
    state, written = dict(state), dict(state)
    if layout == "llama2.c":
        written = {"model": {f"_orig_mod.{name}": value for name, value in state.items()}, "model_args": {}}
    elif layout == "bfloat16":
        written = {name: value.bfloat16() for name, value in state.items()}
        state = {name: value.float() for name, value in written.items()}
    elif layout == "tied":
        del state["output.weight"], written["output.weight"]
    elif layout == "with tables":
        written |= {"rope.freqs": torch.ones(8), "freqs_cos": torch.ones(4), "freqs_sin": torch.ones(4)}
    model = load(meta_llama.save(tmp_path, written))
    assert (model.name, model.max_context, model.vocab_size) == ("stories", 256, 400)
    assert {value.dtype for value in model.module.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(logits_of(model), meta_llama.logits(state, IDS), rtol=1e-4, atol=1e-4)
    assert all(isinstance(one, FileWeight) == stays_in_files for one in model.module.parameters())
    assert model.audit() == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"n_kv_heads": None},
        {"rope_theta": 500000.0},
        {"rope_theta": 500000.0, "use_scaled_rope": True, "rope_scale_factor": 8},
        {"hidden_dim": 192, "multiple_of": None},
        {"multiple_of": None, "vocab_size": -1},
        {"ffn_dim_multiplier": 1.5, "multiple_of": 128},
    ],
    ids=str,
)
def test_params_mean_what_they_mean_in_metas_code(tmp_path, changes):
    given = {name: value for name, value in {**PARAMS, **changes}.items() if value is not None}
    full = {**given, "n_kv_heads": given.get("n_kv_heads", 4), "vocab_size": 400}
    hidden = 256 if "ffn_dim_multiplier" in given else meta_llama.HIDDEN_DIM
    state = meta_llama.state_dict(full, hidden)
    model = load(meta_llama.save(tmp_path, state, given))
    torch.testing.assert_close(logits_of(model), meta_llama.logits(state, IDS, full), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "is_tied", "context", "factor"),
    [
        ({}, False, 4096, None),
        ({"norm_eps": 1e-6}, False, 2048, None),
        ({"rope_theta": 500000.0}, False, 8192, None),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, False, 131072, 8.0),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, True, 131072, 32.0),
    ],
    ids=str,
)
def test_what_metas_params_leave_out_is_that_of_the_release(
    tmp_path, state, changes, is_tied, context, factor
):
    given = {**PARAMS, **changes}
    del given["max_seq_len"]
    written = {name: value for name, value in state.items() if not is_tied or name != "output.weight"}
    model = load(meta_llama.save(tmp_path, written, given))
    assert model.max_context == context
    assert model.module.config.rope_parameters.get("factor") == factor


def test_a_checkpoint_of_llama2_c_says_its_context(tmp_path, state):
    given = {name: value for name, value in PARAMS.items() if name != "max_seq_len"}
    path = meta_llama.save(tmp_path, {"model": state, "model_args": {"max_seq_len": 99}}, given)
    assert load(path).max_context == 99


def test_checkpoints_that_are_no_archive_are_read_too(tmp_path, state):
    path = meta_llama.save(tmp_path, state)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    torch.testing.assert_close(logits_of(load(path)), meta_llama.logits(state, IDS), rtol=1e-4, atol=1e-4)


def test_the_command_line_takes_the_words_of_other_tools(tmp_path, state, cli, refused):
    path = meta_llama.save(tmp_path, state)
    params = (tmp_path / "params.json").rename(tmp_path / "mine.json")
    tokenizer = meta_llama.save_sentencepiece(tmp_path / "mine.model")
    out = tmp_path / "out"
    code, _, err = cli(
        "compile", "-c", path, "-p", params, "--tokenizer", tokenizer, "-o", out, "--quantize", "none"
    )
    assert code == 0, err
    assert (out / "tokenizer.json").exists()
    assert "found neither SOURCE nor -c" in refused("compile", "-o", tmp_path / "x")
    assert "found both SOURCE and -c" in refused("compile", path, "-c", path, "-o", tmp_path / "x")
    assert "params.json: no such file" in refused("compile", path, "-o", tmp_path / "x")
    assert refused("compile", "", "-o", tmp_path / "x")


def test_files_may_be_named_and_a_folder_is_enough(tmp_path, state):
    path = meta_llama.save(tmp_path, state)
    assert load(tmp_path).name == "stories"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = (tmp_path / "params.json").rename(elsewhere / "mine.json")
    tokenizer = meta_llama.save_sentencepiece(elsewhere / "mine.model")
    assert load(path, params=moved).save_tokenizer is None
    assert load(path, params=str(moved), tokenizer=str(tokenizer)).eos_token_ids == (2,)


def test_the_compiled_program_gives_metas_tokens(tmp_path, checkpoint, state):
    import doubleweave as dw

    meta_llama.save_sentencepiece(tmp_path / "tokenizer.model")
    dw.compile_llm(checkpoint, tmp_path / "out", quantize="none")
    program = dw.open(tmp_path / "out")
    result = program.generate("the river and the sea", max_new_tokens=16)
    ids = program.text.encode("the river and the sea")
    expected = meta_llama.greedy(state, ids, 16)
    assert list(result.token_ids) == expected[: len(result.token_ids)]
    assert len(result.token_ids) == 16 or expected[len(result.token_ids)] == 2


# Tokenizers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model_type": "unigram"},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"add_dummy_prefix": False, "user_defined_symbols": ["<user>"]},
    ],
    ids=str,
)
def test_sentencepiece_gives_its_own_ids(tmp_path, options):
    import sentencepiece

    from doubleweave.sources.tokenizer_file import read_tokenizer

    path = meta_llama.save_sentencepiece(tmp_path / "tokenizer.model", **options)
    own = sentencepiece.SentencePieceProcessor(model_file=str(path))
    found = read_tokenizer(path)
    assert (found.eos_token_ids, found.bos, found.eos) == ((2,), "<s>", "</s>")
    assert found.tokenizer.get_vocab_size() == 400
    for text in (*TEXTS, meta_llama.ESSAY.read_text()[:3000], "a <user> b"):
        ids = found.tokenizer.encode(text).ids
        assert ids == [1, *own.encode(text)], text
        assert found.tokenizer.decode(ids) == own.decode(ids), text


def test_tiktoken_gives_its_own_ids(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    from doubleweave.sources.tokenizer_file import read_tokenizer

    path = meta_llama.save_tiktoken(tmp_path / "tokenizer.model", 500)
    ranks = {
        base64.b64decode(token): int(rank) for token, rank in map(bytes.split, path.read_bytes().splitlines())
    }
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )
    own = tiktoken.Encoding("llama", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    found = read_tokenizer(path)
    assert found.tokenizer.get_vocab_size() == 500 + 256
    assert found.eos_token_ids == (501, 508, 509)
    assert found.tokenizer.id_to_token(509) == "<|eot_id|>"
    for text in (*TEXTS, meta_llama.ESSAY.read_text()[:3000]):
        ids = found.tokenizer.encode(text).ids
        assert ids == [500, *own.encode(text)], text
        assert found.tokenizer.decode(ids) == text


# What is refused


def refuses(message, *args, **kwargs):
    with pytest.raises(SourceError, match=message) as error:
        load(*args, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dim": 128},
            r"is \[400, 64\], but by .*params\.json it would be \[400, 128\]; they are not of one model",
        ),
        ({"n_layers": 4}, r"has no layers\.3\.attention\.wq\.weight, but .* says n_layers 4"),
        ({"n_layers": 2}, r"has layers\.2\.attention\.wk\.weight, but by .* \(n_layers 2\) there is none"),
        ({"n_kv_heads": 4}, r"attention\.wk\.weight is \[32, 64\], but by .* it would be \[64, 64\]"),
        ({"vocab_size": 512}, r"tok_embeddings\.weight is \[400, 64\], but .* \[512, 64\]"),
        ({"multiple_of": 256}, r"w1\.weight is \[192, 64\], but .* \[256, 64\]"),
        ({"n_heads": 3}, "n_heads is 3, expected a divisor of 64"),
        ({"n_heads": "four"}, "n_heads is 'four', expected a whole number above 0"),
        ({"dim": None}, "has no dim; expected dim, n_layers and n_heads at least"),
        ({"n_heads": 64, "n_kv_heads": None}, r"dim 64 over n_heads 64 is 1, expected an even number"),
        ({"norm_eps": float("inf")}, "norm_eps is inf, expected a number above 0"),
    ],
    ids=str,
)
def test_params_that_contradict_the_checkpoint(checkpoint, changes, message):
    given = {name: value for name, value in {**PARAMS, **changes}.items() if value is not None}
    (checkpoint.parent / "params.json").write_text(json.dumps(given))
    refuses(message, checkpoint)


def test_params_that_are_no_params(checkpoint):
    params = checkpoint.parent / "params.json"
    params.write_text("[1]")
    refuses("found a JSON list, expected an object with dim", checkpoint)
    params.write_text("{")
    refuses("cannot be read as JSON", checkpoint)
    params.unlink()
    refuses(r"params\.json: no such file: name the checkpoint's params\.json \(-p\)", checkpoint)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_checkpoints(checkpoint, share):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: int(share * len(data))])
    refuses("is not a whole checkpoint of tensors alone", checkpoint)


def test_checkpoints_that_are_something_else(tmp_path, state):
    refuses(
        r"found no tensor at all, expected a checkpoint in Meta's layout", meta_llama.save(tmp_path, [1, 2])
    )
    refuses(
        "found x, expected a checkpoint in Meta's layout", meta_llama.save(tmp_path, {"x": torch.ones(2)})
    )
    refuses("is not a whole checkpoint of tensors alone", meta_llama.save(tmp_path, {"x": PARAMS.items}))
    biased = {**state, "layers.0.attention.wq.bias": torch.ones(64)}
    refuses(r"has layers\.0\.attention\.wq\.bias, .* or it is no Llama", meta_llama.save(tmp_path, biased))
    meta_llama.save(tmp_path, state, name="consolidated.01.pth")
    refuses(r"found 2 checkpoint files \(consolidated\.01\.pth …\), expected one", tmp_path)


def test_tokenizers_that_do_not_fit(tmp_path, checkpoint):
    small = meta_llama.save_sentencepiece(tmp_path / "small.model", 200, byte_fallback=False)
    refuses(
        r"small\.model: has 200 tokens, but the model has 400; name the model's own tokenizer",
        checkpoint,
        tokenizer=small,
    )
    large = meta_llama.save_tiktoken(tmp_path / "large.model", 300)
    refuses(r"large\.model: has 556 tokens, but the model has 400", checkpoint, tokenizer=large)
    text = tmp_path / "text.model"
    text.write_text("no tokenizer")
    refuses(
        r"text\.model: is no tokenizer that can be read, expected a SentencePiece model",
        checkpoint,
        tokenizer=text,
    )
    refuses(r"nothing\.model: cannot be read", checkpoint, tokenizer=tmp_path / "nothing.model")


def test_options_of_checkpoints_alone(tmp_path):
    (tmp_path / "some.gguf").write_bytes(b"")
    with pytest.raises(PolicyError, match="params: is an option of Llama checkpoints"):
        load(tmp_path / "some.gguf", params="params.json")


def test_a_part_of_a_model_in_parts(tmp_path, state):
    for number in range(2):
        path = meta_llama.save(tmp_path, state, name=f"consolidated.0{number}.pth")
    refuses(r"consolidated\.01\.pth: is one of 2 parts of a model; use its Hugging Face folder", path)


@pytest.mark.parametrize("layout", ["plain", "tied", "bfloat16"])
def test_a_checkpoint_that_was_loaded_whole_passes_the_audit(tmp_path, state, layout):
    written = dict(state)
    if layout == "tied":
        del written["output.weight"]
    elif layout == "bfloat16":
        written = {name: value.bfloat16() for name, value in state.items()}
    assert load(meta_llama.save(tmp_path, written)).audit() == ""


@pytest.mark.parametrize(
    "weight",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.norm.weight",
    ],
)
def test_a_weight_left_at_random_is_found(checkpoint, weight):
    model = load(checkpoint)
    with torch.no_grad():
        model.module.get_parameter(weight).normal_(generator=torch.Generator().manual_seed(1))
    assert model.audit() == f"{weight}: the loaded weight differs from the one in the file"


def test_compile_refuses_a_checkpoint_whose_layers_were_mixed_up(checkpoint, tmp_path, monkeypatch):
    import doubleweave as dw
    from doubleweave.sources import llama_checkpoint

    opened = llama_checkpoint._LlamaTensors.opened

    def mixed_up(self, names):
        one, two = (f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1))
        return opened(self, [{one: two, two: one}.get(name, name) for name in names])

    monkeypatch.setattr(llama_checkpoint._LlamaTensors, "opened", mixed_up)
    with pytest.raises(
        dw.CheckError, match=r"model\.layers\.0\.mlp\.down_proj\.weight: the loaded weight differs"
    ):
        dw.compile_llm(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
