"""The check of a language model: its source, its split in eager torch and its program give the same logits.

A float32 program is held against the source itself. With fewer bits there are three steps: the float32 split against
the source, each segment of the program against the quantized split in eager torch on the same inputs, and the whole
program against the quantized split. How far the program is from float32 is reported, not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from doubleweave.check.differences import agreement, difference, first_row_over, noise
from doubleweave.check.near_ties import moved_rows
from doubleweave.check.own_process import program_apart
from doubleweave.check.places import (
    SINGLES,
    Place,
    before_border,
    far_places,
    first_place,
    lengths_of,
    marked_rows,
)
from doubleweave.check.program_run import ProgramHere, Run, Runner
from doubleweave.check.quick_weights import quick_modules
from doubleweave.check.segments import Comparison, Noise, meeting_rows, noisiest
from doubleweave.check.source_run import source_logits
from doubleweave.compiler.program_folder import Progress
from doubleweave.compiler.quantize.calibration import text_tokens
from doubleweave.compiler.split.cache_format import in_format
from doubleweave.compiler.split.eager import OnCall, run_chunks
from doubleweave.compiler.split.pieces import TorchSplit
from doubleweave.errors import CheckError, RunError
from doubleweave.ir.check import Check
from doubleweave.ir.manifest import TOKENIZER_FILE
from doubleweave.ir.split import ENCODER, FixedSizes, most_rows
from doubleweave.runtime.open import open_llm
from doubleweave.schedule.choice import chunk_shape
from doubleweave.sources.encoder_decoder import Decoder
from doubleweave.vendors.library import emulator_of, missing_here

# Of the largest logit. float32 kernels that add up in another order are off by some 1e-6 of it (SmolLM2: 3e-6), by 5e-5
# where random weights let one number outweigh all others. What is wrong is off by more than 1e-3 as a rule.
FLOAT_BOUND = 2e-4
# Of rows that move further in the source itself under noise as small as rounding; a row that moves by more is left out.
SENSITIVE_BOUND = 1e-3
# Noise of a quantized program's logits against its split, where such steps went through all layers (SmolLM2, 8da8w and
# 8da4w: 0.08).
LOGITS_BOUND = 0.35
_MOST_UNSETTLED = 0.05  # of the tokens: with more, too few are left to say that a program is right
_REPORT = "Compile with --no-check to have the program all the same, and please report the model"
# The split in eager torch gives the same in chunks of any size, so it is held against the source in few tokens.
_SPLIT_CHUNKS = (32, 32, 11, *[1] * SINGLES)
# The same of a large model, each pass over whose weights takes seconds.
_FEW_CHUNKS = (32, 11, 1)


@dataclass(frozen=True)
class Compiled:
    """What is checked: the source's module, its split in float32, the split that was lowered, and the program's folder.

    `is_float`: the recipe leaves float32 as it is. `audit` says in a sentence how the module differs from its files.
    `encode` makes the keys and values of an encoder's rows; `rotary_border` is ModelInfo's. `is_large`: few tokens are
    run.
    """

    name: str
    module: Any
    vocab_size: int
    max_context: int
    reference: TorchSplit
    lowered: TorchSplit
    folder: Path
    is_float: bool
    audit: Callable[[], str]
    encode: Callable[[Tensor], Sequence[Tensor]] = lambda rows: ()
    rotary_border: int = 0
    is_large: bool = False

    @property
    def split_chunks(self) -> tuple[int, ...]:
        return _FEW_CHUNKS if self.is_large else _SPLIT_CHUNKS


def refusal(compiled: Compiled, what: str) -> CheckError:
    return CheckError(f"{compiled.name}: {what}; nothing was written. {_REPORT}")


def check_llm(compiled: Compiled, report: Progress) -> Check:
    """Run source, split and program wherever they may differ; raises CheckError where they do."""
    split = compiled.lowered.split
    lengths = lengths_of(compiled.module.config, compiled.max_context)
    full = 1 if compiled.is_large else 2
    first = first_place(most_rows(chunk_shape(split)), compiled.max_context, lengths, full)
    far = far_places(first, compiled.max_context, lengths)
    far += before_border(first, compiled.rotary_border)
    # A segment of fixed sizes takes as many, be they more than the context.
    most = max(most_rows(chunk_shape(split)), *(place.num_tokens for place in (first, *far)))
    ids = token_ids(compiled, most)
    report("checking: the source", 0, 3)
    if found := compiled.audit():
        raise refusal(compiled, found)
    subject = _Subject(compiled, ids, _source(compiled, ids, (first, *far)))
    ran = _hold_all(subject, first, far, report)
    return replace(ran, unsettled=sum(subject.unsettled.values()))


def _hold_all(subject: _Subject, first: Place, far: Sequence[Place], report: Progress) -> Check:
    compiled, split = subject.compiled, subject.compiled.lowered.split
    reason = missing_here(split)
    ran = Check("split" if reason else "program", reason, first.end, tuple({place.start: 0 for place in far}))
    report("checking: the split", 1, 3)
    short = first.cut(compiled.split_chunks)
    if reason or not compiled.is_float:
        ran = replace(ran, source_off=max(map(subject.hold_split, (short, *far))))
    report("checking: the program", 2, 3)
    if reason:
        return subject.judged(ran, subject.eager(compiled.lowered, short))
    if emulator_of(split):
        return _hold_emulated(subject, ran, first, far)
    program = ProgramHere(open_llm(compiled.folder, keeps_packed=False), _encoder_input(compiled.module))
    if isinstance(compiled.module, Decoder):
        subject.hold_encoder(program)
    if compiled.is_float:
        return replace(ran, source_off=max(subject.hold_program(program, place) for place in (first, *far)))
    segment_noise, logits_noise, logits = subject.hold_quantized(program, first, far)
    return subject.judged(replace(ran, segment_noise=segment_noise, logits_noise=logits_noise), logits)


@dataclass(frozen=True)
class _Subject:
    """What is compared, with the logits that the source gives by the first position: each [T, vocab]."""

    compiled: Compiled
    token_ids: Tensor
    source: dict[int, Tensor]
    unsettled: dict[int, int] = field(default_factory=dict)  # by the first position, rows that were left out

    def chunks(self, place: Place) -> tuple[Tensor, ...]:
        return torch.split(self.token_ids[:, : place.num_tokens], list(place.chunks), dim=1)

    def eager(self, torch_split: TorchSplit, place: Place, on_call: OnCall | None = None) -> Tensor:
        """The logits of the split in eager torch, [T, vocab]."""
        values = {value.name: value for value in torch_split.split.values}
        cached = {
            name: in_format(rows, values[name]) if values[name].kind == "cache" else rows
            for name, rows in marked_rows(torch_split.split, place.start).items()
        }
        modules = quick_modules(torch_split)
        long = 0 < self.compiled.rotary_border < place.end
        chunks = self.chunks(place)
        logits = run_chunks(torch_split, chunks, modules, cached=cached, long=long, on_call=on_call)
        return torch.cat(list(logits), 1)[0]

    def program(self, program: Runner, place: Place) -> Tensor:
        """The logits of the program, [T, vocab]: chunks as prompts and single tokens as decoding run them."""
        cached = marked_rows(self.compiled.lowered.split, place.start)
        chunks = place.chunks
        singles = next((n for n, size in enumerate(reversed(chunks)) if size > 1), len(chunks))
        ids = self.token_ids[0, : place.num_tokens].numpy()
        rows = {name: tensor[0].numpy() for name, tensor in cached.items()}
        return torch.from_numpy(program.logits(Run(ids, singles, rows, place.start)))

    def hold_split(self, place: Place) -> float:
        return self._hold(
            self.eager(self.compiled.reference, place), place, "the model's segments give", self._meeting
        )

    def hold_program(self, program: Runner, place: Place) -> float:
        def where() -> str:
            self.hold_split(place)  # says more where the fault is older
            worst = self._noisiest(program)
            return f"segment {worst.segment} is off by {worst.size:.1g} by itself"

        return self._hold(self.program(program, place), place, "the program gives", where)

    def _hold(self, found: Tensor, place: Place, what: str, where: Callable[[], str]) -> float:
        """How far the logits are from the source's; CheckError, which asks `where`, for more than rounding gives."""
        wanted = self.source[place.start][: place.num_tokens]
        off = difference(found, wanted)
        if off <= FLOAT_BOUND:
            return off
        bounds, settled = self._bounds(place)
        found, wanted, bounds = found[settled], wanted[settled], bounds[settled]
        row = first_row_over(found, wanted, bounds)
        if row is not None:
            position = place.start + int(settled.nonzero()[row])
            raise self._refusal(
                f"{what} other logits than the source from position {position} on: off by "
                f"{difference(found, wanted):.2g} of the largest, expected at most "
                f"{float(bounds[row]):.1g}; {where()}"
            )
        return difference(found, wanted)

    def _bounds(self, place: Place) -> tuple[Tensor, Tensor]:
        """float [T]: how far each row may be off; bool [T]: the rows that are held, all where rounding decides many."""
        cached = marked_rows(self.compiled.reference.split, place.start)
        ids, wanted = self.token_ids[:, : place.num_tokens], self.source[place.start][: place.num_tokens]
        moved = moved_rows(self.compiled.module, ids, cached, wanted)
        bounds, settled = moved.clamp(FLOAT_BOUND, SENSITIVE_BOUND), moved <= SENSITIVE_BOUND
        left_out = int((~settled).sum())
        if left_out > max(1, _MOST_UNSETTLED * len(settled)):
            return bounds, torch.ones_like(settled)
        self.unsettled[place.start] = max(left_out, self.unsettled.get(place.start, 0))
        return bounds, settled

    def hold_encoder(self, program: ProgramHere) -> None:
        """CheckError where the program's encoder gives other keys and values than the source's rows make, for the
        example and for as few and as many rows as it takes."""
        decoder, split = self.compiled.module, program.program.split
        names = [value.name for value in split.values if value.kind == "encoded"]
        most = max(program.program.manifest.split.function(ENCODER).ranges, default=None)
        examples = [decoder.encoder_input]
        for rows in (1, most.high) if most else ():
            examples.append(decoder.encoder_input.repeat(1, rows)[:, :rows])
        for example in examples:
            found = program.methods[ENCODER](example)
            wanted = self.compiled.encode(decoder.encode(example))
            for name, one, other in zip(names, found, wanted, strict=True):
                off = difference(one, other)
                if not off <= FLOAT_BOUND:
                    raise self._refusal(
                        f"the encoder gives other numbers for {name} than the source from an input of shape "
                        f"{list(example.shape)}: off by {off:.2g} of the largest, expected at most {FLOAT_BOUND:.0e}"
                    )

    def hold_segments(self, worst: Noise) -> float:
        if not worst.size <= worst.bound:
            raise self._refusal(
                f"segment {worst.segment} of the program gives other numbers than in eager torch on the same inputs: "
                f"noise {worst.size:.2g}, expected at most {worst.bound:.2g}"
            )
        return worst.size

    def _noisiest(self, program: Runner) -> Noise:
        """The segment that is furthest from eager torch, over a chunk of each size that it is compiled for."""
        # Each by itself: together they may be more than the context.
        runs = [
            noisiest(self.compiled.lowered, program.methods, [self.token_ids[:, :size]])
            for size in self.sizes
        ]
        return max(runs, key=lambda worst: worst.excess)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of rows that each segment is tried with."""
        shape = chunk_shape(self.compiled.lowered.split)
        return shape.sizes if isinstance(shape, FixedSizes) else (1, min(most_rows(shape), 23))

    def hold_quantized(
        self, program: Runner, first: Place, far: Sequence[Place]
    ) -> tuple[float, float, Tensor]:
        """The noise of segments and of logits against the quantized split, and the first place's logits."""
        is_fixed = isinstance(chunk_shape(self.compiled.lowered.split), FixedSizes)
        # Eager torch makes float32 of all weights for every chunk, so one run serves segments and logits where it may.
        if is_fixed:
            segment_noise = self.hold_segments(self._noisiest(program))
            wanted = self.eager(self.compiled.lowered, first)
        else:
            compared = Comparison(self.compiled.lowered, program.methods, self.sizes)
            wanted = self.eager(self.compiled.lowered, Place(0, (first.num_tokens,)), compared)
            segment_noise = self.hold_segments(compared.worst)
        found = self.program(program, first)
        noises = [self._hold_logits(found, wanted, first)]
        for place in far:
            at_once = place if is_fixed else Place(place.start, (place.num_tokens,))
            wanted = self.eager(self.compiled.lowered, at_once)
            noises.append(self._hold_logits(self.program(program, place), wanted, place))
        return segment_noise, max(noises), found

    def _hold_logits(self, found: Tensor, wanted: Tensor, place: Place) -> float:
        off = noise(found, wanted)
        if not off <= LOGITS_BOUND:
            at, sizes = 0, []
            for size in place.chunks:
                sizes.append(noise(found[at : at + size], wanted[at : at + size]))
                at += size
            worst = max(range(len(sizes)), key=sizes.__getitem__)
            position = place.start + sum(place.chunks[:worst])
            raise self._refusal(
                f"from position {position} on the program gives other logits than its segments in eager torch: noise "
                f"{sizes[worst]:.2g}, expected at most {LOGITS_BOUND}"
            )
        return off

    def judged(self, ran: Check, logits: Tensor) -> Check:
        """`ran`, with how far the quantized logits are from the source's."""
        top1, kl = agreement(logits, self.source[0][: len(logits)])
        return replace(ran, top1=top1, kl=kl)

    def _meeting(self) -> str:
        place = Place(0, (len(self.source[0]),)).cut(self.compiled.split_chunks)
        met = meeting_rows(self.compiled.reference, self.chunks(place))
        if met is None:
            return "no segment depends on how the prompt is cut: the exported graph is another function than the model"
        return f"{met} depends on how the prompt is cut into chunks: rows meet there"

    def _refusal(self, what: str) -> CheckError:
        return refusal(self.compiled, what)


def _hold_emulated(subject: _Subject, ran: Check, first: Place, far: Sequence[Place]) -> Check:
    """Run few tokens, as an emulator takes tenths of a second a segment: each segment at each size, a padded chunk, a
    single token, and a chunk at each far place.

    It runs in a process of its own: once it is loaded a process cannot compile for the chip again, as what it loads
    does not survive the forks of forked.py.
    """
    compiled = subject.compiled
    sizes = [size for size in subject.sizes if size > 1]
    few = first.cut((max(1, min(sizes, default=1) - 1), 1))
    in_chunks = [place for place in far if place.chunks[0] > 1]
    try:
        with program_apart(compiled.folder) as program:
            segment_noise, logits_noise, _ = subject.hold_quantized(program, few, in_chunks)
    except RunError as error:
        raise refusal(compiled, str(error)) from error
    ran = replace(ran, num_tokens=few.end, segment_noise=segment_noise, logits_noise=logits_noise)
    return subject.judged(ran, subject.eager(compiled.lowered, first.cut(compiled.split_chunks)))


def _encoder_input(module: Any) -> Any:
    """An example of what the encoder takes, None for a model without one."""
    return module.encoder_input.numpy() if isinstance(module, Decoder) else None


def _source(compiled: Compiled, token_ids: Tensor, places: Sequence[Place]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for place in places:  # in any chunks the source gives the same for a place's tokens
        if place.start not in found:
            ids, cached = token_ids[:, : place.num_tokens], marked_rows(compiled.reference.split, place.start)
            found[place.start] = source_logits(compiled.module, ids, cached)
    return found


def token_ids(compiled: Compiled, number: int) -> Tensor:
    """int64 [1, number]: a text's tokens, over and over, or random ones where the model has no tokenizer."""
    path = compiled.folder / TOKENIZER_FILE
    ids = [token for token in text_tokens(path) if token < compiled.vocab_size] if path.exists() else []
    if len(ids) < 2:
        return torch.randint(
            0, compiled.vocab_size, (1, number), generator=torch.Generator().manual_seed(20261)
        )
    return torch.tensor([(ids * (number // len(ids) + 1))[:number]])
