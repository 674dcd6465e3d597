"""What exited tokens hand on: three ways, each the same in compaction, masks and stepping."""

from __future__ import annotations

import copy

import pytest
import torch

from earlyexit import EarlyExitLanguageModel, ExitPolicy
from earlyexit.models.act import ACTEarlyExitModel
from earlyexit.models.multi_scale import MultiScaleLanguageModel
from earlyexit.training.config import TrainingConfig
from earlyexit.training.losses import training_loss

WAYS = ("recomputed", "kept", "potentials")


def model_of(way: str) -> EarlyExitLanguageModel:
    torch.manual_seed(0)
    options = {"bk_heads": 2, "bk_values": 4, "left_behind": way}
    model = EarlyExitLanguageModel(40, 16, 4, 12, **options).eval().double()
    for block in model.blocks:  # layers that differ, and norms that matter
        torch.nn.init.normal_(block.layer_norm.weight, 1.0, 0.3)
        torch.nn.init.normal_(block.layer_norm.bias, 0.0, 0.3)
    return model


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randint(40, (5, 12), generator=torch.manual_seed(1))


def halfway(model, x) -> ExitPolicy:
    """A policy by which about half of the tokens leave at each exit."""
    states = model.hidden_states(x)
    cuts = [model.head(k)(states[k + 1]).softmax(-1).amax(-1).median().item() for k in range(3)]
    cuts = [cut + 1e-6 for cut in cuts]  # between two scores
    return ExitPolicy("max_probability", (*cuts, 1.0))


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_compaction_masks_and_stepping_agree(way, x):
    model = model_of(way)
    policy = halfway(model, x)
    runs = [
        model(x, use_early_exit=True, policy=policy, execution=execution)
        for execution in ("compacted", "dense")
    ]
    assert len(runs[0][1]["exit_layers"].unique()) >= 3
    assert torch.equal(*(info["exit_layers"] for _, info in runs))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-9, atol=1e-10)
    ids, exits = model.generate(x[:, :1], 11, policy)
    again, info = model(ids[:, :-1], use_early_exit=True, policy=policy)
    assert torch.equal(info["exit_layers"], exits)
    assert torch.equal(again.argmax(-1), ids[:, 1:])


@torch.no_grad()
def test_the_ways_differ_where_tokens_have_left_and_only_there(x):
    policy = halfway(model_of("recomputed"), x)
    outputs = {}
    for way in WAYS:
        model = model_of(way)
        torch.testing.assert_close(model(x), model_of("recomputed")(x))
        outputs[way], _ = model(x, use_early_exit=True, policy=policy)
    for way in WAYS[1:]:
        assert (outputs[way] - outputs["recomputed"]).abs().max() > 1e-3


@torch.no_grad()
def test_each_way_hands_on_what_it_says(x):
    h, heads = torch.randn(7, 16, dtype=torch.float64), 2
    for way in WAYS:
        model = model_of(way)
        then = torch.randn(7, heads + heads * 4, dtype=torch.float64)
        found = model.propagation()(h, then, 2)
        for row, layer in enumerate((2, 3)):
            now = model.contribution(layer, model.normed(layer, h))
            truth = {
                "recomputed": now,
                "kept": then,
                "potentials": torch.cat([now[:, :heads], torch.zeros_like(now[:, heads:])], 1),
            }
            torch.testing.assert_close(found[:, row], truth[way])


@torch.no_grad()
def test_what_is_handed_on_follows_weights_that_change(x):
    model, h = model_of("recomputed"), torch.randn(7, 16, dtype=torch.float64)

    def check(model, h):
        now = model.contribution(2, model.normed(2, h))
        torch.testing.assert_close(model.propagation()(h, now, 2)[:, 0], now)

    check(model, h)
    block = model.blocks[2]
    for tensor in (*block.layer_norm.parameters(), *block.bk_layer.contribution.parameters()):
        tensor.add_(0.1)  # as an optimiser's step
        check(model, h)
    model.load_state_dict(model_of("recomputed").state_dict())
    check(model, h)
    check(copy.deepcopy(model), h)
    check(model.float(), h.float())


@pytest.mark.parametrize("way", WAYS)
def test_training_with_exits_sampled_by_token_learns_what_to_hand_on(way, x):
    model = model_of(way).float()
    config = TrainingConfig(exit_sampling="tokens", exit_loss_weight=1.0)
    y = torch.randint(40, x.shape, generator=torch.manual_seed(2))
    loss, _ = training_loss(model, x, y, config, step=0)
    loss.backward()
    for block in model.blocks:
        assert block.bk_layer.contribution.weight.grad.norm() > 0


@pytest.mark.parametrize("kind", [ACTEarlyExitModel, MultiScaleLanguageModel])
@pytest.mark.parametrize("way", WAYS[1:])
def test_kinds_that_follow_rules_of_their_own_refuse_other_ways(kind, way):
    with pytest.raises(ValueError, match="left_behind"):
        kind(40, 16, 3, 12, left_behind=way)


def test_attention_has_no_potentials_to_leave_alone():
    with pytest.raises(ValueError, match="no potentials"):
        EarlyExitLanguageModel(40, 16, 2, 12, mixing="attention", left_behind="potentials")
