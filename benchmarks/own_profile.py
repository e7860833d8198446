"""The profile of a program on this machine, measured by `doubleweave profile` where the folder has none yet."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from common import DOUBLEWEAVE, BenchmarkError, note

from doubleweave.ir.manifest import read
from doubleweave.predict.find_profile import PROFILE_FILE, find_profile


def own_profile(folder: Path, threads: int, *options: str) -> None:
    """Make `folder` have a profile of this machine for so many threads; BenchmarkError where that fails."""
    path = folder / PROFILE_FILE
    if path.exists():
        found = find_profile(folder, read(folder))
        if found.kind == "measured" and found.threads == threads:
            return
    note(f"measuring {folder} into {path}")
    command = [*DOUBLEWEAVE, "profile", str(folder), "--threads", str(threads), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(
            f"{folder}: doubleweave profile ended with {done.returncode}: {done.stderr[-200:]}"
        )
    json.loads(done.stdout.splitlines()[-1])
