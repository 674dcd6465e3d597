"""Recipes are compared on the fit part with models trained alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from earlyexit.corpus.windows import loader
from earlyexit.cost.memory import MIB
from earlyexit.evaluation.compare import fitted_policy
from earlyexit.evaluation.depth import ALONE, losses_by_document
from earlyexit.evaluation.evaluator import EarlyExitEvaluator
from earlyexit.evaluation.recipes import against_alone, alone_rows, training_memory
from earlyexit.evaluation.rivals import perplexities, trained_alone
from earlyexit.training.config import TrainingConfig

EPSILON = 0.3


def test_every_exit_against_a_model_of_its_depth(subject, make_model, corpus):
    split = corpus.splits["fit"]
    losses = [
        losses_by_document(model, split, corpus.eos_id).assign(system=ALONE, layers=depth, seed=0)
        for depth in (1, 2, 3)
        for model in [make_model(seed=1, n_layers=depth, gate_hidden=None)]
    ]
    alone, batches = trained_alone(pd.concat(losses), 0, "fit"), list(loader(split, 12, 8))
    table = against_alone(subject.model, subject.fit, alone, batches, EPSILON)
    assert table["exit"].tolist() == [0, 1, 2]
    np.testing.assert_allclose(table["perplexity"], subject.fit.static()["perplexity"])
    row, twin = table.iloc[0], perplexities(alone)[3]
    policy = fitted_policy(subject.model, subject.fit, "gate", EPSILON)
    traced = subject.fit.evaluate(policy)
    real = EarlyExitEvaluator(subject.model, "cpu").evaluate_policy(batches, policy)
    assert row["gate_speedup_layers"] == pytest.approx(traced["speedup_layers"])
    assert row["gate_loss_twin"] == pytest.approx(traced["perplexity"] / twin - 1)
    assert row["left_behind"] == pytest.approx(real["perplexity"] / traced["perplexity"] - 1)
    assert row["real_loss_twin"] == pytest.approx(real["perplexity"] / twin - 1)
    assert alone_rows(alone).to_dict("list") == {
        "exit": [0, 1, 2], "perplexity": list(perplexities(alone).values())
    }  # fmt: skip


def test_memory_of_a_step_grows_with_its_batch_and_leaves_the_model_as_it_is(make_model, corpus):
    model, config = make_model(), TrainingConfig(batch_size=2, exit_sampling="all")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    few, many = (
        training_memory(model, corpus, replace(config, batch_size=size)) for size in (2, 16)
    )
    weights = 4 * sum(p.numel() for p in model.parameters()) / MIB
    assert many > few > 2 * weights  # gradients and the optimiser's state
    frozen = replace(config, freeze_backbone=True)
    assert training_memory(model, corpus, frozen) < few
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
