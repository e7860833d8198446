"""Worker: the logits of llama.cpp for every token of a text, through its C interface."""

import argparse
import ctypes
from typing import Any

from protocol import open_channel, serve


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    args = parser.parse_args()
    answers = open_channel()

    import llama_cpp as llama
    import numpy as np
    from llama_model import Model

    model = Model(args.gguf)
    context = model.context(args.context, args.threads)

    def logits(ids: list[int], out: str) -> dict[str, Any]:
        """Writes float32 [tokens, vocab] into the file `out`."""
        llama.llama_memory_clear(llama.llama_get_memory(context), False)
        batch = llama.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at], batch.logits[at] = token, at, 1
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        failed = llama.llama_decode(context, batch)
        if failed:
            raise RuntimeError(f"llama_decode gave {failed}")
        address = ctypes.cast(llama.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        np.save(out, np.ctypeslib.as_array(address, (len(ids), model.vocab_size)))
        llama.llama_batch_free(batch)
        return {}

    serve(answers, {"version": llama.__version__}, {"logits": logits})


if __name__ == "__main__":
    main()
