"""What works here and what is missing, in words and as data."""

from __future__ import annotations

import json

import pytest

from doubleweave.cli import doctor
from doubleweave.errors import BackendError
from doubleweave.vendors import qnn
from doubleweave.vendors.qnn_sdk import INSTALL, SOCS, Sdk


def test_a_found_sdk_is_described(monkeypatch, tmp_path):
    sdk = Sdk("onnxruntime-qnn", tmp_path, (2, 51), "2.51.0.260929181845")
    monkeypatch.setattr(qnn, "load_sdk", lambda: sdk)
    found = doctor.examine()
    about = found["backends"]["qnn"]
    assert (about["works"], about["sdk"], about["forwarded"], about["socs"]) == (
        True,
        sdk.build,
        True,
        list(SOCS),
    )
    (line,) = (line for line in doctor.lines_of(found) if line.startswith("backend qnn"))
    assert "works; SDK 2.51.0.260929181845 (onnxruntime-qnn), behind the forwarding library" in line
    json.dumps(found)


def test_an_sdk_that_executorch_was_built_for_is_used_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(qnn, "load_sdk", lambda: Sdk("QNN_SDK_ROOT", tmp_path, (2, 37), "2.37.0.1"))
    assert any("used as it is" in line for line in doctor.lines_of(doctor.examine()))


@pytest.mark.parametrize("message", ["no libraries", f"no libraries; {INSTALL}"])
def test_what_is_missing_comes_with_what_to_install(monkeypatch, message):
    def missing() -> Sdk:
        raise BackendError(message)

    monkeypatch.setattr(qnn, "load_sdk", missing)
    (line,) = (line for line in doctor.lines_of(doctor.examine()) if line.startswith("backend qnn"))
    assert line == f"backend qnn: does not work here: no libraries; {INSTALL}"


def test_packages_that_compiling_needs(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: "not installed")
    assert doctor._compiling() == {
        "works": False,
        "missing": "torch, transformers, torchao; run: pip install 'doubleweave[compile]'",
    }
