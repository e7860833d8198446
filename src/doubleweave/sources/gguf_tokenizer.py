"""A GGUF file's tokenizer, built from its metadata for the library `tokenizers`: tokens, merges, ends, templates.

The keys and their defaults are llama.cpp's (ggml-org/llama.cpp, src/llama-vocab.cpp). A key that changes the tokens of
a text and is not read here is refused by its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from doubleweave.errors import SourceError
from doubleweave.sources.gguf_file import GgufFile
from doubleweave.sources.gguf_pre_tokenizers import CUTS, pre_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
_PREFIX = "tokenizer.ggml."
_MODELS = ("gpt2", "llama", "t5")
# Special tokens by key, under transformers' names where it has one.
_SPECIAL = {
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
    "seperator_token_id": "sep_token",  # spelt so in the files
    "cls_token_id": "cls_token",
    "mask_token_id": "mask_token",
}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Ends that no key needs to name, by their text (llama.cpp, special_eog_ids).
_END_TEXTS = (
    *(
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
    ),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),  # noqa: RUF001
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
)
_FIM = ("fim_pad_token_id", "fim_rep_token_id", "fim_sep_token_id")  # end an answer as well
# Read here, or without a part in the tokens of a text.
_READ = (
    *("model", "pre", "tokens", "token_type", "scores", "merges", *_SPECIAL, *_ENDS, *_FIM),
    *(
        "add_bos_token",
        "add_eos_token",
        "add_space_prefix",
        "remove_extra_whitespaces",
        "precompiled_charsmap",
    ),
    *("fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id"),
    *("prefix_token_id", "suffix_token_id", "middle_token_id", "token_type_count"),
)
_TEMPLATE, _TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"


class GgufTokenizer(NamedTuple):
    """`special`: the texts of special tokens by transformers' names, those that a chat template may use."""

    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    special: dict[str, str]
    chat_template: str | None

    def as_transformers(self) -> Any:
        """A tokenizer of transformers', for code that takes models of any source."""
        from transformers import PreTrainedTokenizerFast

        untyped: Any = PreTrainedTokenizerFast
        made = untyped(tokenizer_object=self.tokenizer, **self.special)
        made.chat_template = self.chat_template
        return made


class _Vocabulary(NamedTuple):
    tokens: list[str]
    kinds: list[int]
    scores: list[float]


def tokenizer_of(file: GgufFile) -> GgufTokenizer | None:
    """The file's tokenizer, None for a file without one; raises SourceError for keys it cannot honour."""
    if _get(file, "model") in (None, "none") or not _get(file, "tokens"):
        return None
    _refuse_unread(file)
    vocabulary = _vocabulary(file)
    model = str(_get(file, "model"))
    if model == "gpt2":
        tokenizer, adds_bos = _byte_pairs(file, vocabulary)
    elif model == "llama":
        tokenizer, adds_bos = _sentencepiece_bpe(file, vocabulary), True
    else:
        tokenizer, adds_bos = _unigram(file, vocabulary), False
    special = {
        name: vocabulary.tokens[id] for key, name in _SPECIAL.items() if (id := _id(file, key)) is not None
    }
    ends = _ends(file, vocabulary)
    _add_special(tokenizer, vocabulary, ends)
    _frame(file, tokenizer, adds_bos, adds_eos=model == "t5")
    return GgufTokenizer(tokenizer, ends, special, _chat_template(file))


def _get(file: GgufFile, key: str, default: Any = None) -> Any:
    return file.metadata.get(_PREFIX + key, default)


def _id(file: GgufFile, key: str) -> int | None:
    found = _get(file, key)
    if found is None or int(found) in (-1, 2**32 - 1):  # both are written for "none"
        return None
    if not 0 <= int(found) < len(_get(file, "tokens")):
        raise SourceError(
            f"{file.path}: found {_PREFIX}{key} {found}, expected one of the {len(_get(file, 'tokens'))} tokens; fetch "
            "the file again"
        )
    return int(found)


def _refuse_unread(file: GgufFile) -> None:
    model, pre = _get(file, "model"), _get(file, "pre", "default")
    if model not in _MODELS:
        raise SourceError(
            f"{file.path}: found {_PREFIX}model {model!r}, expected one of {', '.join(_MODELS)}; use the model's "
            "Hugging Face folder"
        )
    if model == "gpt2" and pre not in CUTS:
        raise SourceError(
            f"{file.path}: found {_PREFIX}pre {pre!r}, expected one of {', '.join(CUTS)}; use the model's Hugging Face "
            "folder"
        )
    for key, value in file.metadata.items():
        name = key.removeprefix(_PREFIX)
        if not key.startswith("tokenizer.") or key.startswith((_TEMPLATE, "tokenizer.huggingface.")):
            continue
        if name not in _READ and value not in (0, False, "", []):
            raise SourceError(
                f"{file.path}: found {key} {str(value)[:60]}, which is not read; use the model's Hugging Face folder"
            )


def _vocabulary(file: GgufFile) -> _Vocabulary:
    tokens = [token or f"[EMPTY_{id}]" for id, token in enumerate(_get(file, "tokens"))]
    kinds, scores = _get(file, "token_type"), _get(file, "scores")
    for key, values in (("token_type", kinds), ("scores", scores)):
        if values is not None and len(values) != len(tokens):
            raise SourceError(
                f"{file.path}: found {len(values)} values of {_PREFIX}{key} for {len(tokens)} tokens; fetch the file "
                "again"
            )
    if len(set(tokens)) != len(tokens):
        twice = next(token for id, token in enumerate(tokens) if token in tokens[:id])
        raise SourceError(f"{file.path}: found {twice!r} twice in {_PREFIX}tokens; fetch the file again")
    if kinds is None:
        ids = {_id(file, key) for key in (*_SPECIAL, *_ENDS)}
        kinds = [_CONTROL if id in ids else _NORMAL for id in range(len(tokens))]
    return _Vocabulary(tokens, [int(kind) for kind in kinds], scores or [0.0] * len(tokens))


def _byte_pairs(file: GgufFile, vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    from tokenizers import Tokenizer, decoders, models, normalizers

    cut = CUTS[_get(file, "pre", "default")]
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    # The first letter of a merge may itself be a space.
    merges = [
        (merge[:at], merge[at + 1 :]) for merge in _get(file, "merges", []) if (at := merge.find(" ", 1)) > 0
    ]
    for first, second in merges:
        if not {first, second, first + second} <= ids.keys():
            raise SourceError(
                f"{file.path}: found the merge {first!r} {second!r} in {_PREFIX}merges, but no token for each of the "
                "two and for both; fetch the file again"
            )
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=cut.whole_words))
    if cut.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer(cut)
    tokenizer.decoder = decoders.ByteLevel()
    if _get(file, "add_space_prefix", False):
        tokenizer.normalizer = normalizers.Sequence(
            [*([normalizers.NFC()] if cut.composes else []), normalizers.Prepend(" ")]
        )
    return tokenizer, cut.adds_bos


def _sentencepiece_bpe(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, models

    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    made = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    plain = {
        token
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
        if kind in (_NORMAL, _UNUSED)
    }
    pairs = []
    for token in vocabulary.tokens:
        if token in plain:
            cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
            pairs += [(first, second) for first, second in cuts if first in plain and second in plain]
    # The pair whose piece has the best score is joined first; equal scores in the order of the pieces.
    pairs.sort(
        key=lambda pair: (-made[pair[0] + pair[1]], ids[pair[0] + pair[1]], ids[pair[0]], ids[pair[1]])
    )
    unknown = _id(file, "unknown_token_id")
    if unknown is None and _UNKNOWN in vocabulary.kinds:
        unknown = vocabulary.kinds.index(_UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(
            ids,
            pairs,
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=_BYTE in vocabulary.kinds,
        )
    )
    _spaces_as_letters(file, tokenizer)
    return tokenizer


def _unigram(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, models

    pieces = list(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    unknown = _id(file, "unknown_token_id")
    if unknown is None and _UNKNOWN in vocabulary.kinds:
        unknown = vocabulary.kinds.index(_UNKNOWN)
    fallback = _BYTE in vocabulary.kinds
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=fallback))
    _spaces_as_letters(file, tokenizer)
    return tokenizer


def _spaces_as_letters(file: GgufFile, tokenizer: Tokenizer) -> None:
    """SentencePiece's steps before and after its pieces: a text's spaces are the letter ▁, one more is put first."""
    from tokenizers import Regex, decoders, normalizers

    steps: list[Any] = []
    charsmap = _get(file, "precompiled_charsmap")
    if charsmap:
        steps.append(normalizers.Precompiled(bytes(int(value) & 255 for value in charsmap)))
    if _get(file, "remove_extra_whitespaces", False):
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    prefix = _get(file, "add_space_prefix", True)
    if prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    after: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        after.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(after)


def _add_special(tokenizer: Tokenizer, vocabulary: _Vocabulary, ends: tuple[int, ...]) -> None:
    """Tokens that a text names by their own text: control and unknown tokens, ends, and those that users defined."""
    from tokenizers import AddedToken

    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind != _USER_DEFINED or id in ends)
            for id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) or (id in ends and kind != _BYTE)
        ]
    )


def _ends(file: GgufFile, vocabulary: _Vocabulary) -> tuple[int, ...]:
    """The tokens that end an answer: those that keys name, and those known by their text."""
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    named = [id for key in (*_ENDS, *_FIM) if (id := _id(file, key)) is not None]
    texts = {text for text in _END_TEXTS if text in ids}
    # Models of these two families end an answer by other tokens, and use these inside one.
    if {"<|return|>", "<|call|>"} <= texts or ("<|flush|>" in texts and texts & {"<|call|>", "<|calls|>"}):
        texts.discard("<|end|>")
    if "<|tool_response>" in texts:
        texts.discard("</s>")
    return tuple(dict.fromkeys([*named, *(ids[text] for text in _END_TEXTS if text in texts)]))


def _frame(file: GgufFile, tokenizer: Tokenizer, adds_bos: bool, adds_eos: bool) -> None:
    """Put the begin and end tokens around texts that ask for special tokens."""
    from tokenizers import processors

    around = {}
    for name, usual in (("bos", adds_bos), ("eos", adds_eos)):
        id = _id(file, f"{name}_token_id")
        if not _get(file, f"add_{name}_token", usual and id is not None):
            continue
        if id is None:
            raise SourceError(
                f"{file.path}: found {_PREFIX}add_{name}_token, but no {_PREFIX}{name}_token_id; fetch the file again"
            )
        around[name] = (tokenizer.id_to_token(id), id)
    if around:
        first = f"{around['bos'][0]} " if "bos" in around else ""
        last = f" {around['eos'][0]}" if "eos" in around else ""
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first}$A{last}",
            pair=f"{first}$A{last} {first}$B{last}",
            special_tokens=list(dict.fromkeys(around.values())),
        )


def _chat_template(file: GgufFile) -> str | None:
    """The default template. Raises SourceError for a file that has several and names none of them the default."""
    found = file.metadata.get(_TEMPLATE) or file.metadata.get(f"{_TEMPLATE}.default")
    if found:
        return str(found)
    named = {key: value for key, value in file.metadata.items() if key.startswith(f"{_TEMPLATE}.") and value}
    if len(named) > 1:
        raise SourceError(
            f"{file.path}: found {', '.join(named)}, but no {_TEMPLATE}, the default; use the model's Hugging Face "
            "folder"
        )
    return str(next(iter(named.values()))) if named else None
