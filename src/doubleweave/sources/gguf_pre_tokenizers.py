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
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    rf"|{_SPACES}"
)
_HAN_AND_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Letters with a case of the scripts that the model was trained on.
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼι"
    "ῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏"  # noqa: RUF001
    "𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
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
            "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",  # noqa: RUF001
            r"\s+$",
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
