"""Compile SmolLM2-135M-Instruct (once), answer a prompt of a few hundred tokens, show what ran where.

`make demo` runs this. The program stays in programs/smollm2, so a second run starts at once.
"""

from __future__ import annotations

import sys
from pathlib import Path

from doubleweave.cli.main import main

FOLDER = Path("programs/smollm2")
PROMPT = """\
Here is a report.

The harbour of Arle builds a fishing boat every nine days. A hull is laid in the first shed, gets its ribs in
the second and its planks in the third; each shed has a crew of six and works nine days on a hull, so three
hulls are always in work at once. The crews never share a tool. The boats that leave the harbour stay out for
one night in spring and for three nights in autumn, when the herring are close. A night's work grows as the
night goes on, because every net that was set must be looked at again before the next one goes down. When a
boat comes home late, the men who unload it cannot carry timber to the sheds, and then three crews stand
waiting. In an ordinary autumn the sheds lost one day in five that way. A clerk drew a chart with a line for
each worker, found the hours in which the carriers had nothing to do, and asked that the timber for tomorrow
be carried today, in those hours. No one worked harder, no saw was sharper and no boat was faster, but in the
second autumn the sheds lost only one day in twenty.

Write a short paragraph on what this teaches us about planning work ahead of time."""


def demo() -> int:
    """Compile if there is no program yet, show its segments, and answer."""
    if not (FOLDER / "program.pte").exists():
        print(f"Compiling SmolLM2-135M-Instruct into {FOLDER} …", flush=True)
        if code := main(["compile", "smollm2", "-o", str(FOLDER)]):
            return code
    print("\nThe program's segments:\n", flush=True)
    if code := main(["inspect", str(FOLDER)]):
        return code
    print("\nThe answer:\n", flush=True)
    return main(["run", str(FOLDER), "-p", PROMPT, "-n", "160", "--trace"])


if __name__ == "__main__":
    sys.exit(demo())
