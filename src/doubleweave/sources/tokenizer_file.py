"""Meta's Llama tokenizers, SentencePiece models and tiktoken lists, as tokenizers of the library `tokenizers`."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from doubleweave.errors import SourceError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Behind the ranks of a tiktoken list, in order; what is left up to 256 is reserved (Meta's llama-models, tokenizer.py).
_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
_NUM_SPECIAL = 256
_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
_CONTROL, _USER_DEFINED = 3, 4  # types of SentencePiece's pieces
_UNIGRAM, _BPE = 1, 2  # and of its models


class LlamaTokenizer(NamedTuple):
    """`eos_token_ids`: the tokens that end an answer; `bos` is put before every prompt."""

    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    bos: str
    eos: str


def read_tokenizer(path: Path) -> LlamaTokenizer:
    """Read a SentencePiece model or a tiktoken list; raises SourceError for anything else."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from None
    ranks = _ranks(data)
    found = _from_sentencepiece(data) if ranks is None else _from_tiktoken(ranks)
    if found is None:
        raise SourceError(
            f"{path}: is no tokenizer that can be read, expected a SentencePiece model (BPE or unigram) or a tiktoken "
            "list (a token in base64 and its rank a line)"
        )
    return found


def _ranks(data: bytes) -> dict[bytes, int] | None:
    """Tokens and ranks of a tiktoken list, None for data in another format."""
    ranks = {}
    try:
        for line in data.splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        return None
    # Other files may parse as well; a tiktoken list has every rank once, the 256 single bytes among them.
    return ranks if sorted(ranks.values()) == list(range(len(ranks))) and len(ranks) >= 256 else None


def _from_tiktoken(ranks: dict[bytes, int]) -> LlamaTokenizer:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    untyped: Any = TikTokenConverter

    class Converter(untyped):  # type: ignore[misc]
        """Reads the list that is in memory, so that the package tiktoken is not needed."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    reserved = range(2, 2 + _NUM_SPECIAL - len(_SPECIAL))
    special = [*_SPECIAL, *(f"<|reserved_special_token_{number}|>" for number in reserved)]
    tokenizer: Tokenizer = Converter("", extra_special_tokens=special).converted()
    begin, end = _SPECIAL[:2]
    _begin_with(tokenizer, begin)
    return LlamaTokenizer(tokenizer, tuple(len(ranks) + _SPECIAL.index(name) for name in _ENDS), begin, end)


def _from_sentencepiece(data: bytes) -> LlamaTokenizer | None:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as protocol
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    messages: Any = protocol
    model = messages.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return None
    trainer, rules, pieces = model.trainer_spec, model.normalizer_spec, list(model.pieces)
    special = {piece.piece for piece in pieces if piece.type == _CONTROL}
    if not pieces or trainer.model_type not in (_UNIGRAM, _BPE):
        return None
    if trainer.model_type == _UNIGRAM:
        vocabulary = [(piece.piece, piece.score) for piece in pieces]
        kind: Any = models.Unigram(vocabulary, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    else:
        ids = {piece.piece: number for number, piece in enumerate(pieces)}
        scores = {piece.piece: piece.score for piece in pieces}
        merges = generate_merges(ids, scores, skip_tokens=special)
        options = {"unk_token": trainer.unk_piece, "fuse_unk": True, "byte_fallback": trainer.byte_fallback}
        kind = models.BPE(ids, merges, **options)
    tokenizer = Tokenizer(kind)
    tokenizer.normalizer = normalizers.Sequence(_normalizers(rules))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    added = [piece for piece in pieces if piece.type in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens(
        [AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL) for piece in added]
    )
    if trainer.bos_piece in special:
        _begin_with(tokenizer, trainer.bos_piece)
    ends = (trainer.eos_id,) if trainer.eos_piece in special else ()
    return LlamaTokenizer(tokenizer, ends, trainer.bos_piece, trainer.eos_piece)


def _normalizers(rules: Any) -> list[Any]:
    """SentencePiece's normalization of a text: its map of characters, white space, the first space, spaces as ▁."""
    from tokenizers import Regex, normalizers

    found: list[Any] = []
    if rules.precompiled_charsmap:
        found.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        found += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        found.append(normalizers.Prepend("▁"))
    return [*found, normalizers.Replace(" ", "▁")]


def _begin_with(tokenizer: Tokenizer, token: str) -> None:
    from tokenizers import processors

    number = tokenizer.token_to_id(token)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, number)]
    )
