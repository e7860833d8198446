"""What QNN's recipes cost in quality, and whether the emulator computes what the quantized segments say.

Perplexity of a fixed text, by the quantized segments in eager torch, against float32; then greedy tokens behind
prompts of two chunks, by a program on the HTP emulator and by the same segments in eager torch.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import BenchmarkError, compiled, finish, note, parser, run, table, target
from torch import Tensor

import doubleweave as dw
from doubleweave.compiler.backends import backends, own_options
from doubleweave.compiler.backends.backend import Options
from doubleweave.compiler.pipeline_llm import splits_of
from doubleweave.compiler.policy import DEFAULT_SIZES
from doubleweave.compiler.split.eager import run_chunks
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.ir.split import FixedSizes
from doubleweave.sources import load

TEXT = Path(__file__).parents[1] / "tests" / "data" / "essay.txt"
CHUNK = max(DEFAULT_SIZES)
MOST_WORSE = 0.03
LEAST_TOKENS = 16
PROMPTS = (
    "A river begins as rain on a hill. Tell the story of its way to the sea, past villages, mills, bridges and a "
    "harbour, for children who have never seen one. Say what the water hears on its way, whom it meets, what it "
    "carries, where it rests, and what it is afraid of. Use short sentences, and name every animal that lives on the "
    "banks. Let the river ask three questions, and let the sea answer them at the end. Then say in one sentence what "
    "the children should remember when they see a river, and in another one what they should never throw into it. "
    "Please begin now.",
    "Here are the notes of a meeting. The team looked at last month's numbers: sales in the north went up by four "
    "percent, sales in the south went down by two. Anna said that the new shop had opened late because the floor was "
    "not finished. Ben asked for a second van, since one could not serve all the villages before noon. It was agreed "
    "that a van will be rented for three months, and that Anna writes to the builder. The next meeting is on the first "
    "Monday of March, at ten. Coffee will be brought by Carla, who was ill this time. Write a summary of the meeting "
    "in three sentences, for people who were not there, and leave out the coffee.",
    "I want to bake bread for the first time. I have flour, water, salt, a packet of dry yeast, a bowl, an oven and a "
    "whole afternoon, but no scales and no mixer. Explain to me step by step how I make a simple loaf with a good "
    "crust: how much of everything I take if I measure with a cup, how long I knead and how I notice that it is "
    "enough, how long the dough rests and where, how hot the oven should be, how I know that the bread is done, and "
    "how long I have to wait before I cut it. Number the steps, and say at the end what beginners do wrong most often.",
)


def main() -> None:
    args = arguments()
    model = load("smollm2")
    with tempfile.TemporaryDirectory() as folder:
        note("float32")
        in_float32 = Options(backends()["xnnpack"], "none", SIZES, model.max_context)
        exact = splits_of(model, in_float32, Path(folder), quietly).lowered
        text = tokens_of(Path(folder), TEXT.read_text())
        rows = [["recipe", "perplexity", "over float32", "same tokens as eager", "emulator s a token"]]
        perplexities = {"float32": perplexity(exact, text)}
        rows.append(["float32", f"{perplexities['float32']:.3f}", "-", "-", "-"])
        found: dict[str, Any] = {}
        for recipe in args.recipe:
            note(f"{recipe}: quantizing")
            qnn = backends()["qnn"]
            own = own_options(qnn, "dynamic", {"soc": args.soc, "emulate": True})
            options = Options(qnn, recipe, SIZES, model.max_context, own=own)
            split = splits_of(model, options, Path(folder), quietly).lowered
            perplexities[recipe] = perplexity(split, text)
            worse = perplexities[recipe] / perplexities["float32"] - 1
            same, seconds = on_emulator(args, recipe, split)
            found[recipe] = {
                "worse": worse,
                "same_tokens": same,
                "tokens": args.tokens,
                "s_per_token": seconds,
            }
            rows.append([
                recipe, f"{perplexities[recipe]:.3f}", f"{worse:+.1%}",
                f"{', '.join(map(str, same))} of {args.tokens}", f"{seconds:.1f}",
            ])  # fmt: skip
    goals = {}
    if "16a8w" in found:
        goals["perplexity of 16a8w over float32"] = target(
            found["16a8w"]["worse"], MOST_WORSE, at_least=False
        )
        goals["tokens of 16a8w on the emulator as in eager torch, the most of the prompts"] = target(
            max(found["16a8w"]["same_tokens"]), LEAST_TOKENS, at_least=True
        )
    lines = [
        f"{len(text)} tokens of {TEXT.name}, chunks of {CHUNK}; {args.soc}",
        table(rows),
        *(f"{name}: {goal['value']:.3g}, {'met' if goal['met'] else 'not met'}" for name, goal in goals.items()),
    ]  # fmt: skip
    finish("qnn_quality", lines, {"perplexity": perplexities, "recipes": found, "targets": goals})


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--recipe", action="append", help="default: 16a8w and 16a4w; may be repeated")
    p.add_argument("--soc", default="SM8650", help="default SM8650")
    p.add_argument(
        "--tokens", type=int, default=16, metavar="N", help="greedy tokens to compare (default 16)"
    )
    args = p.parse_args()
    args.recipe = args.recipe or ["16a8w", "16a4w"]
    return args


SIZES = FixedSizes(DEFAULT_SIZES)


def quietly(what: str, done: int, total: int) -> None:
    pass


def tokens_of(folder: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)


def chunks_of(ids: list[int]) -> list[Tensor]:
    return list(torch.split(torch.tensor([ids]), CHUNK, dim=1))


def perplexity(split: TorchSplit, ids: list[int]) -> float:
    """Of every token but the first, by the split in eager torch."""
    logits = torch.cat(list(run_chunks(split, chunks_of(ids))), dim=1)[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))
    return math.exp(loss.item())


def greedy(split: TorchSplit, ids: list[int], count: int) -> list[int]:
    """The next tokens, by the split in eager torch."""
    prompt, found = chunks_of(ids), list[int]()

    def feed() -> Iterator[Tensor]:
        yield from prompt
        while len(found) < count:
            yield torch.tensor([[found[-1]]])

    for number, logits in enumerate(run_chunks(split, feed())):
        if number >= len(prompt) - 1:
            found.append(int(logits[0, -1].argmax()))
            if len(found) == count:
                break
    return found


def on_emulator(args: argparse.Namespace, recipe: str, split: TorchSplit) -> tuple[list[int], float]:
    """For each prompt, how many greedy tokens are the same, from the first on; and what one takes on the emulator."""
    folder = compiled(
        args.cache / "programs" / f"smollm2-{recipe}-{args.soc}-emulate",
        "--backend", "qnn", "--soc", args.soc, "--quantize", recipe, "--emulate",
    )  # fmt: skip
    program = dw.open(folder)
    session = program.session("out_of_order", 2, workers=("npu", "cpu"))
    counts, seconds = [], []
    for prompt in PROMPTS:
        ids = list(program.text.encode(prompt))
        if not CHUNK < len(ids) <= 2 * CHUNK:
            raise BenchmarkError(f"a prompt has {len(ids)} tokens, expected two chunks of up to {CHUNK}")
        note(f"{recipe}: {len(ids)} tokens and {args.tokens} more on the emulator")
        session.reset()
        tokens = [int(session.append(ids).argmax())]
        start = time.perf_counter()
        while len(tokens) < args.tokens:
            tokens.append(int(session.append([tokens[-1]]).argmax()))
        seconds.append((time.perf_counter() - start) / max(1, args.tokens - 1))
        expected = greedy(split, ids, args.tokens)
        pairs = enumerate(zip(tokens, expected, strict=True))
        counts.append(next((i for i, (a, b) in pairs if a != b), args.tokens))
        note(json.dumps({"emulator": program.text.decode(tokens), "eager": program.text.decode(expected)}))
    return counts, statistics.median(seconds)


if __name__ == "__main__":
    run(main)
