"""Write a timeline to a file and read it back: a trace (.json) or a picture (.svg, .png), by the extension."""

from __future__ import annotations

import json
from pathlib import Path

from doubleweave.errors import InputError
from doubleweave.files import written_whole
from doubleweave.timeline.chrome_format import from_chrome, to_chrome
from doubleweave.timeline.picture import draw
from doubleweave.timeline.timeline import Timeline

_EXTENSIONS = (".json", ".svg", ".png")


def check_path(path: Path) -> None:
    """Refuse a file that could not be written, before anything runs. Raises InputError."""
    if path.suffix not in _EXTENSIONS:
        raise InputError(
            f"trace: found {path.name!r}, expected a file name that ends in .json (a trace for ui.perfetto.dev), .svg "
            "or .png (a picture)"
        )
    if not path.parent.is_dir():
        raise InputError(f"trace: folder {path.parent} does not exist; make it first")


def write_trace(timeline: Timeline, path: Path) -> None:
    """Write the file as a whole, as `written_whole` does. Raises InputError as `check_path` does, and OSError."""
    check_path(path)
    with written_whole(path) as temporary:
        if path.suffix == ".json":
            temporary.write_text(json.dumps(to_chrome(timeline)))
        else:
            draw(timeline, temporary)


def read_trace(path: Path) -> Timeline:
    """Read a trace that `write_trace` wrote as .json; raises InputError for anything else."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a trace ({error})") from None
    return from_chrome(data, str(path))
