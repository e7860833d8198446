"""Engines as long-lived processes that take turns: all but the one that is measured are stopped.

A stopped process (SIGSTOP) cannot spin in a barrier, poll, or use memory bandwidth, whatever its threads were
doing. It knows nothing of which engines there are.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from common import BenchmarkError, note
from machine import OtherCpu

SERVE = Path(__file__).parent / "serve"


class Worker:
    """One engine's process, stopped whenever it is not answering."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name, self._log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.pid = self._process.pid
        try:
            self.ready = self._read()
        except BaseException:
            self.close()
            raise
        os.kill(self.pid, signal.SIGSTOP)

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Wake the worker, let it answer, stop it again."""
        assert self._process.stdin is not None
        os.kill(self.pid, signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
            return self._read()
        except BrokenPipeError:
            raise self._failed("ended") from None
        finally:
            if self._process.poll() is None:
                os.kill(self.pid, signal.SIGSTOP)

    def close(self) -> None:
        self._process.kill()  # reaches stopped processes too
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failed("ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._failed(answer["error"])
        return answer

    def _failed(self, what: str) -> BenchmarkError:
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
        return BenchmarkError(f"{self.name}: {what}; its log {self._log} ends with: {last[0]}")


@dataclass
class Entrant:
    """A worker in a contest: how to ask it (the variant in use), and what it measured, round by round."""

    worker: Worker
    variants: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    variant: dict[str, Any] = field(default_factory=dict)
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)


class Contest:
    """Entrants take turns on the same prompts. Every second round runs backwards, so that a machine that
    grows slower or faster favours nobody. `other_cpu` is what other processes took of the machine, by round."""

    def __init__(self, entrants: dict[str, Entrant], prompt: Callable[[], list[int]], gen: int) -> None:
        self.entrants, self._prompt, self.gen = entrants, prompt, gen
        self.other_cpu: list[float] = []
        self._cpu = OtherCpu(lambda: [e.worker.pid for e in entrants.values()])

    def run(self, rounds: int, warmup: int) -> None:
        """Warm up, settle on each entrant's best variant, then measure `rounds` rounds."""
        for entrant in self.entrants.values():
            entrant.prefill_s, entrant.decode_s, entrant.tokens = [], [], []
        self.other_cpu = []
        for _ in range(max(1, warmup)):
            prompt = self._prompt()
            for entrant in self.entrants.values():
                for variant in entrant.variants:
                    self._ask(entrant, variant, prompt)
        for name, entrant in self.entrants.items():
            entrant.variant = self._best(name, entrant)
        for number in range(rounds):
            prompt = self._prompt()
            self._cpu.lap()
            names = list(self.entrants)[:: -1 if number % 2 else 1]
            for name in names:
                entrant = self.entrants[name]
                answer = self._ask(entrant, entrant.variant, prompt)
                entrant.prefill_s.append(answer["prefill_s"])
                entrant.decode_s.append(answer["decode_s"])
                entrant.tokens.append(answer["tokens"])
            self.other_cpu.append(self._cpu.lap())
            note(
                f"round {number + 1}/{rounds}: "
                + ", ".join(f"{name} {e.prefill_s[-1] * 1e3:.0f} ms" for name, e in self.entrants.items())
            )

    def ratios(self, name: str, other: str, what: str = "prefill_s") -> list[float]:
        """How many times as fast `name` is as `other`, round by round."""
        pair = zip(getattr(self.entrants[other], what), getattr(self.entrants[name], what), strict=True)
        return [theirs / ours for theirs, ours in pair]

    def _best(self, name: str, entrant: Entrant, tries: int = 3) -> dict[str, Any]:
        if len(entrant.variants) == 1:
            return entrant.variants[0]
        times: list[list[float]] = [[] for _ in entrant.variants]
        for _ in range(tries):
            prompt = self._prompt()
            for found, variant in zip(times, entrant.variants, strict=True):
                found.append(self._ask(entrant, variant, prompt)["prefill_s"])
        medians = [statistics.median(found) for found in times]
        best = entrant.variants[medians.index(min(medians))]
        tried = ", ".join(f"{v} {m * 1e3:.0f} ms" for v, m in zip(entrant.variants, medians, strict=True))
        note(f"{name}: takes {best} of {tried}")
        return best

    def _ask(self, entrant: Entrant, variant: dict[str, Any], prompt: list[int]) -> dict[str, Any]:
        return entrant.worker.ask("prefill_decode", ids=prompt, gen=self.gen, **variant)


class Workers:
    """Starts workers and ends every one of them, whatever happens."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._started: list[Worker] = []
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def start(self, name: str, script: str, *arguments: str, python: Path | str = sys.executable) -> Worker:
        command = [str(python), str(SERVE / script), *arguments]
        worker = Worker(name, command, self._logs / f"{name}.log")
        self._started.append(worker)
        return worker

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._started:
            worker.close()
