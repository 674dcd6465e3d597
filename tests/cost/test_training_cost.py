"""The cost of a training on paper is what torch counts when it trains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from earlyexit.cost.training import H100, orthogonal_flops, training_cost
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.nn.config import ModelConfig
from earlyexit.training.config import TrainingConfig
from earlyexit.training.losses import training_loss
from earlyexit.training.muon import orthogonal
from earlyexit.training.optimizer import Optimizer

CONFIG = ModelConfig(2000, 64, 3, 64, dropout_p=0.0)
TRAINING = TrainingConfig(
    batch_size=4, exit_sampling="all", exit_loss_weight=1.0, optimizer="muon", epochs=2.0
)
# A product that torch does not count: it is added to a tensor in place.
IN_PLACE = {torch.ops.aten.addmm_: lambda _, a, b, **options: 2 * a[0] * a[1] * b[1]}


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_the_iterations_of_muon_take_the_products_that_torch_counts(shape):
    with FlopCounterMode(display=False) as counted:
        orthogonal(torch.randn(1, *shape))
    assert counted.get_total_flops() == orthogonal_flops(*shape)


@pytest.mark.parametrize("changes", [{}, {"exit_loss_weight": 0.0}, {"exit_sampling": "one"}])
def test_a_step_takes_the_products_that_torch_counts(changes):
    """The account also counts what is no product, four percent here."""
    training = replace(TRAINING, **changes)
    model = EarlyExitLanguageModel.from_config(CONFIG)
    x = torch.randint(2000, (4, 64))
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counted:
        training_loss(model, x, x, training, 0)[0].backward()
    step = training_cost(CONFIG, replace(training, epochs=1.0), x.numel())
    assert step.token_flops == pytest.approx(counted.get_total_flops(), rel=0.06)


def test_steps_memory_and_hours_follow():
    cost = training_cost(CONFIG, TRAINING, 1000)
    model = EarlyExitLanguageModel.from_config(CONFIG)
    assert (cost.tokens, cost.steps) == (2000, 8)  # of 256 tokens
    optimizer = Optimizer(model.named_parameters(), TRAINING, 1)
    training_loss(model, (x := torch.randint(2000, (1, 8))), x, TRAINING, 0)[0].backward()
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters())]
    for part in optimizer.parts:
        held += [t for s in part.state.values() for name, t in s.items() if name != "step"]
    assert cost.state_bytes == sum(tensor.nbytes for tensor in held)
    half = replace(H100, reached=H100.reached / 2)
    assert training_cost(CONFIG, TRAINING, 1000, half).hours == pytest.approx(2 * cost.hours)
    assert 0 < cost.optimizer_hours < cost.hours
    assert training_cost(CONFIG, replace(TRAINING, optimizer="adamw"), 1000).optimizer_flops == 0
