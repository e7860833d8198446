"""What was compared when a program was compiled, and how far it was off: a record of the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """The result of the check that ends a compile.

    ran: "program" (on the run time) or "split" (in eager torch; `reason` says why the program could not run).
    num_tokens: tokens of a language model that were run from position 0 on. positions: where else tokens were run.
    source_off: largest difference from what the source gives, as a part of the largest number: of the program, or,
    where it is quantized, of the float32 split. segment_noise, logits_noise: of the quantized program against the
    quantized split in eager torch, root of the mean square over that of the numbers. top1, kl: the quantized model
    against float32, the part of equal next tokens and the mean Kullback-Leibler divergence in nats. None for what was
    not run. unsettled: tokens whose logits rounding decides in the source itself (between two experts that are equally
    good), which were left out. layers: of a large model, the number of its first layers that were checked so, 0 for all
    of them; weights_noise: then, of every segment of the whole program against float32 on the same inputs.
    """

    ran: Literal["program", "split"]
    reason: str = ""
    num_tokens: int = 0
    positions: tuple[int, ...] = ()
    source_off: float | None = None
    segment_noise: float | None = None
    logits_noise: float | None = None
    top1: float | None = None
    kl: float | None = None
    unsettled: int = 0
    layers: int = 0
    weights_noise: float | None = None
