"""Text to token ids and back: tokenizer.json and the model's chat template.

It knows nothing of programs beyond their ModelInfo, and needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from doubleweave.errors import InputError, ProgramError
from doubleweave.ir.chat import render_chat
from doubleweave.ir.manifest import ModelInfo


class Text:
    """Encode prompts, decode tokens."""

    def __init__(self, path: Path, model: ModelInfo) -> None:
        import tokenizers

        if not path.exists():
            raise ProgramError(
                f"{path}: missing: the model came without a tokenizer; give the prompt with --token-ids"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise ProgramError(f"{path}: is not a tokenizer ({error}); compile the program again") from None
        self._model = model

    def encode(self, prompt: str, *, raw: bool = False) -> list[int]:
        """Token ids of a prompt, as one user message of the chat template unless `raw`.

        Raises InputError for an empty prompt and for one that is not valid Unicode.
        """
        if not prompt:
            raise InputError("prompt: found an empty text, expected at least one character")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"prompt: is not valid Unicode ({error.reason}); give it as UTF-8") from None
        if raw or self._model.chat_template is None:
            return list(self._tokenizer.encode(prompt).ids)
        return self.encode_chat([{"role": "user", "content": prompt}])

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation (role and content each) up to where the assistant answers."""
        if self._model.chat_template is None:
            raise InputError("chat: the model has no chat template; give the prompt raw")
        # The template writes the special tokens itself.
        return self.encode_raw(render_chat(self._model.chat_template, messages, self._model.special_tokens))

    def encode_raw(self, text: str) -> list[int]:
        """Token ids of a text as it is, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


class Stream:
    """Turns tokens into text piece by piece, holding back incomplete characters and possible stop texts."""

    def __init__(self, text: Text, stop: Sequence[str]) -> None:
        if any(not s for s in stop):
            raise InputError("stop: found an empty text, expected at least one character")
        self._text = text
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._given = 0
        self._whole = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that no later token can change, after one more token; sets `stopped` at a stop text."""
        self._ids.append(token_id)
        whole = self._text.decode(self._ids)
        for stop in self._stop:
            whole, found, _ = whole.partition(stop)
            self.stopped = self.stopped or bool(found)
        certain = len(whole)
        if not self.stopped:
            # A byte-level tokenizer shows a half character as U+FFFD until its last token came.
            while certain and whole[certain - 1] == "\ufffd":
                certain -= 1
            held = max((_overlap(whole[:certain], stop) for stop in self._stop), default=0)
            certain -= held
        piece = whole[self._given : certain]
        self._given = max(self._given, certain)
        self._whole = whole
        return piece

    def finish(self) -> str:
        """The text that `push` held back."""
        rest = self._whole[self._given :]
        self._given += len(rest)
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a stop text begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
