"""The decoder that tokenizer.json names, one token at a time: what a step may still change is held back.

The steps are those of Hugging Face's tokenizers; native/tokenizer/decoders.cpp has the same in C++. All of them
take time linear in the length of the text. It knows nothing of ids, vocabularies or stop texts.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import Any

# A step gets tokens by `push` and gives tokens; `finish` gives those that it held back.


class _Each:
    """Changes each token by itself."""

    def __init__(self, change: Callable[[str, bool], str]) -> None:
        self._change = change
        self._is_first = True

    def push(self, token: str) -> list[str]:
        changed = self._change(token, self._is_first)
        self._is_first = False
        return [changed]

    def finish(self) -> list[str]:
        return []


class _ByteFallback:
    """Tokens <0x00> to <0xFF> in a row are the bytes of characters. Where the row is no UTF-8, each of them becomes a
    U+FFFD; so a row is known when it ends."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def push(self, token: str) -> list[str]:
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            self._bytes.append(int(token[3:5], 16))
            return []
        return [*self.finish(), token]

    def finish(self) -> list[str]:
        row, self._bytes = self._bytes, bytearray()
        try:
            return [row.decode()] if row else []
        except UnicodeDecodeError:
            return ["\ufffd"] * len(row)


class _Bytes:
    """GPT-2's letters stand for bytes; a token with other letters is text. Gives whole characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: str) -> list[str]:
        known = [_LETTERS.get(letter) for letter in token]
        found = token.encode() if None in known else bytes(b for b in known if b is not None)
        return [self._decoder.decode(found)]

    def finish(self) -> list[str]:
        return [self._decoder.decode(b"", final=True)]


class _StripOnce:
    """Strips one text that comes in pieces of up to `start` and `stop` times a character at its ends."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._start, self._stop = content, start, stop
        self._held = ""

    def push(self, token: str) -> list[str]:
        while self._start and token:
            if not token.startswith(self._content):
                self._start = 0
                break
            token = token[len(self._content) :]
            self._start -= 1
        text = self._held + token
        ends = min(self._stop, len(text) - len(text.rstrip(self._content)))
        self._held = text[len(text) - ends :]
        return [text[: len(text) - ends]]

    def finish(self) -> list[str]:
        return []


class _Whole:
    """Gives the tokens joined, at the end."""

    def __init__(self, decode: Callable[[list[str]], str] = "".join) -> None:
        self._tokens: list[str] = []
        self._decode = decode

    def push(self, token: str) -> list[str]:
        self._tokens.append(token)
        return []

    def finish(self) -> list[str]:
        return [self._decode(self._tokens)]


Step = _Each | _ByteFallback | _Bytes | _StripOnce | _Whole


class DecodeSteps:
    """Turns tokens into text as they come.

    `described` is the decoder as tokenizer.json has it, None for none; `decode` decodes all tokens at once, at the end,
    where there is a step that is not known here (CTC, WordPiece).
    """

    def __init__(self, described: dict[str, Any] | None, decode: Callable[[list[str]], str]) -> None:
        flat = list(_flat(described)) if described is not None else []
        if described is None:  # tokens are taken for words
            self._steps: list[Step] = [_Each(lambda token, is_first: token if is_first else f" {token}")]
        else:
            known = _steps(flat)
            self._steps = [_Whole(decode)] if known is None else known

    def push(self, token: str) -> str:
        """The text that one more token makes certain."""
        return self._through([token], 0)

    def finish(self) -> str:
        """The text that was held back."""
        return "".join(self._through(step.finish(), at + 1) for at, step in enumerate(self._steps))

    def _through(self, tokens: list[str], start: int) -> str:
        for step in self._steps[start:]:
            tokens = [given for token in tokens for given in step.push(token)]
        return "".join(tokens)


def _flat(described: dict[str, Any]) -> list[dict[str, Any]]:
    if described["type"] == "Sequence":
        return [step for item in described["decoders"] for step in _flat(item)]
    return [described]


def _steps(described: list[dict[str, Any]]) -> list[Step] | None:
    """The steps; None if one is not known."""
    steps: list[Step] = []
    is_joined = False  # the tokens are pieces of one
    for at, step in enumerate(described):
        kind = step["type"]
        if kind in ("Fuse", "ByteLevel"):
            # Pieces can only go on into steps that take one text in pieces.
            is_joined = all(_takes_pieces(later) for later in described[at + 1 :])
            steps += [_Bytes()] if kind == "ByteLevel" else []
            steps += [] if is_joined else [_Whole()]
        elif kind == "Strip" and is_joined:
            steps.append(_StripOnce(step["content"], step["start"], step["stop"]))
        elif kind == "ByteFallback":
            steps.append(_ByteFallback())
        elif (change := _change(step)) is not None:
            steps.append(_Each(change))
        else:
            return None
    return steps


def _takes_pieces(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "")) == 1
    return step["type"] in ("Fuse", "ByteLevel", "Strip")


def _change(step: dict[str, Any]) -> Callable[[str, bool], str] | None:
    """What a step does to each token."""
    if step["type"] == "Strip":
        content, start, stop = step["content"], step["start"], step["stop"]
        return lambda token, is_first: _stripped(token, content, start, stop)
    if step["type"] == "Metaspace":
        mark, keeps_first = step["replacement"], step["prepend_scheme"] == "never"
        return lambda token, is_first: token.replace(mark, "" if is_first and not keeps_first else " ")
    if step["type"] == "Replace" and "String" in step["pattern"]:
        return lambda token, is_first: token.replace(step["pattern"]["String"], step["content"])
    return None


def _stripped(token: str, content: str, start: int, stop: int) -> str:
    token = token[min(start, len(token) - len(token.lstrip(content))) :]
    return token[: len(token) - min(stop, len(token) - len(token.rstrip(content)))]


def _letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones are themselves, the others those from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_LETTERS = _letters()
