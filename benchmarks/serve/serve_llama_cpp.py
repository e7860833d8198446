"""Worker: llama.cpp through its C interface, with one context for each `n_ubatch` asked for.

The C interface, not the `Llama` class: no Python between tokens but an argmax, as in the other workers.
"""

import argparse
import ctypes
import time
from typing import Any

from protocol import open_channel, serve


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--n-ubatch", type=int, action="append", required=True)
    args = parser.parse_args()
    answers = open_channel()

    import llama_cpp as llama
    import numpy as np
    from llama_model import Model

    model = Model(args.gguf)
    flash = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    contexts = {
        n_ubatch: model.context(args.context, args.threads, n_ubatch=n_ubatch, flash_attn_type=flash)
        for n_ubatch in args.n_ubatch
    }

    def prefill_decode(ids: list[int], gen: int, n_ubatch: int) -> dict[str, Any]:
        context = contexts[n_ubatch]
        llama.llama_memory_clear(llama.llama_get_memory(context), False)

        def feed(token_ids: list[int]) -> int:
            array = (llama.llama_token * len(token_ids))(*token_ids)
            failed = llama.llama_decode(context, llama.llama_batch_get_one(array, len(token_ids)))
            if failed:
                raise RuntimeError(f"llama_decode gave {failed}")
            row = llama.llama_get_logits_ith(context, -1)
            address = ctypes.cast(row, ctypes.POINTER(ctypes.c_float))
            return int(np.argmax(np.ctypeslib.as_array(address, (model.vocab_size,))))

        start = time.perf_counter()
        tokens = [feed(ids)]
        first = time.perf_counter()
        for _ in range(gen):
            tokens.append(feed(tokens[-1:]))
        end = time.perf_counter()
        return {"prefill_s": first - start, "decode_s": end - first, "tokens": tokens}

    built_with = llama.llama_print_system_info().decode().strip()
    serve(
        answers,
        {"version": llama.__version__, "built_with": built_with},
        {"prefill_decode": prefill_decode},
    )


if __name__ == "__main__":
    main()
