"""The program file: every piece of data once, and no half-written file taken for a whole one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import toys
from doubleweave.errors import LowerError
from doubleweave.ir.split import rows


def raw(tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """(path, split, module) of a program of embedding and head, which share their weight."""
    from doubleweave.compiler.graph.export_llm import export_llm, owned_modules
    from doubleweave.compiler.lower.lower import lower_graph, prepare
    from doubleweave.compiler.lower.pte_file import Method, ProgramWriter
    from doubleweave.compiler.lower.templates import as_they_are
    from doubleweave.compiler.split.split_llm import default_policy, split_llm

    module = toys.module(tied=True, num_layers=1)
    split = prepare(
        split_llm(
            export_llm(module, 8),
            owned_modules(module),
            policy=default_policy(rows(1, 8)),
            max_context=toys.MAX_CONTEXT,
        )
    )
    methods, weight_bytes = {}, {}
    for name in ("embed_tokens", "lm_head"):
        segment = split.split.segment(name)
        lowered = lower_graph(
            split.graphs[segment.structure], as_they_are(split.weights[name]), segment, {name: None}
        )
        methods[name] = Method(name, lowered[None]), Method(f"{name}_again", lowered[None])
    path = tmp_path_factory.mktemp("pte") / "program.pte"
    with ProgramWriter(path, [*methods["embed_tokens"], *methods["lm_head"]]) as writer:
        for name, both in methods.items():
            for method in both:
                weight_bytes[name] = writer.add(method, split.weights[name])
        digest = writer.finish()
    return path, digest, weight_bytes, module


def test_a_tied_embedding_is_in_the_file_once(tied):
    path, _, weight_bytes, module = tied
    weight = raw(module.get_input_embeddings().weight)
    assert path.read_bytes().count(weight) == 1
    assert path.stat().st_size < 2 * len(weight)
    assert all(size >= len(weight) for size in weight_bytes.values())


def test_the_digest_is_that_of_the_file(tied):
    import hashlib

    path, digest, _, _ = tied
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest


def test_methods_from_shared_data_compute_the_model(tied):
    import numpy as np

    from doubleweave import _native

    path, _, _, module = tied
    program = _native.Program(str(path))
    assert sorted(program.method_names) == ["embed_tokens", "embed_tokens_again", "lm_head", "lm_head_again"]
    weight = module.get_input_embeddings().weight.detach().numpy()
    for suffix in ("", "_again"):
        rows = np.empty((1, 3, toys.HIDDEN), np.float32)
        program.load(f"embed_tokens{suffix}").run([np.array([[5, 0, 263]])], [rows])
        assert np.array_equal(rows[0], weight[[5, 0, 263]])
        logits = np.empty((1, 3, toys.VOCAB_SIZE), np.float32)
        program.load(f"lm_head{suffix}").run([rows], [logits])
        np.testing.assert_allclose(logits[0], rows[0] @ weight.T, rtol=1e-4, atol=1e-4)


def test_every_weight_of_the_toy_is_in_its_program_once(toy_program_dir, toy_static_dir):
    for folder in (toy_program_dir, toy_static_dir):
        data = (folder / "program.pte").read_bytes()
        big = {n: t for n, t in toys.module().state_dict().items() if t.ndim == 2}
        assert len(big) == 2 + 7 * toys.NUM_LAYERS
        assert {name: data.count(raw(tensor)) for name, tensor in big.items()} == dict.fromkeys(big, 1)


@pytest.fixture
def writer(tmp_path):
    from doubleweave.compiler.lower.pte_file import ProgramWriter

    with ProgramWriter(tmp_path / "program.pte", []) as opened:
        yield opened


def test_equal_data_is_kept_once(writer):
    pieces = (b"one", b"two" * 100, b"one", b"", b"two" * 100, b"")
    assert [writer._piece(piece, is_constant=len(piece) == 3) for piece in pieces] == [0, 1, 0, 2, 1, 2]


@given(st.lists(st.tuples(st.binary(max_size=400), st.booleans()), min_size=1, max_size=8))
def test_pieces_are_aligned_and_do_not_overlap(pieces):
    import tempfile
    from pathlib import Path

    from doubleweave.compiler.lower.pte_file import ProgramWriter

    with tempfile.TemporaryDirectory() as folder, ProgramWriter(Path(folder) / "program.pte", []) as writer:
        numbers = [writer._piece(data, is_constant=is_constant) for data, is_constant in pieces]
        writer.finish()
        written = (Path(folder) / "program.pte").read_bytes()[writer._base :]
    assert len(written) == writer._end
    ends = 0
    for number in sorted(set(numbers), key=lambda number: writer._places[number]):
        place = writer._places[number]
        assert place.offset % 128 == 0
        assert place.offset >= ends
        ends = place.offset + place.size
    for number, (data, _) in zip(numbers, pieces, strict=True):
        place = writer._places[number]
        assert written[place.offset : place.offset + place.size] == data


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "/dev/full",
            r"cannot be written: the disk is full, behind \d MiB of the program: free some space or choose",
        ),
        ("/nothing/here/program.pte", "cannot be written: No such file or directory.*choose another folder"),
    ],
)
def test_a_file_that_cannot_be_written(path, message):
    from pathlib import Path

    from doubleweave.compiler.lower.pte_file import ProgramWriter

    def write():
        with ProgramWriter(Path(path), []) as writer:
            writer._piece(bytes(2_000_000))
            writer.finish()

    with pytest.raises(LowerError, match=message):
        write()
