"""What the HTP compiler prints, as two SDKs print it."""

from __future__ import annotations

from doubleweave.ir.split import Traffic
from doubleweave.vendors.qnn_messages import refusal, traffic

SDK_2_47 = """Starting stage: Completion
====== DDR bandwidth summary ======
spill_bytes=16
fill_bytes=32
write_total_bytes=6144
read_total_bytes=30720

Completed stage: Completion (22 us)
"""
SDK_2_51 = """[INFO] [Qnn ExecuTorch]: graph_prepare.cc:2110:design_spill_fill_area

====== DDR bandwidth summary ======

[INFO] [Qnn ExecuTorch]: spill_bytes=0

[INFO] [Qnn ExecuTorch]: fill_bytes=0

[INFO] [Qnn ExecuTorch]: write_total_bytes=8192

[INFO] [Qnn ExecuTorch]: read_total_bytes=69632

"""
REFUSED = """[ERROR] [Qnn ExecuTorch]:  <E> unexpected GraphHtpSettings option 66
[ERROR] [Qnn ExecuTorch]: Dynamically shaped output requires presence of in[1]
[ERROR] [Qnn ExecuTorch]: Op specific validation failed.
[ERROR] [Qnn ExecuTorch]:  <E> validateNativeOps master op validator aten_view_copy_default_7:Reshape failed 3110
[ERROR] [Qnn ExecuTorch]:  <E> QnnBackend_validateOpConfig failed 3110
[ERROR] [Qnn ExecuTorch]:  <E> Failed to validate op aten_view_copy_default_7 with error 0xc26
"""


def test_traffic_is_read_graph_by_graph():
    first, second = traffic(SDK_2_47 + SDK_2_51)
    assert first == Traffic(0, read=30720, written=6144, spilled=16, filled=32)
    assert second == Traffic(0, read=69632, written=8192, spilled=0, filled=0)


def test_a_report_of_another_kind_gives_nothing():
    assert traffic(SDK_2_47.replace("read_total_bytes", "read_bytes")) == []
    assert traffic("") == []


def test_a_refusal_names_the_operator_and_the_reason_and_not_what_it_says_every_time():
    assert (
        refusal(REFUSED) == "aten_view_copy_default_7: Dynamically shaped output requires presence of in[1]"
    )
    assert refusal(" <E> unexpected GraphHtpSettings option 66\n") == "unexpected GraphHtpSettings option 66"
    assert refusal("[INFO] [Qnn ExecuTorch]: all is well\n") == ""
