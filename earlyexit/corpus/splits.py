"""corpus/splits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from earlyexit.corpus.tokenizers import UNK_ID

MIN_LIMITED = 8  # documents a limited split keeps, cut if need be


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
