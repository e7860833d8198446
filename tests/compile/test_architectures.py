"""Every architecture of transformers' causal mapping, tiny and random: it works, or is refused in a sentence.

    ARCHITECTURES=cohere,glm pytest tests/compile/test_architectures.py
    ARCHITECTURES=all pytest tests/compile/test_architectures.py --regenerate

The first tries those; the second tries all of them (an hour on two cores) and writes their rows of docs/models.md.
Without ARCHITECTURES the few that CHOSEN names are tried and held against the page.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import architectures

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
CHOSEN = ("bart", "bloom", "gemma2", "lfm2", "mamba", "mixtral", "olmo2", "qwen3", "qwen3_5_text", "roberta")
NAMED = os.environ.get("ARCHITECTURES", "")
TYPES = tuple(architectures.NAMES) if NAMED == "all" else tuple(filter(None, NAMED.split(","))) or CHOSEN
SECONDS = 240  # for one architecture
TOKENS = 150  # a chunk of 128, and a remainder
CHUNK = 7
SINGLES = 40  # tokens that are appended one by one
PROMPT, ANSWER = 20, 16
BOUND = 1e-3  # of the largest logit
PRELOADED = [
    *("architectures", "doubleweave.entries.compile_llm", "doubleweave.compiler.lower.lower"),
    *("doubleweave.sources.hugging_face", "executorch.exir", "executorch.backends.xnnpack"),
]
WORKS, REFUSED, NO_MODEL = "works", "refused", "no model"


class Outcome(NamedTuple):
    """WORKS, REFUSED, NO_MODEL or a fault, and what was said."""

    kind: str
    said: str = ""


def outcome(model_type: str) -> Outcome:
    """Compile in float32, and compare logits and a greedy answer with the source's."""
    import torch

    import doubleweave as dw
    from doubleweave.sources.hugging_face import from_module

    ids = np.random.default_rng(0).integers(3, 260, TOKENS)
    try:
        module = architectures.tiny_model(model_type)
        with torch.no_grad():
            wanted = module(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0].numpy()
    except Exception as error:
        return Outcome(NO_MODEL, f"{type(error).__name__}: {error}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = from_module(module, model_type, None)
            context = min(512, model.max_context or 512)
            dw.compile_llm(model, Path(folder) / "out", quantize="none", max_context=context)
        except dw.DoubleweaveError as error:
            return Outcome(REFUSED, str(error))
        except Exception as error:
            return Outcome("traceback", f"{type(error).__name__}: {error}")
        try:
            program = dw.open(Path(folder) / "out")
            assert isinstance(program, dw.Program)
            return _compared(program, module, ids, wanted)
        except dw.DoubleweaveError as error:
            return Outcome("does not run", str(error))


def _compared(program: Any, module: Any, ids: Any, wanted: Any) -> Outcome:
    """wanted: the source's logits of ids, [TOKENS, vocab]."""
    found = {"a prompt": (program.session().score(ids), wanted)}
    for name, size, end in (("chunks", CHUNK, TOKENS), ("single tokens", 1, SINGLES)):
        session = program.session()
        starts = range(0, end, size)
        last = [session.append(ids[start : min(start + size, end)]) for start in starts]
        found[name] = np.stack(last), wanted[[min(start + size, end) - 1 for start in starts]]
    rows = {
        "a prompt": range(TOKENS),
        "chunks": [min(s + CHUNK, TOKENS) - 1 for s in range(0, TOKENS, CHUNK)],
    }
    for name, (ours, theirs) in found.items():
        off = np.abs(ours - theirs).max(1) / np.abs(wanted).max()
        if not off.max() < BOUND:  # not a number is off as well
            off[_unsettled(module, ids, wanted)[rows.get(name, range(SINGLES))]] = 0
        if not off.max() < BOUND:
            return Outcome("wrong", f"logits of {name} are off by {off.max():.1e} of the largest")
    ours, theirs = _greedy(program, ids[:PROMPT]), _generated(module, ids[:PROMPT])
    return Outcome(WORKS) if ours == theirs else Outcome("wrong", f"an answer of {ours}, expected {theirs}")


def _unsettled(module: Any, ids: Any, wanted: Any) -> Any:
    """bool [TOKENS]: rows that rounding decides in the source itself, at most one in twenty (check/near_ties.py)."""
    import torch

    from doubleweave.check.near_ties import moved_rows

    found = moved_rows(module, torch.tensor(ids)[None], {}, torch.tensor(wanted)).numpy() > BOUND
    return found if found.mean() <= 0.05 else np.zeros_like(found)


def _greedy(program: Any, prompt: Any) -> list[int]:
    session = program.session()
    answer = [int(session.append(prompt).argmax())]
    while len(answer) < ANSWER:
        answer.append(int(session.append(answer[-1:]).argmax()))
    return answer


def _generated(module: Any, prompt: Any) -> list[int]:
    """transformers' own answer, with the cache that it gives the model.

    Where positions begin behind the padding's row, `generate` counts them from 0 all the same; there the answer is that
    of the module itself, which counts them as it was trained.
    """
    import torch

    from doubleweave.sources.positions import first_position

    ids = torch.tensor(prompt)[None]
    if first_position(module):
        for _ in range(ANSWER):
            with torch.no_grad():
                following = module(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, following), 1)
        return [int(token) for token in ids[0, PROMPT:]]
    config = module.generation_config
    config.eos_token_id = config.forced_eos_token_id = None  # no token ends the answer
    options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "pad_token_id": 0, "do_sample": False}
    try:
        whole = module.generate(ids, attention_mask=torch.ones_like(ids), **options)
    except IndexError:  # the cache that it is given has fewer layers than the model asks for (HRM)
        whole = module.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    return [int(token) for token in whole[0, PROMPT:]]


def in_a_process(model_type: str) -> Outcome:
    """`outcome` in a process of its own, where a crash or a hang ends that one alone.

    It is forked from one that has imported what all of them need, which takes half as long as a small model.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, model_type))
    process.start()
    theirs.close()
    try:
        return Outcome(*ours.recv()) if ours.poll(SECONDS) else Outcome("hangs", f"no outcome in {SECONDS} s")
    except EOFError:
        process.join()
        return Outcome("crashes", f"exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
        process.close()


def _send(connection: Any, model_type: str) -> None:
    connection.send(tuple(outcome(model_type)))


def row(model_type: str, found: Outcome) -> str:
    """The page's row, with the first sentence of another library's errors."""
    said = re.sub(r"\s+", " ", found.said.strip().splitlines()[0] if found.kind == NO_MODEL else found.said)
    family = "decoder" if architectures.is_decoder_only(model_type) else "encoder"
    return f"| `{model_type}` | {family} | {found.kind} | {said.replace('|', '/')} |"


def rows_of_page() -> dict[str, str]:
    text = PAGE.read_text() if PAGE.exists() else ""
    return {found[1]: found[0] for found in re.finditer(r"^\| `([^`]+)` .*$", text, re.MULTILINE)}


def page(rows: dict[str, str]) -> str:
    columns = {model_type: [cell.strip() for cell in text.split("|")] for model_type, text in rows.items()}
    kinds = tuple(dict.fromkeys((WORKS, REFUSED, NO_MODEL, *(cells[3] for cells in columns.values()))))

    def counted(name: str, families: tuple[str, ...]) -> str:
        counts = Counter(cells[3] for cells in columns.values() if cells[2] in families)
        return f"| {name} | {counts.total()} | " + " | ".join(str(counts[kind]) for kind in kinds) + " |"

    lines = [
        "# Architectures",
        "",
        "Each architecture of transformers' causal mapping, as a tiny random model with a layer of each kind that it",
        f"knows, compiled in float32 and held against transformers: the logits of {TOKENS} tokens as one prompt and in",
        f"chunks of {CHUNK}, of {SINGLES} tokens one by one, and {ANSWER} greedy tokens behind {PROMPT} as",
        "transformers' own `generate` gives them with its own cache. Written by",
        "`ARCHITECTURES=all pytest tests/compile/test_architectures.py --regenerate`; with names for `all`, their",
        "rows alone are written anew.",
        "",
        "| | all | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 2) + "|",
        counted("decoder-only families", ("decoder",)),
        counted("and encoders, or halves of encoder-decoders, that can decode", ("decoder", "encoder")),
        "",
        *(
            [f"{untried} more were not tried.", ""]
            if (untried := len(architectures.NAMES) - len(rows))
            else []
        ),
        "| type | family | outcome | what is said |",
        "|---|---|---|---|",
        *rows.values(),
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("model_type", TYPES)
def test_works_or_is_refused(model_type: str, request: pytest.FixtureRequest) -> None:
    found = in_a_process(model_type)
    print(row(model_type, found), flush=True)
    rows = rows_of_page()
    if request.config.getoption("--regenerate"):
        rows[model_type] = row(model_type, found)
        PAGE.write_text(page({name: rows[name] for name in architectures.NAMES if name in rows}))
    elif not NAMED:
        assert row(model_type, found) == rows[model_type]
    assert found.kind in (WORKS, REFUSED, NO_MODEL), found


def test_the_page() -> None:
    """The page has all of the mapping, in its order, and its counts are those of its rows."""
    rows = rows_of_page()
    assert list(rows) == list(architectures.NAMES)
    assert PAGE.read_text() == page(rows)
