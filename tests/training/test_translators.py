"""Translators of a frozen decoder: closed form against least squares, refinement, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from earlyexit import attach
from earlyexit.corpus.windows import loader
from earlyexit.exits.execution import scored_states
from earlyexit.training.config import TrainingConfig
from earlyexit.training.train import perplexity_per_exit, train
from earlyexit.training.translators import fit_translators


def small(vocabulary: int, **arguments):
    """A decoder with random weights that continues the tests' documents after some training."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=24, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=2, max_position_embeddings=12,
    )  # fmt: skip
    return attach(LlamaForCausalLM(config), **arguments)


@pytest.fixture(scope="module")
def trained(corpus):
    model = small(corpus.vocab_size, exits=4)
    config = TrainingConfig(epochs=12, batch_size=8, learning_rate=1e-2, exit_loss_weight=0.0)
    train(model, corpus, config, "cpu")
    return model


def test_a_decoder_is_trained_like_any_model(trained, corpus):
    perplexities = perplexity_per_exit(trained, corpus.splits["fit"], corpus.eos_id)
    assert perplexities[-1] < 0.5 * corpus.vocab_size < perplexities[0] * 10


def test_regression_is_weighted_least_squares(trained, corpus):
    split = corpus.splits["train"]
    fit_translators(trained, split, corpus.eos_id, 10_000, steps=0, ridge=1e-9)
    states = []
    for x, y in loader(split, trained.n_seq, 64, corpus.eos_id):
        states.append(torch.stack(scored_states(trained, x, y)[0]).detach())
    h = torch.cat(states, dim=1).double().numpy()
    root = np.sqrt(1 / np.square(h[-1]).mean(axis=-1, keepdims=True))
    given = np.concatenate([h[1], np.ones_like(root)], axis=1)
    for found, then in ((trained.head(0).translator, h[-1]), (trained.shortcuts[0], h[2])):
        wanted, *_ = np.linalg.lstsq(given * root, (then - h[1]) * root, rcond=None)
        np.testing.assert_allclose(found.weight.detach(), wanted[:-1].T, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found.bias.detach(), wanted[-1], rtol=1e-3, atol=1e-3)
    assert len(trained.shortcuts) == trained.n_layers - 2


def test_refined_is_better_than_regression_and_that_than_nothing(trained, corpus):
    split, eos = corpus.splits["train"], corpus.eos_id
    before = {k: v.clone() for k, v in trained.decoder.state_dict().items()}
    rows = fit_translators(trained, split, eos, 10_000, steps=150, words=20, learning_rate=3e-3)
    for row in rows:
        assert row["kl_ridge"] < row["kl_lens"] and row["tokens"] == split.n_tokens
        assert row["refined"] == (row["kl_refined"] < row["kl_ridge"])
    assert any(row["refined"] for row in rows)
    after = trained.decoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in trained.decoder.parameters())


def test_what_cannot_be_fitted_is_refused(trained, corpus, make_model):
    with pytest.raises(ValueError, match="on the training split, not on 'test'"):
        fit_translators(trained, corpus.splits["test"], corpus.eos_id)
    with pytest.raises(ValueError, match="exits need translators before one linear output layer"):
        fit_translators(make_model(exit_head="full"), corpus.splits["train"], corpus.eos_id)
