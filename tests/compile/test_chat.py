"""Chat templates render as in transformers' `apply_chat_template`, and affixes render a message as the template."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from doubleweave.errors import InputError
from doubleweave.ir.chat import Affixes, affixes_of, choose_template, literals, render_chat

FOLDER = Path(__file__).parents[1] / "data" / "chat_templates"
TEMPLATES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.jinja"))}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
# They ask for the date, ask for more than messages, or say a system prompt of their own by the message.
WITHOUT_AFFIXES = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "Mistral-Small-3.2-24B-Instruct-2506",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "ai-sage-GigaChat-20B-A3B-instruct",
    "bofenghuang-vigogne-2-70b-chat",
    "fireworks-ai-llama-3-firefunction-v2",
    "ibm-granite-granite-3.3-2B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "openai-gpt-oss-120b",
}
TEXTS = st.text(st.sampled_from("ab é日😀<>&\"'{}%\\\n\t"), max_size=15)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <in> a city & “more”",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Größe"}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        messages += [{"role": "user", "content": draw(TEXTS)}, {"role": "assistant", "content": draw(TEXTS)}]
    messages.append({"role": "user", "content": draw(TEXTS)})
    if draw(st.booleans()):
        answer = {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": draw(TEXTS)}
        messages += [{"role": "assistant", "content": draw(st.none() | TEXTS), "tool_calls": [CALL]}, answer]
    elif draw(st.booleans()):
        parts = [{"type": "text", "text": draw(TEXTS)}, {"type": "text", "text": draw(TEXTS)}]
        messages[-1] = {"role": "user", "content": parts}
    elif draw(st.booleans()):
        messages.append({"role": "assistant", "reasoning": draw(TEXTS), "content": draw(TEXTS)})
    return messages


@cache
def transformers_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL_TOKENS)


def expected(template, messages, **options):
    """What transformers renders; None where it refuses."""
    try:
        return transformers_tokenizer().apply_chat_template(
            messages, chat_template=template, tokenize=False, **options
        )
    except Exception:
        return None


def rendered(template, messages, **options):
    try:
        return render_chat(template, messages, SPECIAL_TOKENS, **options)
    except InputError:
        return None


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=12)
@given(
    messages=conversations(),
    tools=st.sampled_from([None, [], [TOOL], [TOOL, TOOL]]),
    documents=st.sampled_from([None, [{"title": "Größe <1>", "text": "one & two"}]]),
    add_generation_prompt=st.booleans(),
    enable_thinking=st.booleans(),
)
def test_templates_render_as_transformers_does(name, messages, **options):
    assert rendered(TEMPLATES[name], messages, **options) == expected(TEMPLATES[name], messages, **options)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=8)
@given(messages=conversations())
def test_final_messages_continue_as_in_transformers(name, messages):
    options = {"continue_final_message": True, "add_generation_prompt": False}
    assert rendered(TEMPLATES[name], messages, **options) == expected(TEMPLATES[name], messages, **options)


TRICKS = [
    "{{ tools is none }}{{ documents is none }}{{ x is defined }}{{ functions is defined }}",
    "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ messages | tojson(separators=(',', ':')) }}",
    "{{ messages[0] | tojson(ensure_ascii=True, sort_keys=True) }}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% set ns = namespace(_x=0) %}{{ ns }}",
    "{{ dict(a=1) | tojson }}{{ dict.fromkeys(['a', 'b']) }}",
    "  {% if true %}\n  a\n  {% endif %}\n{{ bos_token }}{{ eos_token }}<b>{{ '<b>' }}\n\n",
    "{{ strftime_now('%Y') }}",
    "{{ raise_exception('no') }}",
    "{{ messages.append(1) }}",
    "{{ messages.__class__ }}",
    "{{ messages[0].content.nothing }}{{ nothing }}",
    "{{ messages[-1].reasoning_content }}{{ messages[-1].thinking }}",
    "{% include 'x' %}",
]


@pytest.mark.parametrize("template", TRICKS)
@settings(max_examples=12)
@given(messages=conversations(), add_generation_prompt=st.booleans())
def test_what_templates_use_is_there_as_in_transformers(template, messages, add_generation_prompt):
    options = {"add_generation_prompt": add_generation_prompt}
    assert rendered(template, messages, **options) == expected(template, messages, **options)


def weather(city: str) -> str:
    """The weather.

    Args:
        city: where
    """
    return city


def test_functions_and_objects_reach_templates_as_in_transformers():
    import numpy as np

    template = "{{ tools | tojson }}{{ x }}{{ messages[0].content | tojson }}"
    messages = [
        {"role": "user", "content": [{"type": "image", "image": np.zeros(2)}, (1, True, np.float64(2))]}
    ]
    options = {"tools": [weather, TOOL], "x": np.bool_(False), "add_generation_prompt": True}
    assert rendered(template, messages, **options) == expected(template, messages, **options) is not None


def test_what_is_no_conversation_is_one_sentence():
    for messages, message in (
        ([], "chat: found no message, expected at least one"),
        ("hi", "chat: found a str, expected a list of messages"),
        ({"role": "user"}, "chat: found a dict, expected a list of messages"),
        (["hi"], "chat: found the message 'hi', expected a dict"),
    ):
        with pytest.raises(InputError, match=message):
            render_chat("", messages, {})
    for final, message in (
        ({"role": "assistant"}, "found no field 'content' in the last message"),
        ({"role": "assistant", "content": []}, "found no text in the last message"),
    ):
        with pytest.raises(InputError, match=message):
            render_chat("{{ messages[0].content }}", [final], {}, continue_final_message=True)
    with pytest.raises(InputError, match="the chat template changes or leaves out the last message's text"):
        render_chat("content", [{"role": "user", "content": "a"}], {}, continue_final_message=True)
    with pytest.raises(InputError, match="tools: found a int, expected a JSON schema"):
        render_chat("", [{"role": "user", "content": "a"}], {}, tools=[1])


def test_named_templates():
    named = {"default": "d", "tool_use": "t", "rag": "r"}
    assert choose_template(named) == choose_template({"default": "d"}, has_tools=True) == "d"
    assert choose_template(named, has_tools=True) == "t"
    assert choose_template(named, "rag", has_tools=True) == "r"
    assert choose_template(named, "{{ own }}") == choose_template(None, "{{ own }}") == "{{ own }}"
    with pytest.raises(InputError, match="has the templates a, b and no default; say which by template="):
        choose_template({"b": "", "a": ""})
    with pytest.raises(InputError, match="no chat template"):
        choose_template(None)


# Affixes


@pytest.mark.parametrize("name", TEMPLATES)
def test_real_templates_have_affixes(name):
    assert (affixes_of(TEMPLATES[name], SPECIAL_TOKENS) is None) == (name in WITHOUT_AFFIXES)


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - WITHOUT_AFFIXES))
@settings(max_examples=20)
@given(data=st.data())
def test_affixes_render_every_message_as_transformers_does(name, data):
    """Messages of anything, and of what the template itself writes or looks for."""
    template = TEMPLATES[name]
    affixes = _affixes(name)
    own = st.sampled_from([*literals(template)[0], *SPECIAL_TOKENS.values()])
    message = "".join(data.draw(st.lists(st.text(max_size=8) | TEXTS | own, min_size=1, max_size=6)))
    assume(message)
    found = expected(template, [{"role": "user", "content": message}], add_generation_prompt=True)
    assert affixes.around(message) == found


@cache
def _affixes(name):
    return affixes_of(TEMPLATES[name], SPECIAL_TOKENS)


SHOWN = "{{ messages[0]['content'] }}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0]['content'] | upper }}",
        "{{ messages[0]['content'] | lower }}",
        "{{ messages[0]['content'] | capitalize }}",
        "{{ messages[0]['content'] | title }}",
        "{{ messages[0]['content'] | e }}",
        "{{ messages[0]['content'] | tojson }}",
        "{{ messages[0]['content'] | urlize }}",
        "{{ messages[0]['content'] | striptags }}",
        "{{ messages[0]['content'] | indent }}",
        "{{ messages[0]['content'] | truncate(500) }}",
        "{{ messages[0]['content'] | wordwrap(79) }}",
        "{{ messages[0]['content'].lstrip() }}",
        "{{ messages[0]['content'].rstrip('\\n') }}",
        "{{ messages[0]['content'].split('</think>')[-1] }}",
        "{{ messages[0]['content'] | replace('\\n\\n', '\\n') }}",
        "{{ messages[0]['content'].split() | join(' ') }}",
        "{{ messages[0]['content'].encode() }}",
        "{{ messages[0]['content'] | int }}" + SHOWN,
        SHOWN + SHOWN,
        SHOWN + "{{ messages[0]['content'] | length }}",
        SHOWN + "{% if messages[0]['content'] | length > 3000 %}long{% endif %}",
        SHOWN + "{% if messages[0]['content'].split() | length > 77 %}wordy{% endif %}",
        SHOWN + "{% if messages[0]['content'] | wordcount == 3 %}three{% endif %}",
        SHOWN + "{% if '/no_think' in messages[0]['content'] %}<think></think>{% endif %}",
        SHOWN
        + "{% if messages[0]['content'].startswith('<a>') and messages[0].content.endswith('</a>') %}x{% endif %}",
        SHOWN + "{% if messages[0]['content'] == eos_token %}x{% endif %}",
        SHOWN + "{% if messages[0]['content'][0] in '?!' %}x{% endif %}",
        SHOWN + "{% if not messages[0]['content'].strip() %}x{% endif %}",
        SHOWN + "{% if messages[0]['content'].isdigit() %}x{% endif %}",
        SHOWN + "{% set tag %}<tool>{% endset %}{% if tag in messages[0]['content'] %}x{% endif %}",
        SHOWN + "{{ strftime_now('%Y') }}",
        SHOWN + "{% if strftime_now is defined %}{{ strftime_now('%d %b') }}{% endif %}",
        SHOWN + "{{ ['a', 'b'] | random }}",
        SHOWN + "{{ lipsum() }}",
        "{{ tools[0].name }}" + SHOWN,
        "no message",
        "{{ raise_exception('no') }}",
        "{% for %}",
    ],
)
def test_templates_that_do_more_have_no_affixes(template):
    assert affixes_of(template, SPECIAL_TOKENS) is None


def test_affixes_are_those_of_the_default_template():
    template = "<a>{{ messages[0].content | trim }}<b>"
    assert affixes_of({"default": template, "tool_use": "x"}, {}) == Affixes("<a>", "<b>", strips=True)
    assert affixes_of({"tool_use": template}, {}) is None
    assert affixes_of(None, {}) is None


def test_a_manifest_keeps_named_templates():
    from doubleweave.ir.manifest import ModelInfo, from_plain, to_plain

    for template in (None, "{{ x }}", {"default": "d", "tool_use": "t"}):
        info = ModelInfo(8, 8, (1,), template, {"eos_token": "</s>"}, "none")
        assert from_plain(ModelInfo, json.loads(json.dumps(to_plain(info)))) == info
