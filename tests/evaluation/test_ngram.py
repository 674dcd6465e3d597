"""The n-gram model against a slow one of dictionaries; what it gives are probabilities."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit.corpus.splits import Split
from earlyexit.evaluation.ngram import (
    FALLBACK,
    KneserNey,
    cache_probability,
    discounts,
    fit_cache_weight,
    histories,
    mixed,
)

V, EOS = 7, 1


def make(documents: list[list[int]], name: str = "train") -> Split:
    """A split of documents, each a list of ids."""
    ids = np.array([i for words in documents for i in words], dtype=np.int32)
    number = np.repeat(np.arange(len(documents)), [len(words) for words in documents])
    return Split(name, ids, number.astype(np.int32), np.ones(len(ids), np.int32))


def words_of(rng: np.random.Generator, *lengths: int) -> list[list[int]]:
    """Documents of words that are unequally frequent, so that all counts occur."""
    return [list(np.minimum(rng.geometric(0.35, n) - 1, V - 1)) for n in lengths]


class SlowKneserNey:
    """The definition, gram by gram, in dictionaries of tuples."""

    def __init__(self, documents: list[list[int]], order: int):
        padded = [[EOS] * (order - 1) + list(words) for words in documents]
        raw = Counter(
            tuple(words[i - order + 1 : i + 1])
            for words in padded
            for i in range(order - 1, len(words))
        )
        self.counts = {order: raw}
        for m in range(order - 1, 0, -1):
            self.counts[m] = Counter(gram[1:] for gram in self.counts[m + 1])
        self.followers = {m: defaultdict(dict) for m in self.counts}
        for m, counts in self.counts.items():
            for gram, count in counts.items():
                self.followers[m][gram[:-1]][gram[-1]] = count

    def probability(self, past: tuple[int, ...], word: int) -> float:
        m = len(past) + 1
        lower = self.probability(past[1:], word) if past else 1 / V
        counts = self.followers[m].get(past)
        if counts is None:
            return lower
        d = discounts(np.array(list(self.counts[m].values())))
        total, count = sum(counts.values()), counts.get(word, 0)
        saved = sum(d[min(c, 3)] for c in counts.values())
        return (count - d[min(count, 3)] + saved * lower) / total


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_definition(order, seed):
    rng = np.random.default_rng(seed)
    documents = words_of(rng, 90, 1, 40, 3)
    fast, slow = KneserNey(make(documents), V, order), SlowKneserNey(documents, order)
    past, words = rng.integers(V, size=(300, order - 1)), rng.integers(V, size=300)
    slowly = [slow.probability(tuple(h[::-1]), w) for h, w in zip(past, words, strict=True)]
    np.testing.assert_allclose(fast.probability(past, words), slowly, rtol=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 5), st.lists(st.integers(1, 60), min_size=1))
@settings(max_examples=40, deadline=None)
def test_probabilities_sum_to_one(seed, order, lengths):
    """After pasts that were seen and after others, with estimated and with fallback discounts."""
    rng = np.random.default_rng(seed)
    split = make(words_of(rng, *lengths))
    model = KneserNey(split, V, order)
    past = np.concatenate([rng.integers(V, size=(9, order - 1)), histories(split, order - 1)[:9]])
    p = [model.probability(past, np.full(len(past), word)) for word in range(V)]
    assert np.min(p) > 0
    np.testing.assert_allclose(np.sum(p, axis=0), 1, rtol=1e-12)


def test_the_past_ends_where_the_document_begins():
    split = make([[3, 4, 5], [6]])
    assert histories(split, 2, EOS).tolist() == [[EOS, EOS], [3, EOS], [4, 3], [EOS, EOS]]


def test_discounts_are_those_of_chen_and_goodman():
    counts = np.repeat([1, 2, 3, 4, 9], [40, 20, 10, 5, 3])  # Y = 40 / 80
    np.testing.assert_allclose(discounts(counts), [0, 0.5, 2 - 3 * 0.5 * 0.5, 3 - 4 * 0.5 * 0.5])
    assert discounts(np.array([1, 1, 2])) is FALLBACK


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_cache_counts_the_document_so_far(size):
    documents = words_of(np.random.default_rng(3), 20, 1, 9)
    slowly = [
        words[max(0, i - size) : i].count(words[i]) / min(i, size) if i else np.nan
        for words in documents
        for i in range(len(words))
    ]
    np.testing.assert_allclose(cache_probability(make(documents), size), slowly)


def test_the_mixture_sums_to_one():
    """Over the words that could follow a document, each appended to it in turn."""
    rng = np.random.default_rng(4)
    model, document = KneserNey(make(words_of(rng, 80)), V), words_of(rng, 12)[0]
    splits = [make([[*document, word]]) for word in range(V)]
    p = [mixed(model.score(s), cache_probability(s), 0.3)[-1] for s in splits]
    assert sum(p) == pytest.approx(1, rel=1e-12)
    first = [mixed(model.score(s), cache_probability(s), 0.3)[0] for s in splits]
    assert first == pytest.approx([model.score(splits[0])[0]] * V)  # its cache is empty


def test_the_weight_is_the_best_and_never_fitted_on_the_test_split():
    rng = np.random.default_rng(5)
    model = KneserNey(make(words_of(rng, 200)), V)
    fit = make([[2] * 30 + [3] * 30, [4] * 40], "fit")  # repeats itself, so the cache helps
    p, cache = model.score(fit), cache_probability(fit)
    grid = np.linspace(0.001, 0.999, 999)
    best = min(grid, key=lambda weight: -np.log(mixed(p, cache, weight)).mean())
    assert fit_cache_weight(model, fit) == pytest.approx(best, abs=2e-3) and best > 0.3
    with pytest.raises(ValueError, match="test"):
        fit_cache_weight(model, make([[2, 3]], "test"))


def test_nothing_to_count_is_refused():
    with pytest.raises(ValueError, match="order=0"):
        KneserNey(make([[2]]), V, 0)
    with pytest.raises(ValueError, match="0 tokens"):
        KneserNey(make([]), V)
