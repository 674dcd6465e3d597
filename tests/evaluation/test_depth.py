"""The systems that a depth curve compares, and the rows about them."""

from __future__ import annotations

import numpy as np
import pytest

from earlyexit.corpus.windows import loader
from earlyexit.evaluation.depth import ALONE, ngram_rows, size, system_row, systems


def test_systems_are_depths_and_controls():
    found = systems((2, 1, 2), ("no mixing",), n_layers=4)
    assert found == {
        (ALONE, 1): {"n_layers": 1},
        (ALONE, 2): {"n_layers": 2},
        ("no mixing", 4): {"n_layers": 4, "mixing": "none"},
    }


def test_a_row_says_what_the_model_at_full_depth_does(make_model, corpus):
    model = make_model(gate_hidden=None)
    batches = {name: loader(corpus.splits[name], 12, 5) for name in ("fit", "test")}
    row = system_row(model, batches, seconds=3.0).iloc[0]
    for name, data in batches.items():
        nll = [model.nll(x, y)[y >= 0] for x, y in data]
        mean = np.concatenate([part.numpy() for part in nll]).mean(dtype=float)
        assert row[f"perplexity_{name}"] == pytest.approx(np.exp(mean), rel=1e-5)
    assert row["seconds"] == 3.0 and row["flops_per_token"] > 0


def test_unused_exits_are_not_counted(make_model):
    """A model with exits is as large as one without their translators and norms."""
    model = make_model(gate_hidden=None)
    translators = 2 * (16 * 16 + 16 + 2 * 16)  # of the first two of three exits
    total = sum(p.numel() for p in model.parameters())
    assert size(model)["parameters"] == total - translators


def test_n_grams_stand_beside_the_models(corpus):
    parts = (corpus.splits[name] for name in ("train", "fit", "test"))
    rows = ngram_rows(*parts, corpus.vocab_size, corpus.eos_id)
    assert rows["system"].tolist() == ["5-gram", "5-gram with cache"]
    assert (rows[["perplexity_fit", "perplexity_test"]] < corpus.vocab_size).all(axis=None)
    plain, cached = rows["perplexity_fit"]
    assert cached <= plain * 1.0001  # its weight is the best there, but never quite 0
    assert (rows["layers"] == 0).all() and (rows["parameters"] > 1000).all()
