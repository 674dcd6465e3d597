"""The systems that a depth curve compares, and the rows about them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from earlyexit.corpus.windows import IGNORE, loader
from earlyexit.evaluation.depth import (
    ALONE,
    losses_by_document,
    ngram_rows,
    size,
    summary,
    systems,
)

PER_TOKEN = ("ids", "document", "characters")


def test_systems_are_depths_and_controls():
    found = systems((2, 1, 2), ("no mixing",), n_layers=4)
    assert found == {
        (ALONE, 1): {"n_layers": 1},
        (ALONE, 2): {"n_layers": 2},
        ("no mixing", 4): {"n_layers": 4, "mixing": "none"},
    }


def test_losses_are_those_of_every_document_at_full_depth(make_model, corpus):
    model, split = make_model(gate_hidden=None), corpus.splits["test"]
    losses = losses_by_document(model, split, corpus.eos_id, batch_size=5)
    assert losses["tokens"].sum() == split.n_tokens and set(losses["split"]) == {"test"}
    for row in losses.itertuples():
        own = replace(
            split, **{k: getattr(split, k)[split.document == row.document] for k in PER_TOKEN}
        )
        nll = [model.nll(x, y)[y != IGNORE] for x, y in loader(own, 12, 3)]
        assert row.nll == pytest.approx(torch.cat(nll).mean().item(), rel=1e-5)


def test_a_summary_weighs_documents_by_their_tokens():
    losses = pd.DataFrame(
        {
            "depth": [1, 1, 1, 2],
            "split": ["fit", "fit", "test", "fit"],
            "document": [0, 1, 2, 0],
            "tokens": [1, 3, 2, 5],
            "nll": [4.0, 0.0, 2.0, 3.0],
            "parameters": [10, 10, 10, 20],
        }
    )
    rows = summary(losses, "depth")
    assert list(rows) == ["depth", "perplexity_fit", "perplexity_test", "parameters"]
    np.testing.assert_allclose(rows["perplexity_fit"], np.exp([1.0, 3.0]))
    np.testing.assert_allclose(rows["perplexity_test"], [np.exp(2.0), np.nan])


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
