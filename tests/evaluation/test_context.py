"""A model that reads k tokens back loses nothing where only earlier ones change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from earlyexit.calibration.collect import collect_trace
from earlyexit.corpus.windows import IGNORE
from earlyexit.evaluation.context import (
    memory_curve,
    nll_by_position,
    partners,
    standard_error,
    whole_windows,
)

N = 12  # window of the small models


class Sum(nn.Module):
    """Mixes by hand: a token receives the states of the k tokens before it, and no others."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def contribution(self, u):
        return u

    def mix(self, u, given, rows):
        padded = nn.functional.pad(given, (0, 0, self.k, 0))
        weights = torch.arange(1, self.k + 1, dtype=given.dtype)
        past = padded.unfold(1, self.k, 1)[:, : given.shape[1]] if self.k else given[..., None] * 0
        return (past * weights if self.k else past).sum(-1).flatten(0, 1)

    def read(self, u, mixed):
        return mixed


@pytest.fixture
def reading(make_model):
    """``reading(k)``: a model of one layer that reads k tokens back."""

    def make(k: int):
        model = make_model(n_layers=1, mixing="none").double()
        model.blocks[0].bk_layer.mixing = Sum(k)
        return model

    return make


@pytest.mark.parametrize("k", [0, 1, 3])
def test_the_rise_ends_where_a_model_stops_reading(reading, corpus, k):
    curve = memory_curve(reading(k), corpus.splits["test"], corpus.eos_id, (0, 1, 2, 3, 4))
    beyond = curve["context"] >= k
    assert (curve.loc[beyond, "rise_nats"].abs() < 1e-14).all() and beyond.any()
    assert (curve.loc[~beyond, "rise_nats"].abs() > 1e-3).all()
    assert (curve.loc[~beyond, "standard_error"] > 0).all()


def test_without_mixing_nothing_is_read(make_model, corpus):
    model = make_model(mixing="none")
    curve = memory_curve(model, corpus.splits["test"], corpus.eos_id)
    assert curve["context"].unique().tolist() == [0, 1, 2, 4]  # 8 + 4 = the window
    assert curve["exit_layer"].unique().tolist() == [0, 1, 2]
    assert (curve["rise_nats"].abs() < 1e-6).all()


def test_it_is_one_run_per_context_and_position(make_model, corpus):
    """Against the definition: a run each, with everything before the c kept tokens replaced."""
    model, split = make_model().double(), corpus.splits["test"]
    x, y, document = whole_windows(split, N, corpus.eos_id)
    other = x[partners(document, seed=3)]
    nll = model.nll(x, y)
    for c in (0, 2, 4):
        rises = []
        for i in range(N - 8, N):
            replaced = x.clone()
            replaced[:, : i - c] = other[:, : i - c]
            rises.append((model.nll(replaced, y) - nll)[:, i])
        curve = memory_curve(model, split, corpus.eos_id, (c,), seed=3, batch_size=3)
        last = curve[curve["exit_layer"] == 2]
        assert last["rise_nats"].item() == pytest.approx(torch.stack(rises).mean().item())
        assert last["n"].item() == 8 * len(x)


def test_windows_are_whole_and_spread(corpus):
    split = corpus.splits["test"]  # 7 documents of 29 tokens: two whole windows each
    x, y, document = whole_windows(split, N, corpus.eos_id)
    assert x.shape == y.shape == (14, N) and (y != IGNORE).all()
    some, _, few = whole_windows(split, N, corpus.eos_id, max_tokens=4 * N)
    assert len(some) == 4 and few[0] == document[0] and few[-1] == document[-1]


@pytest.mark.parametrize("counts", [(3, 3, 3), (1, 2, 4, 4), (9, 1), (2,)])
@pytest.mark.parametrize("seed", range(4))
def test_partners_are_of_other_documents_where_there_are_enough(counts, seed):
    document = np.repeat(np.arange(len(counts)), counts)
    other = partners(document, seed)
    assert sorted(other) == list(range(len(document)))
    assert (other != np.arange(len(document))).all()
    if 2 * max(counts) <= len(document):
        assert (document[other] != document).all()


def test_a_split_without_windows_is_refused(make_model, corpus):
    with pytest.raises(ValueError, match="0 whole windows of 12 tokens"):
        memory_curve(make_model(), corpus.splits["test"].truncate(5), corpus.eos_id)


def test_nll_by_position_is_the_mean_over_whole_windows(make_model, corpus):
    trace = collect_trace(make_model(), corpus.splits["test"], corpus.eos_id)
    table = nll_by_position(trace)
    assert table.loc[table["exit_layer"] == 0, "position"].tolist() == [0, 1, 2, 4, 8]
    whole = np.tile(np.arange(29) < 24, 7)  # of documents of 29 tokens
    inside = whole & (trace.position >= 2) & (trace.position < 4)
    row = table[(table["exit_layer"] == 1) & (table["position"] == 2)]
    assert row["nll"].item() == pytest.approx(trace.nll[inside, 1].mean(dtype=float))
    assert row["n"].item() == inside.sum()
    with pytest.raises(ValueError, match="no whole window"):
        nll_by_position(collect_trace(make_model(), corpus.splits["test"].truncate(9), 1))


def test_rows_of_one_cluster_count_as_one():
    values = np.random.default_rng(0).normal(size=(30, 2))
    alone = standard_error(values, np.arange(30))
    np.testing.assert_allclose(alone, values.std(axis=0, ddof=1) / 30**0.5)
    twice = standard_error(np.tile(values, (2, 1)), np.tile(np.arange(30), 2))
    np.testing.assert_allclose(twice, alone)


def test_clusters_are_documents_if_there_are_enough(make_model, corpus):
    model, (few, many) = make_model(), (corpus.splits[name] for name in ("test", "train"))
    for split, of_documents in ((few, False), (many, True)):
        x, y, document = whole_windows(split, N, corpus.eos_id)
        other = x[partners(document, seed=0)]
        other[:, -1] = x[:, -1]
        rise = (model.nll(other, y) - model.nll(x, y))[:, -1:].double().numpy()
        cluster = document if of_documents else np.arange(len(x))
        found = memory_curve(model, split, corpus.eos_id, (0,), scored=1)
        assert found["standard_error"].iloc[-1] == pytest.approx(
            standard_error(rise, cluster).item(), rel=1e-3
        )
