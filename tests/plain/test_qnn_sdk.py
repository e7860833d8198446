"""Which of Qualcomm's libraries is found, and what is said where none fits: on folders made up for it."""

from __future__ import annotations

import pytest

from doubleweave.errors import BackendError
from doubleweave.vendors import qnn_sdk


@pytest.fixture
def nothing(monkeypatch, tmp_path):
    """No SDK of any kind is installed."""
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)
    monkeypatch.setenv("QNN_STAGING_DIR", str(tmp_path / "staged"))
    monkeypatch.setattr(qnn_sdk, "find_spec", lambda name: None)
    qnn_sdk.find_sdk.cache_clear()
    yield
    qnn_sdk.find_sdk.cache_clear()


def make_sdk(root, version):
    folder = root / "lib" / "x86_64-linux-clang"
    folder.mkdir(parents=True)
    (folder / "libQnnHtp.so").write_bytes(b"\x7fELF..." + f"v{version}.260601114230\0".encode())
    return root


def found_error():
    with pytest.raises(BackendError) as caught:
        qnn_sdk.find_sdk()
    return str(caught.value)


def test_nothing_installed_says_what_to_install(nothing):
    assert found_error() == f"Qualcomm's QNN libraries are not installed; {qnn_sdk.INSTALL}"


def test_the_sdk_of_qnn_sdk_root_comes_first(nothing, monkeypatch, tmp_path):
    make_sdk(tmp_path / "staged" / "sdk-2.37.0.250724", "2.37.0")
    monkeypatch.setenv("QNN_SDK_ROOT", str(make_sdk(tmp_path / "mine", "2.47.0")))
    found = qnn_sdk.find_sdk()
    assert (found.origin, found.version, found.is_forwarded) == ("QNN_SDK_ROOT", (2, 47), True)


def test_what_executorch_has_downloaded_is_found_and_used_as_it_is(nothing, tmp_path):
    make_sdk(tmp_path / "staged" / "sdk-2.37.0.250724", "2.37.0")
    found = qnn_sdk.find_sdk()
    assert (found.origin, found.build) == ("downloaded by ExecuTorch", "2.37.0.260601114230")
    assert not found.is_forwarded


def test_a_root_without_the_library_is_not_passed_over(nothing, monkeypatch, tmp_path):
    monkeypatch.setenv("QNN_SDK_ROOT", str(tmp_path))
    assert "found no libQnnHtp.so in" in found_error()


@pytest.mark.parametrize(("version", "kind"), [("2.20.0", "old"), ("2.99.0", "new")])
def test_an_sdk_that_is_too_old_or_too_new_is_refused(nothing, monkeypatch, tmp_path, version, kind):
    monkeypatch.setenv("QNN_SDK_ROOT", str(make_sdk(tmp_path, version)))
    assert (
        f"QNN SDK {version}.260601114230 (QNN_SDK_ROOT) is too {kind}: expected 2.28 to 2.51" in found_error()
    )


def test_a_library_without_a_version_is_refused(nothing, monkeypatch, tmp_path):
    root = make_sdk(tmp_path, "2.47.0")
    (root / "lib" / "x86_64-linux-clang" / "libQnnHtp.so").write_bytes(b"nothing")
    monkeypatch.setenv("QNN_SDK_ROOT", str(root))
    assert "does not say its version" in found_error()
