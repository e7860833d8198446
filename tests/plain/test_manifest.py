"""manifest.json: it reads back what was written and refuses everything else with a way out."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import toys
from doubleweave.errors import ProgramError
from doubleweave.ir import manifest
from doubleweave.ir.manifest import MANIFEST_FILE, PROGRAM_FILE, Manifest
from doubleweave.ir.seal import sealed
from doubleweave.ir.split import rows

PROGRAM = bytes(range(256)) * 8


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path)


def make(folder):
    (folder / PROGRAM_FILE).write_bytes(PROGRAM)
    written().write(folder)
    return folder


def written() -> Manifest:
    digest = hashlib.sha256(PROGRAM).hexdigest()
    split = toys.split(2, rows(1, 8))
    model = toys.model_info(vocab_size=16, max_context=64, eos_token_ids=(3,))
    return Manifest("toy", model, split, digest, len(PROGRAM), "", {"doubleweave": "0.1.0"}, None)


def change(folder, edit):
    path = folder / MANIFEST_FILE
    data = json.loads(path.read_text())
    del data["seal"]
    edit(data)
    path.write_bytes(sealed(data))


def test_reads_back(folder):
    assert manifest.read(folder) == written()


def test_missing_folder(tmp_path):
    with pytest.raises(ProgramError, match=r"no such program folder; make one with: doubleweave compile"):
        manifest.read(tmp_path / "nothing")


@pytest.mark.parametrize("name", [MANIFEST_FILE, PROGRAM_FILE])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(ProgramError, match=name):
        manifest.read(folder)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"not JSON", b"\xff\xfe\x00", b"\x00" * 9, b'{"a": NaN,}', b"[" * 5000], ids=repr
)
def test_not_json(folder, data):
    (folder / MANIFEST_FILE).write_bytes(data)
    with pytest.raises(ProgramError, match=r"is not JSON .*; compile the program again"):
        manifest.read(folder)


@pytest.mark.parametrize("data", ["[]", "null", "3", '"text"', "{}", '{"format": "other"}'])
def test_json_of_something_else(folder, data):
    (folder / MANIFEST_FILE).write_text(data)
    with pytest.raises(
        ProgramError, match=r"is not a doubleweave-program manifest; expected a folder made by"
    ):
        manifest.read(folder)


@pytest.mark.parametrize("version", [0, 1, 8, "9", None, 1.5])
def test_other_version(folder, version):
    change(folder, lambda data: data.update(version=version))
    with pytest.raises(ProgramError, match=r"found version .*, expected 9; compile the program again"):
        manifest.read(folder)


@pytest.mark.parametrize(
    "where",
    [
        (),
        ("model",),
        ("split",),
        ("split", "segments", 0),
        ("split", "functions", 0),
        ("split", "functions", 0, "calls", 0),
    ],
)
def test_unknown_key(folder, where):
    def edit(data):
        for step in where:
            data = data[step]
        data["surprise"] = 1

    change(folder, edit)
    with pytest.raises(ProgramError, match=r"surprise.*compile the program again"):
        manifest.read(folder)


@pytest.mark.parametrize("key", ["program_sha256", "program_bytes", "made_with", "model", "split"])
def test_missing_key(folder, key):
    change(folder, lambda data: data.pop(key))
    with pytest.raises(ProgramError, match=f"key '{key}' is missing; compile the program again"):
        manifest.read(folder)


@given(st.data())
def test_any_damage_is_refused_or_harmless(tmp_path_factory, data):
    """Replace or remove anything in the manifest: a ProgramError, or a manifest of the types it declares."""
    folder = make(tmp_path_factory.mktemp("damaged"))
    whole = json.loads((folder / MANIFEST_FILE).read_text())
    del whole["seal"]
    at, path = whole, []
    while isinstance(at, dict | list) and at and (not path or data.draw(st.booleans())):
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        path.append(key)
        parent, at = at, at[key]
    junk = data.draw(st.sampled_from([None, -1, 1.5, "junk", [], {}, [None], {"a": 1}, True]))
    if data.draw(st.booleans()):
        parent[path[-1]] = junk
    else:
        del parent[path[-1]]
    (folder / MANIFEST_FILE).write_bytes(sealed(whole))
    try:
        found = manifest.read(folder)
    except ProgramError as error:
        message = str(error)
    else:
        check_usable(found)
        return
    assert str(folder) in message
    assert "\n" not in message


def check_usable(found: Manifest) -> None:
    assert isinstance(found.model.max_context, int)
    assert found.model.max_context >= 1
    assert all(isinstance(token, int) for token in found.model.eos_token_ids)
    for call in found.split.calls:
        assert call.callee == "segment"
        segment = found.split.segment(call.segment)
        assert len(call.reads) == len(segment.inputs)
        assert len(call.writes) == len(segment.outputs)
        assert all(found.split.main.value(name).row_bytes > 0 for name in (*call.reads, *call.writes))


@given(st.integers(0, len(PROGRAM) - 1), st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory, position, bit):
    folder = make(tmp_path_factory.mktemp("flipped"))
    damaged = bytearray(PROGRAM)
    damaged[position] ^= 1 << bit
    (folder / PROGRAM_FILE).write_bytes(damaged)
    with pytest.raises(ProgramError, match=r"program\.pte: its SHA-256 is .*; compile it again"):
        manifest.read(folder)


@given(st.integers(0, len(PROGRAM) - 1))
def test_any_truncation_is_found(tmp_path_factory, length):
    folder = make(tmp_path_factory.mktemp("short"))
    (folder / PROGRAM_FILE).write_bytes(PROGRAM[:length])
    with pytest.raises(ProgramError, match=f"found {length} bytes, the manifest says {len(PROGRAM)}"):
        manifest.read(folder)
