"""The QNN backend with Qualcomm's real compiler and its emulator, on a small model; skipped where they are missing.

What needs neither (options, recipes, rewriting) is tested everywhere.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

import toys
from doubleweave.errors import BackendError, PolicyError

pytestmark = pytest.mark.executorch

SIZES = (1, 8)


def sdk_or_skip():
    from doubleweave.qnn_sdk import find_sdk

    try:
        return find_sdk()
    except BackendError as error:
        pytest.skip(f"no QNN here: {error}")


@pytest.fixture(scope="module")
def ids_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "ids.json"
    ids = np.random.default_rng(0).integers(0, toys.VOCAB_SIZE, 48)
    path.write_text(json.dumps(ids.tolist()))
    return path


@pytest.fixture(scope="module")
def programs(tmp_path_factory, ids_file):
    """The toy with two layers, compiled for a chip, once."""
    import doubleweave

    sdk_or_skip()
    made = {}

    def program(soc="SM8650", recipe="16a8w", emulate=False):
        key = (soc, recipe, emulate)
        if key not in made:
            folder = tmp_path_factory.mktemp("qnn") / "program"
            doubleweave.compile_llm(
                toys.model(num_layers=2),
                folder,
                backend="qnn",
                soc=soc,
                quantize=recipe,
                chunk=SIZES,
                calibrate=ids_file,
                emulate=emulate,
            )
            made[key] = folder
        return made[key]

    return program


@pytest.mark.parametrize("soc", ["SM8550", "SM8650", "SM8750", "SM8850"])
def test_every_static_segment_is_one_context_binary(programs, soc):
    import doubleweave

    program = doubleweave.open(programs(soc))
    on_npu = [segment for segment in program.split.segments if segment.device == "npu"]
    assert [segment.name for segment in on_npu] == ["block_0", "block_1", "block_2", "lm_head"]
    for segment in on_npu:
        assert (segment.backend, segment.target, segment.recipe) == ("qnn", soc, "16a8w")
        assert segment.num_delegated == segment.num_operators
        assert segment.snr_db > 20
    others = [segment.name for segment in program.split.segments if segment.device == "cpu"]
    assert others == ["embed_tokens", "rotary", "attention"]


def test_the_emulator_gives_the_quantized_references_tokens(programs):
    import doubleweave

    program = doubleweave.open(programs(emulate=True))
    prompt = np.random.default_rng(1).integers(0, toys.VOCAB_SIZE, 13)  # two chunks
    session = program.session("pipelined", workers=("npu", "cpu"))
    logits = session.append(prompt, record=True)
    assert np.isfinite(logits).all()
    workers = {event.worker for event in session.timeline.events}
    assert len(workers) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"backend": "npu"}, "backend: found 'npu', expected one of xnnpack, qnn"),
        ({"backend": "qnn"}, "soc: qnn compiles for one chip; name it, such as SM8650"),
        (
            {"backend": "qnn", "soc": "SM1"},
            "soc: found 'SM1', expected one of SM8550, SM8650, SM8750, SM8850",
        ),
        (
            {"backend": "qnn", "soc": "SM8650", "quantize": "8da8w"},
            "quantize: found '8da8w', expected one of 16a8w, 16a4w, 8a8w for qnn",
        ),
        (
            {"backend": "qnn", "soc": "SM8650", "shape": "bounded"},
            "shape: found 'bounded', but qnn takes fixed sizes only; use static or leave it out",
        ),
        ({"soc": "SM8650"}, "soc: is an option of the qnn backend; add backend qnn or leave it out"),
        ({"quantize": "16a8w"}, "quantize: found '16a8w', expected one of 8da8w, 8da4w, none for xnnpack"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, options, sentence):
    import doubleweave

    with pytest.raises(PolicyError) as caught:
        doubleweave.compile_llm(toys.model(), tmp_path / "out", **options)
    assert str(caught.value) == sentence
    assert not (tmp_path / "out").exists()


def test_recipes_go_by_the_last_pattern_that_matches():
    from doubleweave.backends.qnn_quantize import recipes_of

    names = ["block_0", "block_1", "lm_head"]
    found = recipes_of(names, "16a4w", {"block_*": "16a8w", "block_1": "cpu"})
    assert found == {"block_0": "16a8w", "block_1": "cpu", "lm_head": "16a4w"}
    with pytest.raises(PolicyError, match=r"keep: .layer_0. matches no segment; expected block_0 to lm_head"):
        recipes_of(names, "16a4w", {"layer_0": "16a8w"})
    with pytest.raises(PolicyError, match="keep: found '4a4w'"):
        recipes_of(names, "16a4w", {"block_0": "4a4w"})


def test_rewriting_for_qnn_changes_no_numbers():
    import torch

    from doubleweave.backends import qnn
    from doubleweave.eager import run_eager
    from doubleweave.export import export_llm, owned_modules
    from doubleweave.ir import Static
    from doubleweave.split_llm import default_policy, split_llm
    from doubleweave.transform import transform_segments

    module = toys.module()
    graph = export_llm(module, 8)
    split = split_llm(
        graph,
        owned_modules(module),
        default_policy(Static((1, 8))),
        last_row=frozenset({"lm_head"}),
        max_context=toys.MAX_CONTEXT,
        backend="xnnpack",
    )
    rewritten = transform_segments(split, qnn.prepare)
    ids = torch.arange(11)[None]
    targets = [str(node.target) for g in rewritten.graphs.values() for node in g.graph.nodes]
    assert "doubleweave.rotary.default" not in targets
    assert "aten.rsqrt.default" not in targets
    assert "aten.rms_norm.default" in targets
    torch.testing.assert_close(run_eager(rewritten, ids, 4), run_eager(split, ids, 4), atol=1e-5, rtol=1e-5)
