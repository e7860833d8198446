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
    from doubleweave.compiler.lower.pte_file import ProgramWriter
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
    writer = ProgramWriter()
    weight_bytes = {}
    for name in ("embed_tokens", "lm_head"):
        segment = split.split.segment(name)
        template = lower_graph(split.graphs[segment.structure], split.weights[name], segment, {name: None})[
            None
        ]
        weight_bytes[name] = writer.add(name, template, split.weights[name])
        writer.add(f"{name}_again", template, split.weights[name])
    path = tmp_path_factory.mktemp("pte") / "program.pte"
    digest = writer.write(path)
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


def test_equal_data_is_kept_once():
    from doubleweave.compiler.lower.pte_file import _Data

    data = _Data()
    pieces = [data.add(piece) for piece in (b"one", b"two" * 100, b"one", b"", b"two" * 100, b"")]
    assert pieces == [0, 1, 0, 2, 1, 2]
    assert data.pieces == [b"one", b"two" * 100, b""]


@given(st.data())
def test_pieces_are_aligned_and_do_not_overlap(data):
    from doubleweave.compiler.lower.pte_file import _layout, _padded

    pieces = data.draw(st.lists(st.binary(max_size=400), min_size=1, max_size=8))
    order = data.draw(st.permutations(range(len(pieces))))
    offsets, size = _layout(pieces, order)
    written = b"".join(_padded([pieces[index] for index in order]))
    assert len(written) == size
    assert all(offset % 128 == 0 for offset in offsets)
    for offset, piece in zip(offsets, pieces, strict=True):
        assert written[offset : offset + len(piece)] == piece


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "/dev/full",
            r"cannot be written: the disk is full; the program takes 1 MiB: free some space or choose",
        ),
        ("/nothing/here/program.pte", "cannot be written: No such file or directory.*choose another folder"),
    ],
)
def test_a_file_that_cannot_be_written(path, message):
    from pathlib import Path

    from doubleweave.compiler.lower.pte_file import ProgramWriter

    writer = ProgramWriter()
    writer._data.add(bytes(200_000))
    with pytest.raises(LowerError, match=message):
        writer.write(Path(path))
