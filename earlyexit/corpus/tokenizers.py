"""A tokenizer, of words or of byte pairs, is trained on lines of text and encodes documents."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, trainers
from tokenizers import pre_tokenizers as pre
from tokenizers import processors as post

from earlyexit.corpus.documents import EOS, UNK, CorpusConfig, Document

UNK_ID, EOS_ID = 0, 1  # the first two entries of every vocabulary
CHUNK = 2000  # lines per encoding batch: bounds the memory of wikitext-103

# Words of raw text: do|n't, America|'s, U.S., 3,000,000, 4.5, runs of dashes; any other character.
WORD = (
    r"[\p{L}\p{M}]+?(?=n['’]t\b)|n['’]t\b|['’](?:s|re|ve|ll|d|m)\b|(?:\p{Lu}\.){2,}"
    r"|[\p{L}\p{M}]+|\d+(?:[.,]\d+)*|-+|\S"
)


def train_words(config: CorpusConfig, lines: Iterator[str]) -> Tokenizer:
    """Train a word-level tokenizer: words by falling frequency, ties in alphabetical order."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
    tokenizer.pre_tokenizer = (
        pre.WhitespaceSplit()
        if config.is_wikitext
        else pre.Split(Regex(WORD), behavior="removed", invert=True)
    )
    trainer = trainers.WordLevelTrainer(
        vocab_size=config.vocab_size, special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    rank = tokenizer.get_vocab()
    words = [word for word in sorted(rank, key=rank.__getitem__) if word not in (UNK, EOS)]
    entries = [UNK, EOS, *words][: config.vocab_size]
    # set afterwards: the trainer would give a special token that is also a word of the text two ids
    tokenizer.model = models.WordLevel({w: i for i, w in enumerate(entries)}, unk_token=UNK)
    return tokenizer


def train_bpe(config: CorpusConfig, lines: Iterator[str]) -> Tokenizer:
    """Train byte-level BPE; WikiText's ``<unk>``, with the space before it, stays one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = post.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        show_progress=False,
        special_tokens=[AddedToken(UNK, lstrip=True), AddedToken(EOS)],
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
    )
    if config.is_wikitext:
        lines = (line.replace(f" {UNK}", "").replace(UNK, "") for line in lines)
    tokenizer.train_from_iterator(lines, trainer)
    return read_tokenizer(tokenizer.to_str(), config)


def read_tokenizer(text: str, config: CorpusConfig) -> Tokenizer:
    """Return the tokenizer that ``to_str`` wrote, with the setting that is not written."""
    tokenizer = Tokenizer.from_str(text)
    # Byte pairs outside of WikiText: "<unk>" is just text.
    tokenizer.encode_special_tokens = config.tokenizer == "bpe" and not config.is_wikitext
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[Document]) -> dict[str, np.ndarray]:
    """Return ``ids`` (T,), ``characters`` (T,) and ``lengths`` (documents,), all int32."""
    lines = iter([line for d in documents for line in d.lines])
    ids, spans, per_line = [], [], []
    while chunk := list(islice(lines, CHUNK)):
        encoded = tokenizer.encode_batch(chunk, add_special_tokens=False)
        per_line += [len(e) + 1 for e in encoded]
        n = sum(per_line[-len(chunk) :])
        ids.append(np.fromiter(chain.from_iterable((*e.ids, EOS_ID) for e in encoded), np.int32, n))
        flat = chain.from_iterable(chain.from_iterable((*e.offsets, (0, 0)) for e in encoded))
        spans.append(np.fromiter(flat, np.int32, 2 * n).reshape(n, 2))
    ids, (start, end) = np.concatenate(ids), np.concatenate(spans).T
    # Parts of one character share its span: count it once. <eos> has the span (0, 0).
    characters = np.maximum(0, end - np.maximum(start, np.concatenate([[0], end[:-1]])))
    if isinstance(tokenizer.model, models.BPE):
        characters[ids == UNK_ID] = len(UNK)  # its span holds the space before it
    ends = np.cumsum([0, *per_line])[np.cumsum([0, *(len(d.lines) for d in documents)])]
    lengths = np.diff(ends)
    return {
        "ids": ids,
        "characters": characters.astype(np.int32),
        "lengths": lengths.astype(np.int32),
    }
