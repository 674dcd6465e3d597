"""AdamW for what has no geometry, Muon for matrices between states, one schedule for both."""

from __future__ import annotations

import pytest
import torch

from earlyexit.training.config import TrainingConfig
from earlyexit.training.optimizer import END, Optimizer, factor, is_layer_matrix


@pytest.fixture
def model(make_model):
    return make_model(output_head="linear")


def test_muon_gets_the_matrices_of_the_layers_and_nothing_else(model):
    muon = {name for name, p in model.named_parameters() if is_layer_matrix(name, p)}
    assert "blocks.0.bk_layer.mixing.contribution.weight" in muon
    assert "blocks.0.bk_layer.moe.experts.0.0.weight" in muon
    for name in ("token_embedding.weight", "position_embedding.weight"):
        assert name not in muon
    assert not any("gating_network" in n or "norm" in n or n.endswith("bias") for n in muon)
    assert not any(p.shape[0] == model.vocab_size for n, p in model.named_parameters() if n in muon)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_weight_is_stepped_exactly_once(model, optimizer):
    config = TrainingConfig(optimizer=optimizer)
    parts = Optimizer(model.named_parameters(), config, total=10).parts
    stepped = [p for part in parts for group in part.param_groups for p in group["params"]]
    assert len(stepped) == len({id(p) for p in stepped}) == len(list(model.parameters()))
    assert len(parts) == (2 if optimizer == "muon" else 1)


def test_muon_makes_an_update_orthogonal(model):
    """Singular values of the gradient differ a thousandfold; those of the update by less than three."""
    config = TrainingConfig(optimizer="muon", warmup=0.0, weight_decay=0.0)
    weight = model.blocks[0].bk_layer.moe.experts[0][0].weight
    before = weight.detach().clone()
    u, _, v = torch.linalg.svd(torch.randn_like(weight), full_matrices=False)
    weight.grad = u @ torch.diag(torch.logspace(0, -3, len(v))) @ v
    Optimizer(model.named_parameters(), config, total=10).step()
    values = torch.linalg.svdvals(before - weight.detach())
    assert values.max() / values[: len(values) // 2].min() < 3


def test_the_learning_rate_rises_and_falls():
    rates = [factor(step, 100, 0.1) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert END < rates[-1] < END + 0.01
