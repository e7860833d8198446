"""Text to token ids and back: tokenizer.json and the model's chat template.

It knows nothing of programs beyond their ModelInfo, and needs neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from doubleweave.errors import InputError, ProgramError
from doubleweave.ir.chat import choose_template, render_chat
from doubleweave.ir.manifest import ModelInfo
from doubleweave.runtime.llm.decode_steps import DecodeSteps


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
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special}

    def encode(self, prompt: str, *, raw: bool = False) -> list[int]:
        """Token ids of a prompt: one user message of the chat template, or, if `raw`, the text as it is with the
        special tokens that the tokenizer puts around every text.

        Raises InputError for an empty prompt and for one that is not valid Unicode.
        """
        if not prompt:
            raise InputError("prompt: found an empty text, expected at least one character")
        _check_unicode(prompt)
        if raw or self._model.chat_template is None:
            return list(self._tokenizer.encode(prompt).ids)
        return self.encode_chat([{"role": "user", "content": prompt}])

    def encode_chat(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation, as transformers' `apply_chat_template` gives them.

        `messages` are dicts with a role and content, and whatever else the template reads (tool_calls, content in
        parts). `tools` are JSON schemas, or functions where transformers is installed; `template` is a Jinja template
        or the name of one of the model's; `variables` are the template's own, such as enable_thinking.

        The conversation ends where the assistant answers, unless `add_generation_prompt` is False; with
        `continue_final_message` it ends within the last message, which the model continues.

        Raises InputError for messages that are none, a template that refuses them, or a model without a template.
        """
        if add_generation_prompt and continue_final_message:
            raise InputError(
                "chat: found add_generation_prompt and continue_final_message, expected one of them: "
                "an answer either begins or goes on"
            )
        chosen = choose_template(self._model.chat_template, template, has_tools=tools is not None)
        rendered = render_chat(
            chosen,
            messages,
            self._model.special_tokens,
            tools=tools,
            documents=documents,
            add_generation_prompt=not continue_final_message
            if add_generation_prompt is None
            else add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )
        _check_unicode(rendered)
        return self.encode_raw(rendered)  # the template writes the special tokens itself

    def encode_raw(self, text: str) -> list[int]:
        """Token ids of a text as it is, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def stream(self, stop: Sequence[str] = ()) -> Stream:
        """A decoder for one answer, token by token, that ends before the first of the texts `stop`."""
        decoder = self._tokenizer.decoder
        described = None if decoder is None else json.loads(decoder.__getstate__())
        return Stream(self, DecodeSteps(described, decoder.decode if decoder else " ".join), stop)

    def token_text(self, token_id: int) -> str | None:
        """A token as the vocabulary has it; None for a special one and for an id without a token."""
        token: str | None = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        return None if token in self._special else token


class Stream:
    """Turns tokens into text piece by piece, holding back incomplete characters and possible stop texts.

    The pieces joined are `Text.decode` of all tokens, up to a stop text. A token takes time that does not depend on how
    many came before.
    """

    def __init__(self, text: Text, steps: DecodeSteps, stop: Sequence[str]) -> None:
        if isinstance(stop, str):
            raise InputError(f"stop: found the text {stop!r}, expected a list of texts, such as [{stop!r}]")
        if any(not s for s in stop):
            raise InputError("stop: found an empty text, expected at least one character")
        self._text = text
        self._steps = steps
        self._stop = tuple(stop)
        self._held = ""  # what a stop text may begin with
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that no later token can change, after one more token; sets `stopped` at a stop text."""
        token = self._text.token_text(token_id)
        return "" if self.stopped or token is None else self._show(self._steps.push(token))

    def finish(self) -> str:
        """The text that `push` held back."""
        if self.stopped:
            return ""
        shown = self._show(self._steps.finish())
        rest, self._held = self._held, ""
        return shown + rest

    def _show(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        found = [text.find(stop) for stop in self._stop if stop in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"prompt: is not valid Unicode ({error.reason}); give it as UTF-8") from None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a stop text begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
