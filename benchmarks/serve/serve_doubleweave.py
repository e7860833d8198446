"""Worker: a Doubleweave program, opened once."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from protocol import open_channel, serve

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--schedule", required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    answers = open_channel()

    import numpy as np
    from machine import memory_bytes

    import doubleweave

    before = memory_bytes()
    program = doubleweave.open(args.program)
    session = program.session(args.schedule, args.threads)

    def prefill_decode(ids: list[int], gen: int) -> dict[str, Any]:
        session.reset()
        start = time.perf_counter()
        tokens = [int(np.argmax(session.append(ids)))]
        first = time.perf_counter()
        for _ in range(gen):
            tokens.append(int(np.argmax(session.append(tokens[-1:]))))
        end = time.perf_counter()
        return {"prefill_s": first - start, "decode_s": end - first, "tokens": tokens}

    def memory() -> dict[str, Any]:
        return {
            "before_opening": before,
            "now": memory_bytes(),
            "buffer_bytes": session.buffer_bytes,
            "kv_bytes": session.kv_bytes,
        }

    ready = {"version": doubleweave.__version__, "threads": session.threads, "schedule": session.schedule}
    serve(answers, ready, {"prefill_decode": prefill_decode, "memory": memory})


if __name__ == "__main__":
    main()
