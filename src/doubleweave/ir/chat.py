"""Chat templates: messages rendered to text as transformers does, and the affixes for a runner without Jinja.

The environment and the defaults are those of transformers' utils/chat_template_utils.py and `apply_chat_template`. It
knows nothing of tokens or files.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib import import_module
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from doubleweave.errors import InputError

ChatTemplate = str | dict[str, str] | None  # a Jinja template, or several by name

_REASONING = ("reasoning_content", "thinking", "reasoning")
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


def choose_template(templates: ChatTemplate, name: str | None = None, *, has_tools: bool = False) -> str:
    """The template to render: the one called `name`, `name` itself where it is none's name, "tool_use" where there
    are tools, else "default" or the only one.

    Raises InputError where the model has none, or several and no default.
    """
    if name is not None:
        return templates[name] if isinstance(templates, dict) and name in templates else name
    if isinstance(templates, dict):
        for key in (*(["tool_use"] if has_tools else []), "default"):
            if key in templates:
                return templates[key]
        raise InputError(
            f"chat: the model has the templates {', '.join(sorted(templates))} and no default; say which by template="
        )
    if templates is None:
        raise InputError("chat: the model has no chat template; give the prompt raw (--raw)")
    return templates


def render_chat(
    template: str,
    messages: Sequence[Any],
    special_tokens: Mapping[str, str],
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[dict[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool | str = False,
    **variables: Any,
) -> str:
    """Render messages as transformers' `apply_chat_template` does.

    `tools` are JSON schemas or documented functions; `continue_final_message` ends the text within the last message's
    content, or in the field of that name; `variables` reach the template and hide special tokens.

    Raises InputError for a template that fails and for messages that are none.
    """
    chat = _chat(messages)
    field, final = None, ""
    if continue_final_message:
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        final = _mark_final(chat[-1], field, template)
    given = {
        "tools": None if tools is None else _plain([_schema(tool) for tool in tools]),
        "documents": _plain(documents),
        "add_generation_prompt": add_generation_prompt,
        **special_tokens,
        **_plain(variables),
    }
    text = _rendered(template, chat, given, _now)
    return text if field is None else _cut_at_mark(text, final)


def _chat(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages as the template sees them: plain data, without keys that are None, reasoning under all of its names."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise InputError(
            f"chat: found a {type(messages).__name__}, expected a list of messages, each a dict such as "
            '{"role": "user", "content": "…"}'
        )
    chat = []
    for found in map(_plain, messages):
        if not isinstance(found, dict):
            raise InputError(
                f"chat: found the message {found!r}, expected a dict such as "
                '{"role": "user", "content": "…"}'
            )
        message = {key: value for key, value in found.items() if value is not None}
        reasoning = next((message[key] for key in _REASONING if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        chat.append(message)
    if not chat:
        raise InputError("chat: found no message, expected at least one")
    return chat


def _plain(value: Any) -> Any:
    """A value rebuilt from JSON's types, so that a template reaches no method of the caller's objects."""
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):  # pydantic
        return _plain(dump())
    return f"<{type(value).__name__}>"


def _schema(tool: Any) -> Any:
    if isinstance(tool, dict):
        return tool
    if not (inspect.isfunction(tool) or inspect.ismethod(tool)):
        raise InputError(
            f"tools: found a {type(tool).__name__}, expected a JSON schema (a dict) or a function with type hints"
        )
    try:  # optional: only who gives a function needs it
        utils = import_module("transformers.utils.chat_template_utils")
    except ImportError:
        raise InputError(
            f"tools: found the function {tool.__name__}, whose schema transformers would make, which is not installed; "
            "give its JSON schema"
        ) from None
    try:
        return utils.get_json_schema(tool)
    except Exception as error:
        raise InputError(f"tools: {_first_line(error)}") from None


def _mark_final(message: dict[str, Any], field: str, template: str) -> str:
    """Put a mark behind the last message's text and return that text."""
    final = message.get(field)
    names = [name for name in _REASONING if message.get(name) == final] if field in _REASONING else [field]
    if final is None or not any(name in template for name in names):
        raise InputError(
            f"continue_final_message: found no field {field!r} in the "
            + ("last message" if final is None else "template")
            + "; name the field whose text goes on"
        )
    if isinstance(final, str):
        message.update(dict.fromkeys(names, final + _MARK))
        return final
    for block in reversed(final if isinstance(final, list | tuple) else ()):
        if isinstance(block, dict) and "text" in block:
            text = str(block["text"])
            block["text"] = text + _MARK
            return text
    raise InputError("continue_final_message: found no text in the last message, expected one that goes on")


def _cut_at_mark(text: str, final: str) -> str:
    if final.strip() not in text or _MARK.strip() not in text:
        raise InputError(
            "continue_final_message: the chat template changes or leaves out the last message's text; "
            "render the conversation by yourself and give it to encode_raw"
        )
    at = text.rindex(_MARK.strip())
    # A template that strips the message takes the mark's space away, and so the text's own before it.
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


def _rendered(
    template: str, chat: list[dict[str, Any]], given: dict[str, Any], now: Callable[[str], str]
) -> str:
    try:
        text: str = _compiled(template, now).render(messages=chat, **given)
    except Exception as error:  # a template is a program: it may divide by zero
        raise InputError(f"chat template: {_first_line(error)}; give the prompt raw (--raw)") from None
    return text


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@cache
def _compiled(template: str, now: Callable[[str], str]) -> Any:
    return _environment(now).from_string(template)


def _environment(now: Callable[[str], str]) -> Any:
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's tokens for training; its text stands as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

        def _text(self, caller: Any) -> Any:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """Without names that begin with an underscore, as transformers refuses them."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=…)` is one
            self, given = args[0], dict(*args[1:], **kwargs)
            for name in given:
                Namespace._check(name)
            jinja2.utils.Namespace.__init__(self, given)

        def __setitem__(self, name: Any, value: Any) -> None:
            Namespace._check(name)
            super().__setitem__(name, value)

        @staticmethod
        def _check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot have the name {name!r}")

    class Dict:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any, **kwargs: Any) -> Any:
            return dict.fromkeys(*args, **kwargs)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=now, dict=Dict(), namespace=Namespace
    )
    return environment


# For runners without Jinja


class Affixes(NamedTuple):
    """The text that a template puts `before` and `behind` a user's message; `strips` says whether it strips the message
    of white space."""

    before: str
    behind: str
    strips: bool

    def around(self, message: str) -> str:
        return self.before + (message.strip() if self.strips else message) + self.behind


_PROMPT = "doubleweave:prompt"
_MOST_PAIRS = 40
_MOST_LENGTH = 20_000


def affixes_of(templates: ChatTemplate, special_tokens: Mapping[str, str]) -> Affixes | None:
    """The affixes that render a single user message as the default template does; None for a template that does more.

    A template treats messages differently by comparing them with its own texts and numbers. So it renders messages
    made of those, others between white space, in both cases and several lengths; each has to come out between the
    affixes.
    A template that asks for the date, or chooses at random, is refused.
    """

    def no_date(pattern: str) -> str:
        raise ValueError("the date changes")

    given = {"tools": None, "documents": None, "add_generation_prompt": True, **special_tokens}

    def rendered(prompt: str) -> str:
        return _rendered(template, [{"role": "user", "content": prompt}], given, no_date)

    try:
        template = choose_template(templates)
        parts = rendered(_PROMPT).split(_PROMPT)
        if len(parts) != 2 or _is_random(template):
            return None
        strips = rendered(f" \n{_PROMPT}\t\n") != f"{parts[0]} \n{_PROMPT}\t\n{parts[1]}"
        affixes = Affixes(parts[0], parts[1], strips)
        probes = _probes(template, special_tokens)
        return affixes if all(rendered(probe) == affixes.around(probe) for probe in probes) else None
    except InputError:
        return None


def _is_random(template: str) -> bool:
    from jinja2 import nodes

    tree = _environment(_now).parse(template)
    return any(node.name in ("random", "lipsum") for node in tree.find_all((nodes.Filter, nodes.Name)))


def _probes(template: str, special_tokens: Mapping[str, str]) -> Iterator[str]:
    """Messages that a template may treat in a way of its own."""
    texts, compared, numbers = literals(template)
    yield from (
        f" \n{_PROMPT}\t\n",
        f"\n\n{_PROMPT}",
        f"{_PROMPT} ",
        " ",
        "\n",
        "0",
        "7",
        "1.5",
        "true",
        "none",
        "[]",
        "x",
    )
    yield from (
        "aB ǆß é日😀\u00a0b",
        "A\u2028B",
        "<a href='x'>&amp;\"\\ {{ x }} {% y %} {# z #}",
        "a\r\nb\n\n\nc  d",
    )
    yield from (
        f"\u00a0{_PROMPT}\u3000",
        f"\u200b{_PROMPT}\x1f",
        "# Title\n* one",
        _PROMPT.upper(),
        "é" * _MOST_LENGTH,
    )
    for text in dict.fromkeys([*texts, *special_tokens.values(), *"".join(compared)]):
        yield from (
            text,
            text + _PROMPT,
            _PROMPT + text,
            f"{text}{_PROMPT}{text}",
            f"{_PROMPT}{text}{_PROMPT}",
        )
        yield f" {text} "
    for first, second in product(compared[:_MOST_PAIRS], repeat=2):
        yield f"{first}{_PROMPT}{second}"
        yield f"{_PROMPT}{first}{_PROMPT}{second}{_PROMPT}"
    for number in sorted(numbers):
        yield from ("x" * length for length in range(max(1, number - 1), number + 2))
        yield from ("x " * length for length in range(max(1, number - 1), min(number, 1000) + 2))
        yield from ("x\n" * length for length in range(max(1, number - 1), min(number, 1000) + 2))
        yield str(number)


def literals(template: str) -> tuple[list[str], list[str], set[int]]:
    """A template's texts, those of them that it compares, searches or replaces, and its numbers from 0 on."""
    from jinja2 import nodes

    tree = _environment(_now).parse(template)
    found = [node.value for node in tree.find_all(nodes.Const)]
    texts = [value for value in found if isinstance(value, str) and value]
    data = [node.data for node in tree.find_all(nodes.TemplateData)]
    uses = tree.find_all((nodes.Compare, nodes.Call, nodes.Filter, nodes.Test, nodes.Assign))
    compared = [
        node.value
        for use in uses
        for node in use.find_all(nodes.Const)
        if isinstance(node.value, str) and node.value
    ]
    numbers = {abs(value) for value in found if type(value) is int and abs(value) <= _MOST_LENGTH}
    return list(dict.fromkeys(texts + data)), list(dict.fromkeys(compared)), numbers
