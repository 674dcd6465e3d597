"""Constructed exits have the shares they were asked for; deciding is running without a head."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from earlyexit.cost.synthetic import (
    geometric_shares,
    policy_for_shares,
    random_model,
    random_tokens,
)
from earlyexit.exits.execution import decide
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.statistics import exit_shares
from earlyexit.nn.config import ModelConfig

CONFIG = ModelConfig(53, d_model=16, n_layers=4, n_seq=32, bk_heads=4)


@pytest.mark.parametrize("mean", [1, 1.01, 2, 2.5, 3.99, 4])
def test_geometric_shares_have_the_mean_depth(mean):
    shares = geometric_shares(4, mean)
    assert shares.sum() == pytest.approx(1) and (shares >= 0).all() and shares[-1] == 0
    assert shares[:4] @ [1, 2, 3, 4] == pytest.approx(mean)
    steps = np.diff(shares[:4])
    assert (steps <= 1e-12).all() or (steps >= -1e-12).all() or mean in (1, 4)


@pytest.mark.parametrize("mean", [0.9, 4.1, float("nan")])
def test_impossible_mean_depths_are_refused(mean):
    with pytest.raises(ValueError, match="mean depth"):
        geometric_shares(4, mean)


@pytest.mark.parametrize("criterion", ["gate", "agreement", "saturation", "max_probability"])
@pytest.mark.parametrize(
    "shares",
    [[0.5, 0.25, 0.125, 0.125, 0], [0, 0.4, 0, 0.6, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]],
)
def test_the_prescribed_share_leaves_at_every_layer(criterion, shares):
    model, x = random_model(CONFIG), random_tokens(CONFIG, 16, 32)
    policy = policy_for_shares(model, x, shares, criterion)
    found = exit_shares(model, x, x, policy)
    expected = np.append(shares[:3], shares[3] + shares[4])
    found = np.append(found[:3], found[3:].sum())
    assert np.abs(found - expected).max() <= 2 / x.numel()


@pytest.mark.parametrize("shares", [[1, 0, 0, 0], [0.5, 0, 0, 0, 0], [2, -1, 0, 0, 0]])
def test_impossible_shares_are_refused(shares):
    model, x = random_model(CONFIG), random_tokens(CONFIG, 1, 4)
    with pytest.raises(ValueError, match="shares"):
        policy_for_shares(model, x, shares)


@pytest.mark.parametrize("execution", ["compacted", "dense"])
def test_deciding_is_running_without_a_prediction(execution):
    model, x = random_model(CONFIG), random_tokens(CONFIG, 4, 32)
    policy = policy_for_shares(model, x, geometric_shares(4, 2))
    run = decide(model, x, policy, execution)
    assert run.outputs is None
    assert torch.equal(run.exit_layers.view_as(x), model.predict(x, policy, execution)[1])
    with pytest.raises(ValueError, match="reads logits"):
        decide(model, x, ExitPolicy.constant(0.5, 4))
    with pytest.raises(ValueError, match="execution"):
        decide(model, x, policy, "sparse")
