"""Chat templates: messages rendered to text, and the affixes by which a runner without Jinja renders one message.

It knows nothing of tokens or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from doubleweave.errors import InputError

_PROMPT = "doubleweave:prompt"


def render_chat(template: str, messages: Sequence[dict[str, str]], special_tokens: dict[str, str]) -> str:
    """Render as transformers' `apply_chat_template` does: sandboxed, with its block trimming and loop controls.

    Raises InputError for a template that fails.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    try:
        rendered: str = environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, **special_tokens
        )
    except Exception as error:  # a template is a program: it may divide by zero
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"chat template: {reason}; give the prompt raw (--raw)") from None
    return rendered


class Affixes(NamedTuple):
    """The text that a template puts `before` and `behind` a user's message; `strips` says whether it strips the message
    of white space."""

    before: str
    behind: str
    strips: bool


def affixes_of(template: str, special_tokens: dict[str, str]) -> Affixes | None:
    """The affixes that render a single user message as `template` does; None for a template that does more.

    The template renders a message of known text, plain and between white space, and the results are compared.
    """

    def parts(prompt: str, shown: str) -> list[str]:
        return render_chat(template, [{"role": "user", "content": prompt}], special_tokens).split(shown)

    try:
        plain = parts(_PROMPT, _PROMPT)
        spaced = f" \n{_PROMPT}\t\n"
        as_it_is, stripped = parts(spaced, spaced), parts(spaced, _PROMPT)
    except InputError:
        return None
    if len(plain) != 2 or plain not in (as_it_is, stripped):
        return None
    return Affixes(plain[0], plain[1], strips=plain != as_it_is)
