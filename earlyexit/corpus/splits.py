"""A split is a sequence of token ids that knows its documents, and can be cut by them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from earlyexit.checked import whole
from earlyexit.corpus.tokenizers import UNK_ID

MIN_LIMITED = 8  # documents a limited split keeps, cut if need be


@dataclass(frozen=True, eq=False)
class Split:
    """A split holds the token ids of some documents, one after another.

    Attributes:
        name: "train", "fit", "certify", "valid" or "test".
        ids: (T,) int32.
        document: (T,) int32, number of the token's document, counted over the whole corpus: the
            same text has the same number in every split, whether it was cut or not.
        characters: (T,) int32, number of characters that the token stands for, without white space
            and ``<eos>``; an unknown word counts with its own length.
        data_hash: hash of the corpus that the split is from; "" if there is none.
        cut: number of tokens to which longer documents were cut; 0: documents are whole.
    """

    name: str
    ids: np.ndarray
    document: np.ndarray
    characters: np.ndarray
    data_hash: str = ""
    cut: int = 0

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    @property
    def n_documents(self) -> int:
        return len(self.spans()[0])

    @property
    def n_characters(self) -> int:
        """Count the characters of all words: the denominator of bits per word-character."""
        return int(self.characters.sum(dtype=np.int64))

    @property
    def unk_share(self) -> float:
        """Return the share of tokens that are ``<unk>``, between 0 and 1."""
        return float((self.ids == UNK_ID).mean())

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the first position and the length of each document, both (n_documents,)."""
        starts = np.flatnonzero(np.diff(self.document, prepend=-1))
        return starts, np.diff(starts, append=self.n_tokens)

    def limit(self, max_tokens: int) -> Split:
        """Keep at most about ``max_tokens`` tokens of this split; 0 keeps all of it.

        Documents are kept whole, evenly spaced over the split. Where that would leave fewer than
        ``MIN_LIMITED`` of them, that many are kept (all, if there are fewer), and the long ones are
        cut to one common length, at least one token each.

        Raises:
            TypeError, ValueError: ``max_tokens`` is no whole number ≥ 0.
        """
        whole("max_tokens", max_tokens)
        if max_tokens == 0 or max_tokens >= self.n_tokens:
            return self
        _, lengths = self.spans()
        total = len(lengths)
        fewest = min(MIN_LIMITED, total)
        n = max(fewest, max_tokens * total // self.n_tokens)
        chosen = _spread(n, total)
        while n > fewest and lengths[chosen].sum() > max_tokens:
            n -= 1
            chosen = _spread(n, total)
        length = _common_length(lengths[chosen], max_tokens)
        return self._beginnings(length if length < lengths[chosen].max() else 0, chosen)

    def truncate(self, max_length: int) -> Split:
        """Cut every document to its first ``max_length`` tokens; 0 keeps all of them.

        Raises:
            TypeError, ValueError: ``max_length`` is no whole number ≥ 0.
        """
        whole("max_length", max_length)
        return self._beginnings(max_length) if max_length else self

    def _beginnings(self, length: int, chosen: np.ndarray | slice = slice(None)) -> Split:
        """Keep the first ``length`` tokens of the chosen documents; 0 keeps all of them."""
        starts, lengths = self.spans()
        wanted = np.zeros_like(lengths)
        wanted[chosen] = length or self.n_tokens
        keep = np.arange(self.n_tokens) - np.repeat(starts, lengths) < np.repeat(wanted, lengths)
        kept = {k: getattr(self, k)[keep] for k in ("ids", "document", "characters")}
        return replace(self, **kept, cut=int(min(filter(None, (self.cut, length)), default=0)))


def _spread(n: int, total: int) -> np.ndarray:
    """Return n of the numbers 0 … total − 1, evenly spaced: (n,)."""
    return (2 * np.arange(n) + 1) * total // (2 * n)


def _common_length(lengths: np.ndarray, max_tokens: int) -> int:
    """Return the largest c ≥ 1 with Σ min(length, c) ≤ max_tokens, or 1 where there is none."""
    remaining = max_tokens
    for n, length in zip(range(len(lengths), 0, -1), np.sort(lengths).tolist(), strict=True):
        if length * n > remaining:
            return max(1, remaining // n)
        remaining -= length
    return int(lengths.max())
