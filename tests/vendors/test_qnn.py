"""The QNN backend with Qualcomm's real compiler and its emulator, on a small model; skipped where they are missing.

What needs neither (options, recipes, rewriting) is tested everywhere. CHIPS=all compiles for every chip.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import toys
from doubleweave.errors import BackendError, CheckError, LowerError, PolicyError, ProgramError
from doubleweave.ir import manifest
from doubleweave.ir.seal import sealed
from doubleweave.ir.split import FixedSizes

SIZES = (1, 8)
# The other tests compile for the second; chips differ in a number that Qualcomm's compiler is given.
CHIPS = ["SM8550", "SM8650", "SM8750", "SM8850"] if os.environ.get("CHIPS") == "all" else ["SM8650", "SM8850"]


def sdk_or_skip():
    from doubleweave.vendors.qnn_sdk import find_sdk

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
def programs(made_once, ids_file):
    """The toy with two layers, compiled for a chip or for the emulator, each once."""
    sdk_or_skip()

    def program(**options):
        options = {"soc": "SM8650"} | options
        name = "qnn_" + re.sub(r"\W+", "_", str(sorted(options.items())))
        return made_once(name, lambda folder: compile_toy(folder, ids_file, **options))

    return program


def compile_toy(folder, ids_file, **options):
    import doubleweave

    options = {"soc": "SM8650", "quantize": "16a8w", "chunk": SIZES, "calibrate": ids_file} | options
    return doubleweave.compile_llm(toys.model(num_layers=2), folder, backend="qnn", **options)


def test_the_emulator_is_held_against_the_quantized_split(programs):
    check = manifest.read(programs(emulate=True)).check
    assert (check.ran, check.reason, check.num_tokens) == ("program", "", SIZES[1])
    assert check.source_off < 5e-5
    assert 0 < check.segment_noise < 0.01
    assert 0 < check.logits_noise < 0.01
    assert 0 < check.top1 <= 1


def test_blocks_of_4_bits_on_the_emulator(programs):
    found, wide = (
        manifest.read(programs(quantize="16a4w_block", emulate=True)),
        manifest.read(programs(emulate=True)),
    )
    assert found.check.ran == "program"
    assert found.check.segment_noise < 0.05
    recipes = {s.name: s.recipe for s in found.split.segments if s.backend == "qnn"}
    assert recipes == {
        "block_0": "16a4w_block",
        "block_1": "16a4w_block",
        "block_2": "16a4w_block",
        "lm_head": "16a8w",
    }
    noise = {s.name: s.snr_db for s in found.split.segments}
    assert all(noise[name] > 12 for name in recipes)
    assert found.check.kl < 20 * wide.check.kl


def test_a_chips_build_is_checked_as_a_split(programs):
    check = manifest.read(programs()).check
    assert check.ran == "split"
    assert "which the emulator on this machine cannot run" in check.reason
    assert check.segment_noise is check.logits_noise is None


def test_wrong_weights_are_found_on_the_emulator(tmp_path, ids_file, monkeypatch):
    from dataclasses import replace

    from doubleweave.compiler.lower import lower as lower_module

    sdk_or_skip()
    right = lower_module.lower

    def lower(torch_split, *given):
        weights = dict(torch_split.weights)
        weights["lm_head"] = tuple(
            tensor.flip(0) if tensor.ndim == 2 else tensor for tensor in weights["lm_head"]
        )
        return right(replace(torch_split, weights=weights), *given)

    monkeypatch.setattr(lower_module, "lower", lower)
    with pytest.raises(CheckError, match="segment lm_head of the program gives other numbers"):
        compile_toy(tmp_path / "out", ids_file, emulate=True)
    assert not (tmp_path / "out").exists()


def contexts_of(folder):
    """The names of the graphs in each context binary of a program file, by the methods that use it; read in a process
    of its own."""
    script = """
import json, sys
from pathlib import Path
from doubleweave.vendors.qnn_sdk import load_sdk
import torch
from executorch.exir._serialize._program import deserialize_pte_binary
load_sdk()
from doubleweave.compiler.backends.qnn.lower import graphs_of
program = deserialize_pte_binary(Path(sys.argv[1]).read_bytes()).program
found = {}
for plan in program.execution_plan:
    for delegate in plan.delegates:
        if delegate.id == "QnnBackend":
            data = program.backend_delegate_data[delegate.processed.index].data
            found[plan.name] = graphs_of(delegate.compile_specs[0].value, data), len(data)
print("RESULT" + json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder / "program.pte")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.split("RESULT")[1])


@pytest.mark.parametrize("soc", CHIPS)
def test_every_static_segment_is_one_context_binary(programs, soc):
    split = manifest.read(programs(soc=soc)).split
    on_npu = [segment for segment in split.segments if segment.device == "npu"]
    assert [segment.name for segment in on_npu] == ["block_0", "block_1", "block_2", "lm_head"]
    for segment in on_npu:
        assert (segment.backend, segment.target, segment.recipe) == ("qnn", soc, "16a8w")
        assert segment.num_delegated == segment.num_operators
        assert segment.snr_db > 20
        assert [traffic.size for traffic in segment.traffic] == list(SIZES)
        assert all(traffic.read > 0 and traffic.written > 0 for traffic in segment.traffic)
    others = [segment.name for segment in split.segments if segment.device == "cpu"]
    assert others == ["embed_tokens", "rotary", "attention"]


def test_a_budget_gives_the_noisiest_segments_8_bits(tmp_path):
    import torch

    sdk_or_skip()
    with torch.no_grad():  # what the model finds likeliest: noise makes it less likely
        ids = toys.module(num_layers=2).generate(
            torch.tensor([[5, 9, 7]]), max_new_tokens=45, do_sample=False, eos_token_id=None
        )
    text = tmp_path / "ids.json"
    text.write_text(json.dumps(ids[0].tolist()))

    def of_4_bits(budget):
        segments = eager_reference(text, "16a4w_block", budget).split.segments
        return {s.name: s.snr_db for s in segments if s.recipe == "16a4w_block"}, {s.name for s in segments}

    all_of, names = of_4_bits("1000")
    assert sorted(all_of) == ["block_0", "block_1", "block_2"]
    with pytest.raises(PolicyError, match="with all of these segments in 8 bits perplexity rises by"):
        of_4_bits(0.0005)
    some, same_names = of_4_bits(0.03)
    assert same_names == names
    assert len(some) < len(all_of)
    kept = all_of.keys() - some.keys()
    assert max(all_of[name] for name in kept) <= min((all_of[name] for name in some), default=float("inf"))


def test_on_the_chip_prefill_and_decode_share_one_context(programs):
    on_chip, emulated = contexts_of(programs()), contexts_of(programs(emulate=True))
    for segment in ("block_0", "block_1", "block_2", "lm_head"):
        methods = [f"{segment}@{size}" for size in SIZES]
        for method in methods:
            assert sorted(on_chip[method][0]) == sorted(methods)
            assert emulated[method][0] == [method]
        # Two graphs with the weights once: smaller than both by themselves.
        assert on_chip[methods[0]][1] < sum(emulated[method][1] for method in methods)
    assert manifest.read(programs()).split.segment("block_1").contexts == 1
    assert manifest.read(programs(emulate=True)).split.segment("block_1").contexts == len(SIZES)


def eager_reference(ids_file, recipe="16a8w", budget=None, **options):
    """The same quantized segments, in eager torch."""
    import tempfile

    from doubleweave.compiler.backends import backends, own_options
    from doubleweave.compiler.backends.backend import Options
    from doubleweave.compiler.pipeline_llm import splits_of

    qnn = backends()["qnn"]
    given = {"soc": "SM8650", "calibrate": ids_file, "emulate": True, "budget": budget}
    own = qnn.check(recipe, "dynamic", own_options(qnn, "dynamic", given))
    options = Options(qnn, recipe, FixedSizes(SIZES), toys.MAX_CONTEXT, own=own, **options)
    with tempfile.TemporaryDirectory() as folder:
        return splits_of(toys.model(num_layers=2), options, Path(folder), lambda *step: None).lowered


def test_the_emulator_gives_the_quantized_references_tokens(programs, ids_file):
    import torch

    import doubleweave
    from doubleweave.compiler.split.eager import run_eager

    program = doubleweave.open(programs(emulate=True))
    ids = list(np.random.default_rng(1).integers(0, toys.VOCAB_SIZE, 13))  # two chunks
    session = program.session("pipelined", workers=("npu", "cpu"))
    tokens = [int(session.append(ids, record=True).argmax())]
    assert {event.worker for event in session.timeline.events} == {0, 1}
    while len(tokens) < 16:
        tokens.append(int(session.append([tokens[-1]]).argmax()))
    # All tokens at once: the reference's rows do not depend on the chunks.
    everything = torch.tensor([[*map(int, ids), *tokens[:-1]]])
    expected = run_eager(eager_reference(ids_file), everything, 8)[0, len(ids) - 1 :].argmax(dim=1)
    assert tokens == expected.tolist()


@pytest.mark.parametrize("chunk", [SIZES, (1,)])
def test_all_static_on_the_emulator(programs, chunk):
    import doubleweave

    folder = programs(emulate=True, attention="static", max_context=64, chunk=chunk)
    program = doubleweave.open(folder)
    assert [s.name for s in program.split.segments if s.backend == "qnn"] == ["block_0", "lm_head"]
    reference = doubleweave.open(programs(emulate=True))
    ids = np.random.default_rng(1).integers(0, toys.VOCAB_SIZE, 13)
    found, expected = (p.session("sequential", 1).append(ids) for p in (program, reference))
    assert found.argmax() == expected.argmax()
    assert (
        np.abs(found - expected).max() / np.abs(expected).max() < 0.1
    )  # 16-bit scores, with the mask in their scale


def test_dynamic_attention_on_the_npu_is_refused_with_qnns_own_reason(tmp_path, ids_file):
    sdk_or_skip()
    with pytest.raises(LowerError) as caught:
        compile_toy(tmp_path / "out", ids_file, attention_device="npu")
    text = str(caught.value)
    assert text.startswith("segment attention, with sizes that change from call to call: QNN refuses it (")
    assert "ynamic" in text.split("(")[1]  # QNN's words
    assert text.endswith(
        "leave it on the CPU (--attention-device cpu), or compile it for fixed sizes (--attention static "
        "--max-context N)"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_kept_segment_is_another_recipes_or_the_cpus(programs):
    import doubleweave

    kept = {"block_1": "cpu", "lm_head": "8a8w"}
    program = doubleweave.open(programs(emulate=True, keep=kept))
    segments = {segment.name: segment for segment in program.split.segments}
    assert (segments["block_1"].backend, segments["block_1"].device) == ("xnnpack", "cpu")
    assert (segments["lm_head"].recipe, segments["block_0"].recipe) == ("8a8w", "16a8w")
    assert segments["lm_head"].snr_db < segments["block_0"].snr_db
    assert np.isfinite(program.session("sequential", 1).append([1, 2, 3])).all()


def refuse(monkeypatch, reason):
    """Let QNN refuse every segment but for the first."""
    from doubleweave.compiler.backends.qnn import lower as qnn

    lower = qnn._to_edge

    def refusing(exported, target):
        if "block_1@8" not in exported:
            return lower(exported, target)
        os.write(2, f"[ERROR] [Qnn ExecuTorch]: {reason}\n".encode())
        os.write(
            2, b"[ERROR] [Qnn ExecuTorch]:  <E> Failed to validate op aten_tan_default with error 0xc26\n"
        )
        raise RuntimeError("QNN says no")

    monkeypatch.setattr(qnn, "_to_edge", refusing)


def test_what_the_htp_refuses_is_named_with_its_segment_and_the_way_out(tmp_path, ids_file, monkeypatch):
    sdk_or_skip()
    refuse(monkeypatch, "Op specific reason")
    with pytest.raises(LowerError) as caught:
        compile_toy(tmp_path / "out", ids_file, emulate=True)
    assert str(caught.value) == (
        "segment block_1@8: QNN refuses it (aten_tan_default: Op specific reason); keep it on the CPU: "
        "--keep block_1=cpu"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_crashes_leaves_an_error_and_nothing_half_written(tmp_path, ids_file, monkeypatch):
    from doubleweave.compiler.backends.qnn import lower as qnn

    sdk_or_skip()
    monkeypatch.setattr(qnn, "_to_edge", lambda exported, target: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(LowerError, match="ended in the middle: its compiler crashed"):
        compile_toy(tmp_path / "out", ids_file, emulate=True)
    assert list(tmp_path.iterdir()) == []


def damaged(source, folder, damage):
    """A copy of a program with its first context damaged, and a manifest that believes it."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    shutil.copytree(source, folder)
    data = (folder / "program.pte").read_bytes()
    program = deserialize_pte_binary(data).program
    delegates = [d for plan in program.execution_plan for d in plan.delegates if d.id == "QnnBackend"]
    context = bytes(program.backend_delegate_data[delegates[0].processed.index].data)
    at = data.index(context)
    changed = data[:at] + damage(context) + data[at + len(context) :]
    (folder / "program.pte").write_bytes(changed)
    text = json.loads((folder / "manifest.json").read_text())
    text["program_sha256"] = hashlib.sha256(changed).hexdigest()
    del text["seal"]
    (folder / "manifest.json").write_bytes(sealed(text))
    return folder


@pytest.mark.parametrize("kept", [0, 512, 0.5])
def test_a_truncated_context_is_an_error(programs, tmp_path, ids_file, kept):
    def cut(context):
        size = int(kept if kept > 1 else kept * len(context))
        return context[:size] + bytes(len(context) - size)

    folder = damaged(programs(emulate=True), tmp_path / "program", cut)
    done = subprocess.run(
        [sys.executable, "-m", "doubleweave.cli", "run", str(folder), "--token-ids", str(ids_file), "-n", "2"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "block_0@" in done.stderr
    assert "the context is damaged or of another SDK; compile it again" in done.stderr


def test_a_chips_build_does_not_run_on_the_emulator(programs):
    import doubleweave

    with pytest.raises(ProgramError, match=r"compiled for the chip SM8650: .* compile it with --emulate"):
        doubleweave.open(programs())


def test_loading_in_turns_many_times_over(programs, ids_file):
    """Two methods of QNN loaded at once crash most of the time."""
    folder = programs(emulate=True)
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-m", "doubleweave.cli", "run", str(folder), "--token-ids", str(ids_file), "-n", "2"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Qnn ExecuTorch" not in done.stderr + done.stdout
        assert "of 6 done" in done.stderr


def test_torch_can_be_imported_behind_qualcomms_libraries(programs):
    script = (
        "import sys, doubleweave; doubleweave.open(sys.argv[1]); import torch; print(torch.ones(2).sum())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(programs(emulate=True))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]


def test_inspect_says_which_build_it_is(programs):
    from doubleweave.cli.show_program import inspect_dict, inspect_table

    chip, emulated = (manifest.read(programs(**options)) for options in ({}, {"emulate": True}))
    build = {"soc": "SM8650", "build": "chip", "contexts": 4, "most_contexts": 50}
    assert inspect_dict(chip)["qnn"] == build
    assert inspect_dict(emulated)["qnn"] == {**build, "build": "emulator", "contexts": 8}
    assert "QNN: built for the chip, SM8650" in inspect_table(chip)
    assert "8 contexts, of about 50" in inspect_table(emulated)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"backend": "npu"}, "backend: found 'npu', expected one of xnnpack, qnn, openvino"),
        ({"backend": "qnn"}, "soc: qnn compiles for one chip; name it, such as SM8650"),
        (
            {"backend": "qnn", "soc": "SM1"},
            "soc: found 'SM1', expected one of SM8550, SM8650, SM8750, SM8850",
        ),
        (
            {"backend": "qnn", "soc": "SM8650", "quantize": "8da8w"},
            "quantize: found '8da8w', expected one of 16a8w, 16a4w_block, 16a4w, 8a8w for qnn",
        ),
        (
            {"backend": "qnn", "soc": "SM8650", "shape": "bounded"},
            "shape: found 'bounded', but qnn takes fixed sizes only; use static or leave it out",
        ),
        (
            {"backend": "qnn", "soc": "SM8650", "budget": 0.05},
            "budget: found it for 16a8w, expected one of 16a4w_block, 16a4w; leave it out",
        ),
        (
            {"backend": "qnn", "soc": "SM8650", "quantize": "16a4w", "budget": "5%"},
            "budget: found '5%', expected how much perplexity may rise, such as 0.05 for 5 percent",
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
    from doubleweave.compiler.backends.qnn.quantize import recipes_of

    names = ["block_0", "block_1", "lm_head"]
    found = recipes_of(names, "16a4w", {"block_*": "16a8w", "block_1": "cpu"})
    assert found == {"block_0": "16a8w", "block_1": "cpu", "lm_head": "16a4w"}
    found = recipes_of(names, "16a4w_block", {"block_1": "16a4w"})
    assert found == {"block_0": "16a4w_block", "block_1": "16a4w", "lm_head": "16a8w"}
    with pytest.raises(PolicyError, match=r"keep: .layer_0. matches no segment; expected block_0 to lm_head"):
        recipes_of(names, "16a4w", {"layer_0": "16a8w"})
    with pytest.raises(PolicyError, match="keep: found '4a4w'"):
        recipes_of(names, "16a4w", {"block_0": "4a4w"})


def test_rewriting_for_qnn_changes_no_numbers():
    import torch

    from doubleweave.compiler.backends.qnn import lower as qnn
    from doubleweave.compiler.graph.export_llm import export_llm, owned_modules
    from doubleweave.compiler.split.eager import run_eager
    from doubleweave.compiler.split.split_llm import default_policy, split_llm
    from doubleweave.compiler.split.transform import transform_segments
    from doubleweave.ir.split import FixedSizes

    module = toys.module()
    graph = export_llm(module, 8)
    split = split_llm(
        graph,
        owned_modules(module),
        default_policy(FixedSizes((1, 8))),
        max_context=toys.MAX_CONTEXT,
    )
    rewritten = transform_segments(split, qnn.prepare)
    ids = torch.arange(11)[None]
    targets = [str(node.target) for g in rewritten.graphs.values() for node in g.graph.nodes]
    assert "doubleweave.rotary.default" not in targets
    assert "aten.rsqrt.default" not in targets
    assert "aten.rms_norm.default" in targets
    torch.testing.assert_close(run_eager(rewritten, ids, 4), run_eager(split, ids, 4), atol=1e-5, rtol=1e-5)
