"""A QNN library that cannot be loaded: an error and no crash."""

from __future__ import annotations

import pytest

from doubleweave.errors import BackendError
from doubleweave.vendors import qnn_sdk


def test_a_library_that_cannot_be_loaded_is_an_error_and_no_crash(monkeypatch, tmp_path):
    folder = tmp_path / "lib" / "x86_64-linux-clang"
    folder.mkdir(parents=True)
    (folder / "libQnnHtp.so").write_bytes(b"\x7fELF...v2.37.0.260601114230\0")
    monkeypatch.setenv("QNN_SDK_ROOT", str(tmp_path))
    qnn_sdk.find_sdk.cache_clear()
    with pytest.raises(BackendError, match="cannot be loaded"):
        qnn_sdk.load_sdk()
    qnn_sdk.find_sdk.cache_clear()
