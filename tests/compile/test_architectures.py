"""Every architecture of transformers' causal mapping, tiny and random: none compiles to wrong numbers.

ARCHITECTURES=all pytest tests/compile/test_architectures.py tries all of them (some 20 minutes); without, it tries
the few that CHOSEN names.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import architectures

CHOSEN = ("bart", "gemma2", "lfm2", "mamba", "mixtral", "olmo2", "qwen3", "roberta")
TYPES = tuple(architectures.NAMES) if os.environ.get("ARCHITECTURES") == "all" else CHOSEN
SECONDS = 240  # for one architecture
TOKENS = 150  # a chunk of 128, and a remainder

Outcome = tuple[str, str]  # "right", "refused", "no model" or a fault; what was said


def outcome(model_type: str) -> Outcome:
    """Compile in float32 and compare a prompt's logits and a decoded token's with the source's."""
    import torch

    import doubleweave as dw
    from doubleweave.sources.hugging_face import from_module

    ids = np.random.default_rng(0).integers(3, 260, TOKENS)
    try:
        module = architectures.tiny_model(model_type)
        with torch.no_grad():
            wanted = module(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0].numpy()
    except Exception as error:
        return "no model", f"{type(error).__name__}: {error}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            dw.compile_llm(
                from_module(module, model_type, None), Path(folder) / "out", quantize="none", max_context=512
            )
        except dw.DoubleweaveError as error:
            return "refused", str(error)
        except Exception as error:
            return "traceback", f"{type(error).__name__}: {error}"
        try:
            program = dw.open(Path(folder) / "out")
            assert isinstance(program, dw.Program)
            found = program.session().score(ids)
            session = program.session()
            session.append(ids[:20])
            step = session.append(ids[20:21])
        except dw.DoubleweaveError as error:
            return "does not run", str(error)
    largest = np.abs(wanted).max()
    off = max(np.abs(found - wanted).max(), np.abs(step - wanted[20]).max()) / largest
    return ("right", "") if off < 1e-3 else ("wrong", f"logits off by {off:.1e} of the largest")


def _put(queue: Any, model_type: str) -> None:
    queue.put(outcome(model_type))


def in_a_process(model_type: str) -> Outcome:
    """`outcome` where a crash or a hang ends that one alone."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_put, args=(queue, model_type), daemon=False)
    process.start()
    try:
        return queue.get(timeout=SECONDS)  # type: ignore[no-any-return]
    except Exception:
        return ("hangs", "") if process.is_alive() else ("crashes", f"exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("model_type", TYPES)
def test_right_or_refused(model_type: str) -> None:
    found = in_a_process(model_type)
    assert found[0] in ("right", "refused", "no model"), found
