"""The messages of Qualcomm's HTP compiler, parsed: a graph's traffic between NPU and system memory, and refusals."""

from __future__ import annotations

import re

from doubleweave.ir.split import Traffic

_SUMMARY = re.compile(r"=+ DDR bandwidth summary =+(.{,1000}?read_total_bytes=\d+)", re.DOTALL)
_ERROR = re.compile(r"(?:\[ERROR\] \[Qnn ExecuTorch\]:|<E>)[ \t]*(?:<E>[ \t]*)?(.*\S)")
_OPERATOR = re.compile(r"Failed to validate op (\w+)")
# Complaints of every run, and lines that only pass a complaint on.
_NO_REASON = re.compile(
    r"unexpected GraphHtpSettings option|failed( -?\d+)?\.?$|not well formed|failed with error|Failed to validate"
)


def traffic(printed: str) -> list[Traffic]:
    """One Traffic a graph, in bytes, in the order in which graphs were compiled; the summary does not say a graph's
    size, so `size` is 0.

    A summary without one of the figures (another SDK's) gives no entry.
    """
    found = []
    for summary in _SUMMARY.findall(printed):
        figures = dict(re.findall(r"(\w+)=(\d+)", summary))
        names = ("read_total_bytes", "write_total_bytes", "spill_bytes", "fill_bytes")
        if set(names) <= set(figures):
            found.append(Traffic(0, *(int(figures[name]) for name in names)))
    return found


def refusal(printed: str) -> str:
    """The compiler's first complaint, behind the operator that it is about; "" for no complaint."""
    found = [line.rstrip(". ") for line in _ERROR.findall(printed)]
    reasons = [line for line in found if not _NO_REASON.search(line)] or found
    operator = _OPERATOR.search(printed)
    at = f"{operator[1]}: " if operator else ""
    return at + reasons[0] if reasons else ""
