"""Run a language model's split in eager torch, chunk behind chunk: the numeric reference of a program."""

from __future__ import annotations

import torch
from torch import Tensor

from doubleweave.errors import InputError
from doubleweave.split import TorchSplit


def run_eager(torch_split: TorchSplit, input_ids: Tensor, chunk: int | None = None) -> Tensor:
    """Run the split in eager torch, chunk behind chunk, with a growing cache: the numeric reference.

    input_ids int64 [1, T] -> logits float32 [1, T, vocab]. `chunk` None takes the prompt in one piece.
    Raises InputError for a batch larger than 1.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise InputError(
            f"input_ids has shape {list(input_ids.shape)}: expected [1, T]; the cache holds the tokens of one "
            "sequence, so run a batch as several sessions"
        )
    modules = {s.name: torch_split.module(s.name) for s in torch_split.split.segments}
    kinds = {value.name: value.kind for value in torch_split.split.values}
    cache: dict[str, Tensor] = {}
    outputs = []
    num_tokens = input_ids.shape[1]
    with torch.no_grad():
        for start in range(0, num_tokens, chunk or num_tokens):
            rows = slice(start, min(start + (chunk or num_tokens), num_tokens))
            env = {"input_ids": input_ids[:, rows], "position_ids": torch.arange(num_tokens)[None, rows]}
            for call in torch_split.split.calls:
                read = [cache[n] if kinds[n] == "cache" else env[n] for n in call.reads]
                for name, result in zip(call.writes, modules[call.segment](*read), strict=True):
                    if kinds[name] == "cache":
                        cache[name] = torch.cat((cache[name], result), 1) if name in cache else result
                    else:
                        env[name] = result
            outputs.append(env[next(n for n, kind in kinds.items() if kind == "output")])
    return torch.cat(outputs, dim=1)
