"""Damages a copy of a program folder many times and uses it each time as a user would, in a process of its own: a crash
ends nothing but this.

    python damage_batch.py DAMAGE USE FOLDER FIRST COUNT SEED

The copy lies in the working folder. Each damage follows from the seed and its number alone. The number is printed
before the damage is tried, so the last number printed is that of a crash, or of a hang, which ends the process after a
minute with the place where it hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import math
import random
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import doubleweave as dw
from doubleweave.cli.main import main
from doubleweave.errors import DoubleweaveError
from doubleweave.ir.manifest import MANIFEST_FILE, TOKENIZER_FILE
from doubleweave.ir.seal import digest_of, sealed
from doubleweave.predict.find_profile import PROFILE_FILE
from doubleweave.predict.profile_file import profile_dict, read_profile
from mutations import damaged, other_json, with_double_keys

_MOST_SECONDS = 60
_PROMPT = list(range(1, 40))  # more than a chunk


def check_one_line(error: DoubleweaveError) -> None:
    assert "\n" not in str(error), str(error)
    assert len(str(error)) < 2000, str(error)


# ---- Damages: each changes one file of the folder, and takes what the whole files have.

Whole = dict[str, bytes]


def damage_bytes(folder: Path, whole: Whole, dice: random.Random) -> None:
    """Other bytes, no bytes, another file's bytes, a folder, or nothing at all."""
    name = dice.choice(sorted(whole))
    path = folder / name
    kind = dice.randrange(24)
    if kind > 3:
        path.write_bytes(damaged(whole[name], dice))
        return
    path.unlink()
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.write_bytes(b"")
    elif kind == 3:
        path.write_bytes(whole[dice.choice(sorted(whole))])


def damage_manifest(folder: Path, whole: Whole, dice: random.Random) -> None:
    """A manifest that says something else, under a seal that fits."""
    data = _without_seal(whole)
    if dice.randrange(20) == 0:
        (folder / MANIFEST_FILE).write_text(with_double_keys(data, dice))
    else:
        other = other_json(data, dice)
        for _ in range(dice.choice((0, 0, 1, 2)) if isinstance(other, dict) and other else 0):
            other = other_json(other, dice)
        (folder / MANIFEST_FILE).write_bytes(sealed(other) if isinstance(other, dict) else b"[]")


def damage_tokenizer(folder: Path, whole: Whole, dice: random.Random) -> None:
    """A tokenizer.json that says something else, with the digest that the manifest has of it."""
    path = folder / TOKENIZER_FILE
    if dice.randrange(4):
        path.write_text(json.dumps(other_json(json.loads(whole[TOKENIZER_FILE]), dice)))
    else:
        path.write_bytes(damaged(whole[TOKENIZER_FILE], dice))
    changed = {**_without_seal(whole), "tokenizer_digest": digest_of(path)}
    (folder / MANIFEST_FILE).write_bytes(sealed(changed))


def damage_profile(folder: Path, whole: Whole, dice: random.Random) -> None:
    """A profile that says something else: people write these, so they have no seal."""
    import tomli_w

    path = folder / PROFILE_FILE
    data = profile_dict(read_profile(path))
    while dice.randrange(4):
        with contextlib.suppress(TypeError, ValueError, RecursionError):  # what TOML cannot say
            path.write_text(tomli_w.dumps(other_json(data, dice)))
            return
    path.write_bytes(damaged(whole[PROFILE_FILE], dice))


def _without_seal(whole: Whole) -> dict[str, Any]:
    data = json.loads(whole[MANIFEST_FILE])
    del data["seal"]
    return dict(data)


# ---- Uses: each gives what a user sees of the folder, as plain data that is equal where nothing changed.


def generate(folder: Path) -> Any:
    """Open a language model's program and let it write, from a text where there is a tokenizer."""
    program = dw.open(folder)
    if not isinstance(program, dw.Program):
        return str(program)
    found = [program.generate(_PROMPT, 3, session=program.session(threads=1)).token_ids]
    if program.manifest.tokenizer_digest:
        answer = program.generate("some <|end|> text é", 3, session=program.session(threads=1))
        found += [answer.token_ids, answer.text]
    return found


def call(folder: Path) -> Any:
    """Open a module's program and call it and what it is made of, twice."""
    program = dw.open(folder)
    if not isinstance(program, dw.ModuleProgram):
        return str(program)
    program.threads = 1
    x, index = np.linspace(-1, 1, 36, dtype=np.float32).reshape(9, 4), np.array([1, 0, 2])
    found = []
    for _ in range(2):
        found.append(_said(lambda: program(x, {"index": index})))
        for name in sorted(program.methods):
            method = program.methods[name]
            given = [_ones(value.shape, value.dtype) for value in method.function.inputs]
            found.append(_said(lambda method=method, given=given: method(*given)))
        found.append({name: program.state[name].tolist() for name in program.state})
    program.reset()
    return [*found, _said(lambda: program.submit(x, {"index": index}).result())]


def _said(run: Callable[[], Any]) -> str:
    """What a call gives; not every piece takes its tensors one by one."""
    try:
        return repr(run())
    except DoubleweaveError as error:
        check_one_line(error)
        return str(error)


def _ones(shape: tuple[int | str, ...], dtype: str) -> Any:
    sizes = [size if isinstance(size, int) else 4 if size == "T" else 3 for size in shape]
    kind = "uint16" if dtype == "bfloat16" else dtype
    return np.ones(sizes if math.prod(sizes) < 2**20 else [0] * len(sizes), kind)


_COMMANDS = (
    ("inspect", "--calls", "--memory", "--json"),
    ("simulate", "--prompt-len", 50, "--gantt", "--show-schedule", "--json"),
    ("simulate", "--schedule", "out_of_order", "--threads", 2, "--json"),
    ("plan", "--prompt-len", "3,50", "--json"),
    ("prepare", "--json"),
    ("run", "-p", "hi", "-n", 2, "--threads", 1, "--json"),
    ("bench", "--prompt-len", 40, "--gen", 2, "--runs", 1, "--threads", 1, "--json"),
)


def commands(folder: Path) -> Any:
    """What the command line says of the folder; raises AssertionError where it says it in another way than one line."""
    found = []
    for name, *options in _COMMANDS:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([name, str(folder), *map(str, options), "--traceback"])
        lines = err.getvalue().splitlines()
        if code != 0 and lines and lines[0].startswith("Traceback"):
            lines = (
                lines[-1:] if code == 2 else lines
            )  # of an error that users meet, --traceback shows it as well
        assert code in (0, 2), (name, code, err.getvalue())
        assert len(lines) == (code == 2), (name, code, err.getvalue())
        found.append(
            (name, code) if code else (name, json.loads(out.getvalue().splitlines()[-1]).get("token_ids"))
        )
    return found


DAMAGES: dict[str, Callable[[Path, Whole, random.Random], None]] = {
    "bytes": damage_bytes,
    "manifest": damage_manifest,
    "tokenizer": damage_tokenizer,
    "profile": damage_profile,
}
USES: dict[str, Callable[[Path], Any]] = {"generate": generate, "call": call, "commands": commands}
_SAME = ("bytes", "profile")  # damages after which what is not refused must be what it was


def _restore(folder: Path, whole: Whole) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in whole.items():
        (folder / name).write_bytes(content)


def run(damage: str, use: str, source: Path, first: int, count: int, seed: int) -> int:
    """Try `count` damages from number `first` on; returns how many of them went wrong."""
    whole = {path.name: path.read_bytes() for path in sorted(source.iterdir())}
    folder = Path(f"{damage}-{use}-{source.name}-{first}-{seed}")
    _restore(folder, whole)
    wanted = USES[use](folder)
    faults = refused = 0
    for number in range(first, first + count):
        print(number, flush=True)
        faulthandler.dump_traceback_later(_MOST_SECONDS, exit=True)
        _restore(folder, whole)
        DAMAGES[damage](folder, whole, random.Random(f"{seed} {number}"))
        try:
            found = USES[use](folder)
            assert damage not in _SAME or _is_answer(found, wanted), (found, wanted)
            refused += found != wanted
        except DoubleweaveError as error:
            check_one_line(error)
            refused += 1
        except KeyboardInterrupt:
            raise
        except BaseException:  # a panic of a library in Rust is no Exception
            faults += 1
            print(f"number {number}:", file=sys.stderr)
            traceback.print_exc()
    faulthandler.cancel_dump_traceback_later()
    shutil.rmtree(folder)
    print(f"{count} damages, {refused} told, {faults} faults")
    return faults


def _is_answer(found: Any, wanted: Any) -> bool:
    """Whether the answers are those of the whole folder; a command may have refused."""
    if isinstance(found, list) and found and isinstance(found[0], tuple) and isinstance(found[0][0], str):
        return all(got == want or got[1] == 2 for got, want in zip(found, wanted, strict=True))
    return bool(found == wanted)


if __name__ == "__main__":
    damage, use, folder, first, count, seed = sys.argv[1:]
    sys.exit(min(1, run(damage, use, Path(folder), int(first), int(count), int(seed))))
