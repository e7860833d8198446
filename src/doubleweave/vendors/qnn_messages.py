"""What Qualcomm's HTP compiler prints: what a graph moves between the NPU and the system's memory, and refusals."""

from __future__ import annotations

import re

from doubleweave.ir.split import Traffic

_SUMMARY = re.compile(r"=+ DDR bandwidth summary =+(.{,1000}?read_total_bytes=\d+)", re.DOTALL)
_ERROR = re.compile(r"(?:\[ERROR\] \[Qnn ExecuTorch\]:|<E>)[ \t]*(?:<E>[ \t]*)?(.*\S)")
_OPERATOR = re.compile(r"Failed to validate op (\w+)")
# What it complains of on every run, and what only passes a complaint on.
_NO_REASON = re.compile(
    r"unexpected GraphHtpSettings option|failed( -?\d+)?\.?$|not well formed|failed with error|Failed to validate"
)


def traffic(printed: str) -> list[Traffic]:
    """One entry a graph, in the order in which they were compiled; which size each has is not said (0).

    None of a summary that lacks one of its figures: an SDK whose report is another one.
    """
    found = []
    for summary in _SUMMARY.findall(printed):
        figures = dict(re.findall(r"(\w+)=(\d+)", summary))
        names = ("read_total_bytes", "write_total_bytes", "spill_bytes", "fill_bytes")
        if set(names) <= set(figures):
            found.append(Traffic(0, *(int(figures[name]) for name in names)))
    return found


def refusal(printed: str) -> str:
    """What the compiler complained of first, and at which operator; "" if nothing."""
    found = [line.rstrip(". ") for line in _ERROR.findall(printed)]
    reasons = [line for line in found if not _NO_REASON.search(line)] or found
    operator = _OPERATOR.search(printed)
    at = f"{operator[1]}: " if operator else ""
    return at + reasons[0] if reasons else ""
