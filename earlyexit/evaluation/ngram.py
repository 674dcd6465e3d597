"""An interpolated Kneser–Ney n-gram, alone and mixed with a unigram cache, is what models must beat.

With discounts D(c) of a count c (Chen & Goodman 1999, "modified", eqs. 23–26), a word w after the last
m − 1 tokens h has

    P_m(w | h) = (c(h w) − D(c(h w))) / c(h) + γ(h) P_{m−1}(w | h′),        c(h) = Σ_w c(h w),

where h′ is h without its earliest token, γ(h) is the discounted share of c(h), and P_0 is uniform. At
the highest order c counts occurrences, below it the different tokens that precede h w (Kneser & Ney
1995). After an unseen h, P_m is P_{m−1}.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import minimize_scalar

from earlyexit.calibration.temperature import refuse_test
from earlyexit.corpus.splits import Split
from earlyexit.corpus.tokenizers import EOS_ID

ORDER = 5
CACHE_TOKENS = 1_000
FALLBACK = np.array([0.0, 0.5, 1.0, 1.5])  # discounts of a text too small to estimate them


@dataclass(frozen=True)
class _Level:
    """One order m of the model: K contexts of m − 1 tokens, and their G continuations.

    Attributes:
        contexts: code of the context without its earliest token · V + that token ``(K,)``, ascending;
            a context's own code is its place here. Order 1 has one context, of code 0.
        grams: code of the context · V + word ``(G,)``, ascending.
        share: (c(h w) − D) / c(h) of each gram ``(G,)``.
        back_off: γ(h) of each context ``(K,)``.
    """

    contexts: np.ndarray
    grams: np.ndarray
    share: np.ndarray
    back_off: np.ndarray


class KneserNey:
    """This is an interpolated, modified Kneser–Ney model of token ids.

    Args:
        split: the training split. A document's first tokens follow ``<eos>``.
        vocab_size: words V; ids are below it.
        order: length of the longest n-grams.

    Raises:
        ValueError: the split has no tokens, or the order is less than 1.
    """

    def __init__(self, split: Split, vocab_size: int, order: int = ORDER, eos_id: int = EOS_ID):
        if order < 1 or not split.n_tokens:
            raise ValueError(f"order={order} of {split.n_tokens} tokens: both must be at least 1")
        self.vocab_size, self.order, self.eos_id = vocab_size, order, eos_id
        past, words = histories(split, order - 1, eos_id), split.ids.astype(np.int64)
        code, contexts = np.zeros(len(words), dtype=np.int64), [np.zeros(1, dtype=np.int64)]
        found = []  # per order: the grams, where each occurs first, that of each token, and counts
        for m in range(order):
            if m:
                keys, code = np.unique(code * vocab_size + past[:, m - 1], return_inverse=True)
                contexts.append(keys)
            found.append(np.unique(code * vocab_size + words, True, True, True))
        # A gram follows as many different tokens as there are longer grams that end in it.
        counts = [
            np.bincount(gram[first], minlength=len(grams))
            for (grams, _, gram, _), (_, first, _, _) in pairwise(found)
        ]
        counts.append(found[-1][3])
        grams = (keys for keys, *_ in found)
        self.levels = [self._level(*level) for level in zip(contexts, grams, counts, strict=True)]

    def _level(self, contexts: np.ndarray, grams: np.ndarray, counts: np.ndarray) -> _Level:
        context, discount = grams // self.vocab_size, discounts(counts)[np.minimum(counts, 3)]
        total = np.bincount(context, counts)
        share = (counts - discount) / total[context]
        return _Level(contexts, grams, share, np.bincount(context, discount) / total)

    @property
    def n_parameters(self) -> int:
        """Return how many numbers the model keeps: one per n-gram and one per context."""
        return sum(len(level.grams) + len(level.contexts) for level in self.levels)

    def probability(self, past: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Return the probability of each word after its past.

        Args:
            past: the ``order`` − 1 tokens before each word ``(T, order − 1)``, the latest first.
            words: ``(T,)``.
        """
        p = np.full(len(words), 1 / self.vocab_size)
        code, words = np.zeros(len(words), dtype=np.int64), words.astype(np.int64)
        for m, level in enumerate(self.levels):
            if m:
                code = _find(level.contexts, code, past[:, m - 1], self.vocab_size)
            gram = _find(level.grams, code, words, self.vocab_size)
            share = np.where(gram >= 0, level.share[gram], 0.0)
            p = np.where(code >= 0, share + level.back_off[code] * p, p)
        return p

    def score(self, split: Split) -> np.ndarray:
        """Return the probability of every token of a split, after its document so far ``(T,)``."""
        return self.probability(histories(split, self.order - 1, self.eos_id), split.ids)


def _find(keys: np.ndarray, code: np.ndarray, token: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the places of code · V + token among ascending ``keys``, −1 where there is none."""
    wanted = np.where(code >= 0, code * vocab_size + token, -1)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, place, -1)


def discounts(counts: np.ndarray) -> np.ndarray:
    """Return the discounts ``(4,)`` of counts 0, 1, 2 and at least 3, from n-grams' counts ``(G,)``.

    D_k = k − (k + 1) Y n_{k+1} / n_k with Y = n_1 / (n_1 + 2 n_2) and n_k the number of counts k;
    ``FALLBACK`` where one of n_1 … n_4 is 0 or a discount lies outside 0 … k.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(float)
    if not n.all():
        return FALLBACK
    k, y = np.arange(1, 4), n[0] / (n[0] + 2 * n[1])
    found = k - (k + 1) * y * n[1:] / n[:3]
    return np.append(0.0, found) if ((found >= 0) & (found <= k)).all() else FALLBACK


def histories(split: Split, length: int, eos_id: int = EOS_ID) -> np.ndarray:
    """Return the tokens before each token, the latest first, ``(T, length)``.

    Before a document's first token stands ``<eos>``, however often.
    """
    start, lengths = split.spans()
    offset = np.arange(split.n_tokens) - np.repeat(start, lengths)
    out = np.full((split.n_tokens, length), eos_id, dtype=np.int32)
    for k in range(length):
        inside = np.flatnonzero(offset > k)
        out[inside, k] = split.ids[inside - k - 1]
    return out


def cache_probability(split: Split, size: int = CACHE_TOKENS) -> np.ndarray:
    """Return each token's share of the last ``size`` tokens of its document ``(T,)``.

    It is NaN at a document's first token, where there are none.
    """
    start, lengths = split.spans()
    position = np.arange(split.n_tokens)
    before = np.minimum(position - np.repeat(start, lengths), size)
    # Sorting by (word, position) puts the occurrences of a word beside each other.
    key = split.ids.astype(np.int64) * (split.n_tokens + 1) + position
    ranked = np.sort(key)
    count = np.searchsorted(ranked, key) - np.searchsorted(ranked, key - before)
    return np.divide(count, before, out=np.full(len(count), np.nan), where=before > 0)


def mixed(model: np.ndarray, cache: np.ndarray, weight: float) -> np.ndarray:
    """Return (1 − w) · model + w · cache, and the model's probability where the cache is empty."""
    return np.where(np.isnan(cache), model, (1 - weight) * model + weight * cache)


def perplexity(p: np.ndarray) -> float:
    """Return the perplexity of tokens that have these probabilities ``(T,)``."""
    return float(np.exp(-np.log(p).mean()))


def fit_cache_weight(model: KneserNey, split: Split, size: int = CACHE_TOKENS) -> float:
    """Return the weight of the cache that minimises the NLL of a split.

    Raises:
        ValueError: the split is the test split, which decides nothing.
    """
    refuse_test(split.name)
    p, cache = model.score(split), cache_probability(split, size)
    found = minimize_scalar(
        lambda weight: perplexity(mixed(p, cache, weight)), bounds=(0, 1), method="bounded"
    )
    return float(found.x)
