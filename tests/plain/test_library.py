"""What the run time knows of a backend's library, and what it takes for granted of one without a vendor's."""

from __future__ import annotations

import pytest

from doubleweave.errors import ProgramError
from doubleweave.ir.split import FixedSizes, Function, Segment, Split
from doubleweave.predict.plan_run import overlapping_schedule
from doubleweave.vendors import qnn
from doubleweave.vendors.library import Library, emulator_of, library_of, load_libraries


def segment(backend: str, contexts: int = 0) -> Segment:
    return Segment(
        backend or "s", "npu", backend, FixedSizes((1, 8)), (), (), "", target="SM8650", contexts=contexts
    )


def split_of(*segments: Segment) -> Split:
    return Split(segments, (Function("", (), (), ()),))


@pytest.mark.parametrize("backend", ["xnnpack", "no_such", "library", "printed_output", "", "../qnn", "a.b"])
def test_a_backend_without_a_vendors_library_has_the_defaults(backend):
    library = library_of(backend)
    assert library == Library()
    assert (library.is_npu, library.loads_alone, library.emulator) == (False, False, "")
    assert (library.examine(), library.explain("text"), library.build) == ({"works": True}, "", None)
    assert library.build_lines([segment(backend)]) == []
    load_libraries(split_of(segment(backend)))


def test_what_the_vendors_libraries_are():
    assert (library_of("qnn").is_npu, library_of("openvino").is_npu) == (True, True)
    assert (library_of("qnn").loads_alone, library_of("openvino").loads_alone) == (True, False)


def test_a_split_has_its_backends_libraries():
    plain, with_qnn = split_of(segment("xnnpack")), split_of(segment("xnnpack"), segment("qnn", 2))
    assert (emulator_of(plain), emulator_of(with_qnn)) == ("", "the HTP emulator")
    assert (overlapping_schedule(plain), overlapping_schedule(with_qnn)) == ("wavefront", "out_of_order")
    assert overlapping_schedule(split_of(segment("openvino"))) == "out_of_order"


def test_a_chips_build_is_refused_before_its_library_is_loaded(monkeypatch):
    monkeypatch.setattr(qnn, "is_host", lambda: True)
    monkeypatch.setattr(qnn, "load_sdk", lambda: pytest.fail("loaded"))
    with pytest.raises(ProgramError, match=r"compiled for the chip SM8650: .* compile it with --emulate"):
        load_libraries(split_of(segment("qnn", 1)))


def test_what_qualcomms_library_prints_explains_an_error():
    again = ": the context is damaged or of another SDK; compile it again"
    assert library_of("qnn").explain("") == again
    assert library_of("qnn").explain("[ERROR] [Qnn ExecuTorch]: Bad magic\n") == f" (Bad magic){again}"


def test_a_build_says_what_it_is_for():
    library = library_of("qnn")
    assert library.build is not None
    build = {"soc": "SM8650", "build": "chip", "contexts": 1, "most_contexts": 50}
    assert library.build([segment("qnn", 1)]) == build
    assert library.build([segment("qnn", 2)] * 40) == {**build, "build": "emulator", "contexts": 80}
    assert "QNN: built for the chip, SM8650" in library.build_lines([segment("qnn", 1)])[0]
    assert "80 contexts (too many for the chip)" in library.build_lines([segment("qnn", 2)] * 40)[1]
