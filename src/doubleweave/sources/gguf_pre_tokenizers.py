r"""How byte-pair tokenizers of GGUF files cut a text before merging, by the name in tokenizer.ggml.pre.

The names, and which of them cut alike, are llama.cpp's (ggml-org/llama.cpp, src/llama-vocab.cpp, llm_tokenizer_bpe).
The patterns are those of the models' own tokenizer.json. Each pattern cuts what the one before it left; what no pattern
takes stays a piece. GPT-2's pattern is ByteLevel's own in the library `tokenizers`, and `\p{N}` alone is its Digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer


class Cut(NamedTuple):
    """Patterns in order. `whole_words`: a piece that is a token is not merged anew. `composes`: NFC comes first."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    composes: bool = False
    adds_bos: bool = False


_GPT2 = "gpt-2's own"
_DIGIT = r"\p{N}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_PATHS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_PATHS}"
_GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_PATHS}"
)
_FINNISH = " ?[^(\\s|.,!?…。，、।۔،)]+"  # noqa: RUF001
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
# doubleweave-run's PCRE2 takes ^ and $ for other anchors than Oniguruma, so both are escaped.
_DEEPSEEK3 = (
    r"[!\"#\$%&'()*+,\-./:;<=>?@\[\\\]\^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    rf"|{_SPACES}"
)
_HAN_AND_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Letters with a case of the scripts that the model was trained on.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)

_CUTS: dict[Cut, tuple[str, ...]] = {
    # What llama.cpp cuts by where a file names nothing.
    Cut((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")): ("default",),
    Cut((_GPT2,)): (
        *(
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "gigachat",
            "a.x-4.0",
            "mellum",
        ),
        *("exaone4", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "modern-bert"),
    ),
    Cut((_DIGIT, _GPT2)): (
        *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    Cut((_LLAMA3,), whole_words=True, adds_bos=True): (
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    Cut((_LLAMA3,)): ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"),
    Cut((_QWEN2,), composes=True): ("qwen2", "deepseek-r1-qwen"),
    Cut((_QWEN2,)): ("stablelm2", "hunyuan", "solar-open", "megrez", "kormo", "grok-2"),
    Cut((_QWEN35,), composes=True): ("qwen35",),
    Cut((_TEKKEN,), whole_words=True, adds_bos=True): ("tekken",),
    Cut((_GPT4O,)): ("gpt-4o", "llama4", "kanana2", "minimax-m2"),
    Cut(
        (
            "[\r\n]",
            rf"\s?[{_CASED}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+(?![\s\S])",  # to the end of the text
            _HAN_AND_HANGUL,
            r"\p{N}+",
        )
    ): ("deepseek-llm",),
    Cut(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_AND_HANGUL, r"\p{N}")): ("deepseek-coder",),
    Cut((r"\p{N}{1,3}", _CJK, _DEEPSEEK3)): ("deepseek-v3", "hunyuan-dense", "joyai-llm"),
    Cut((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")): ("falcon",),
    Cut((_FINNISH,)): ("poro-chat", "bloom", "gpt3-finnish"),
    Cut((_FINNISH, r"\p{N}")): ("viking",),
    Cut((r"\p{N}+", r"(?=(\d{3})+(?!\d))")): ("superbpe",),
    Cut((rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}|{_SIGNS}|\s*[\r\n]|\s+(?!\S)|\s+",)): (
        *("bailingmoe", "bailingmoe2", "llada-moe"),
    ),
    Cut((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",)): ("seed-coder",),
}
CUTS = {name: cut for cut, names in _CUTS.items() for name in names}


def pre_tokenizer(cut: Cut) -> PreTokenizer:
    """The steps of the library `tokenizers`: the patterns, then bytes as letters."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = []
    bytes_by_pattern = cut.patterns[-1] == _GPT2  # then ByteLevel does both
    for pattern in cut.patterns[: -1 if bytes_by_pattern else None]:
        if pattern == _DIGIT and bytes_by_pattern:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            regex = GPT2_PATTERN if pattern == _GPT2 else pattern
            steps.append(pre_tokenizers.Split(Regex(regex), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bytes_by_pattern))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def patterns_of(name: str) -> tuple[str, ...]:
    """The patterns under the name, GPT-2's written out."""
    return tuple(GPT2_PATTERN if pattern == _GPT2 else pattern for pattern in CUTS[name].patterns)
