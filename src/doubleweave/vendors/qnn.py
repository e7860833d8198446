"""Qualcomm's library as the run time sees it: builds for the chip and for the emulator, messages, versions.

A build for the chip lets the methods of a segment share one context, and so their weights; the emulator cannot run
that.
"""

from __future__ import annotations

from typing import Any

from doubleweave.errors import BackendError, ProgramError
from doubleweave.ir.split import Segment
from doubleweave.vendors.library import Library, Segments
from doubleweave.vendors.qnn_messages import refusal
from doubleweave.vendors.qnn_sdk import INSTALL, MOST_CONTEXTS, SOCS, is_host, load_sdk


def _load(segments: Segments) -> None:
    """Raises ProgramError for a chip's build where there is only the emulator."""
    if missing := _missing(segments):
        raise ProgramError(f"{missing}; compile it with --emulate to run it here")
    load_sdk()


def _missing(segments: Segments) -> str:
    shared = next((segment for segment in segments if _shares_context(segment)), None)
    if shared is None or not is_host():
        return ""
    return (
        f"the program is compiled for the chip {shared.target}: the methods of {shared.name} share one context, "
        "which the emulator on this machine cannot run"
    )


def _shares_context(segment: Segment) -> bool:
    return segment.contexts < len(segment.methods())


def _explain(printed: str) -> str:
    reason = refusal(printed)
    why = f" ({reason})" if reason else ""
    return f"{why}: the context is damaged or of another SDK; compile it again"


def _examine() -> dict[str, Any]:
    try:
        sdk = load_sdk()
    except BackendError as error:
        text = str(error)
        return {"works": False, "missing": text if INSTALL in text else f"{text}; {INSTALL}"}
    forwarded = "behind the forwarding library" if sdk.is_forwarded else "used as it is"
    return {
        "works": True,
        "text": f"SDK {sdk.build} ({sdk.origin}), {forwarded}; chips {', '.join(SOCS)}; runs on the HTP emulator here",
        "sdk": sdk.build,
        "origin": sdk.origin,
        "folder": str(sdk.folder),
        "forwarded": sdk.is_forwarded,
        "socs": list(SOCS),
    }


def _build(segments: Segments) -> dict[str, Any]:
    """The chip, "chip" or "emulator" for the build, its contexts, and the most that a process may hold."""
    return {
        "soc": segments[0].target,
        "build": "chip" if any(map(_shares_context, segments)) else "emulator",
        "contexts": sum(segment.contexts for segment in segments),
        "most_contexts": MOST_CONTEXTS,
    }


def _build_lines(segments: Segments) -> list[str]:
    build = _build(segments)
    how = {
        "chip": "the methods of a segment share one context, and so their weights; the emulator cannot run that",
        "emulator": "every method has a context of its own, with its own weights",
    }[build["build"]]
    over = " (too many for the chip)" if build["contexts"] > MOST_CONTEXTS else ""
    return [
        f"QNN: built for the {build['build']}, {build['soc']}: {how}",
        f"{build['contexts']} contexts{over}, of about {MOST_CONTEXTS} that a process on the chip may hold",
    ]


LIBRARY = Library(
    is_npu=True,
    loads_alone=True,  # it sets up the methods' shared parts without a lock
    emulator="the HTP emulator",
    load=_load,
    missing=_missing,
    explain=_explain,
    examine=_examine,
    build=_build,
    build_lines=_build_lines,
)
