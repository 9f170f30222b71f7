"""Small tokenizers of the kinds that models have, each as the text of a tokenizer.json."""

from __future__ import annotations

import random
import string

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|stop|>")
_LETTERS = string.ascii_letters + string.digits + string.punctuation + "\n\té世界"


def _bytes(add_prefix_space: bool) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "t"), ("l", "l"), ("i", "s"), ("Ċ", "Ċ"), ("a", "s"), ("o", "o")]
    vocabulary = {t: n for n, t in enumerate([*alphabet, *(a + b for a, b in merges)])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    made.decoder = decoders.ByteLevel()
    return made


def _pieces(byte_fallback: bool) -> models.BPE:
    """As SentencePiece: spaces are U+2581, and what is unknown is written byte by byte."""
    fallback = [f"<0x{n:02X}>" for n in range(256)] if byte_fallback else []
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("l", "l"), ("i", "s"), ("▁", "is")]
    tokens = ["<unk>", *fallback, "▁", *_LETTERS, *(a + b for a, b in merges)]
    vocabulary = {t: n for n, t in enumerate(dict.fromkeys(tokens))}
    return models.BPE(
        vocab=vocabulary,
        merges=merges,
        unk_token="<unk>",
        byte_fallback=byte_fallback,
        fuse_unk=True,
    )


def _prepended() -> Tokenizer:
    made = Tokenizer(_pieces(True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made


def _metaspace(scheme: str) -> Tokenizer:
    made = Tokenizer(_pieces(True))
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
    made.decoder = decoders.Sequence(
        [decoders.Metaspace("▁", scheme), decoders.ByteFallback(), decoders.Fuse()]
    )
    return made


def _unigram() -> Tokenizer:
    pieces = ["<unk>", "▁", *_LETTERS, "▁the", "▁is", "he", "ll", "ing"]
    vocabulary = [(t, -float(len(pieces) - n) / 10) for n, t in enumerate(dict.fromkeys(pieces))]
    made = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    made.decoder = decoders.Metaspace("▁", "always")
    return made


def _with_special(made: Tokenizer, **flags: bool) -> str:
    made.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, **flags) for t in SPECIAL]
    )
    return str(made.to_str())


def small_tokenizers() -> dict[str, str]:
    """Return name -> tokenizer.json."""
    padded = _bytes(False)
    padded.enable_padding(length=64)
    padded.enable_truncation(max_length=16)
    return {
        "byte-level": _with_special(_bytes(False)),
        "byte-level, a space before": _with_special(_bytes(True)),
        "prepended": _with_special(_prepended()),
        "metaspace first": _with_special(_metaspace("first")),
        "metaspace always": _with_special(_metaspace("always")),
        "metaspace never": _with_special(_metaspace("never")),
        "unigram, NFKC": _with_special(_unigram()),
        "added tokens take spaces": _with_special(_bytes(False), lstrip=True, rstrip=True),
        "padding and truncation": _with_special(padded),
    }


def nasty_texts(count: int = 200) -> list[str]:
    """Return texts of what tokenizers trip over, always the same."""
    rng = random.Random(5)
    parts = [
        *("the", "is", "he", " ", "  ", "\n", "\n\n", "\t", "é", "e\u0301", "世", "🙂", "\u200b"),
        *("<s>", "<|im_end|>", " <|im_end|> ", "<|im_end", "▁", "ﬁ", "Ⅷ", "\u00a0", "\ufeff"),
        *("0", "3.14", '"', "\\n", "{{ x }}", "</think>", "İ", "ß", "\r\n", "a" * 50),
    ]
    return ["".join(rng.choices(parts, k=rng.randint(1, 9))) for _ in range(count)]
