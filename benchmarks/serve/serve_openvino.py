"""Worker: OpenVINO GenAI with its defaults, but for the number of threads.

Times are the engine's own (time to the first token, time stamp of each token): no Python callback runs
between tokens. It keeps a prefix cache, so a caller must not ask twice running for the same ids.
"""

import argparse
from typing import Any

from protocol import open_channel, serve


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    answers = open_channel()

    import numpy as np
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(args.folder, "CPU", INFERENCE_NUM_THREADS=args.threads)

    def prefill_decode(ids: list[int], gen: int) -> dict[str, Any]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = gen + 1
        config.ignore_eos = True
        config.do_sample = False
        row = np.asarray([ids], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(row), openvino.Tensor(np.ones_like(row)))
        result = pipeline.generate(inputs, config)
        metrics = result.perf_metrics
        stamps_ms = metrics.raw_metrics.m_new_token_times
        if len(stamps_ms) != gen + 1:
            raise RuntimeError(f"OpenVINO GenAI gave {len(stamps_ms)} tokens, expected {gen + 1}")
        return {
            "prefill_s": metrics.get_ttft().mean / 1e3,
            "decode_s": (stamps_ms[-1] - stamps_ms[0]) / 1e3,
            "tokens": [int(token) for token in result.tokens[0]],
        }

    ready = {"version": openvino_genai.__version__, "openvino": openvino.__version__}
    serve(answers, ready, {"prefill_decode": prefill_decode})


if __name__ == "__main__":
    main()
