"""One architecture for each thing that decoders do beside plain attention, in each recipe, bounded and static.

    ROOTS=all pytest tests/compile/test_roots.py
    ROOTS=lfm2,mamba2 pytest tests/compile/test_roots.py

The first tries each architecture in each form (a quarter of an hour on two cores), the second all forms of those.
Without ROOTS each is tried in one form or two.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import architectures
import doubleweave as dw
from doubleweave.ir.manifest import Manifest
from doubleweave.schedule.makers import MAKERS
from doubleweave.sources.hugging_face import from_module
from native_runner import needs_runner, report
from roots import NAMED

pytestmark = pytest.mark.usefixtures("lowered_once")

FORMS = ("bounded none", "bounded 8da8w", "bounded 8da4w", "static none", "static 8da8w", "static 8da4w")
CHOSEN = (
    ("lfm2", "bounded 8da4w"),
    ("qwen3_next", "bounded none"),
    ("qwen3_next", "static 8da8w"),
    ("qwen2_moe", "bounded 8da8w"),
    ("glm4_moe", "static 8da4w"),
    ("gpt_oss", "bounded 8da8w"),
    ("bloom", "static none"),
    ("deepseek_v3", "bounded 8da4w"),
)
CASES = tuple(product(NAMED, FORMS)) or CHOSEN
TOKENS = np.random.default_rng(0).integers(3, 260, 90)


class Compiled(NamedTuple):
    """A program's folder and what compiling said, its recipe, and its source."""

    folder: Path
    manifest: Manifest
    recipe: str
    module: torch.nn.Module


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    name, form = request.param
    shape, recipe = form.split()
    module = architectures.tiny_model(name)
    folder = tmp_path_factory.mktemp("root") / "program"
    chunk = (1, 16) if shape == "static" else ()
    source = from_module(module, name, None)
    manifest = dw.compile_llm(source, folder, shape=shape, quantize=recipe, max_context=128, chunk=chunk)
    return Compiled(folder, manifest, recipe, module)


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_it_is_held_against_its_source(compiled: Compiled) -> None:
    check = compiled.manifest.check
    assert check is not None
    assert check.ran == "program"
    if compiled.recipe != "none":
        assert check.segment_noise is not None
        # One activation of a single row that is rounded the other way makes 1e-2; without one it is 1e-6.
        assert check.segment_noise < 2e-2
        return
    with torch.no_grad():
        wanted = compiled.module(input_ids=torch.tensor(TOKENS)[None], use_cache=False).logits[0].numpy()
    assert off(dw.open(compiled.folder).session().score(TOKENS), wanted) < 1e-3


def test_every_schedule_gives_the_sequential_numbers(compiled: Compiled) -> None:
    program = dw.open(compiled.folder)
    wanted = None
    for schedule in dict.fromkeys(("sequential", *MAKERS)):
        session = program.session(schedule=schedule)
        found = [session.score(TOKENS[:80]), *(session.append([token])[None] for token in TOKENS[80:])]
        wanted = np.concatenate(found) if wanted is None else wanted
        assert off(np.concatenate(found), wanted) < 1e-4, schedule


@needs_runner
def test_the_runner_gives_the_same_tokens(compiled: Compiled, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text(json.dumps(TOKENS[:60].tolist()))
    expected = dw.open(compiled.folder).generate(TOKENS[:60].tolist(), max_new_tokens=12)
    for schedule in ("sequential", "wavefront"):
        found = report(
            compiled.folder, "--token-ids", tmp_path / "ids.json", "-n", 12, "--schedule", schedule
        )
        assert tuple(found["token_ids"]) == expected.token_ids
