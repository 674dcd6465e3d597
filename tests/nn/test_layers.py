"""Experts against a loop over tokens; the router learns and is kept balanced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from earlyexit.nn.block import EarlyExitResNetBKBlock, MoEResNetBKLayer
from earlyexit.nn.heads import ExitHead
from earlyexit.nn.moe import SparseMoELayer
from earlyexit.nn.record import recorded


def naive(moe: SparseMoELayer, x: torch.Tensor) -> torch.Tensor:
    """One token at a time, one expert at a time."""
    out = torch.zeros_like(x)
    for i, token in enumerate(x):
        gate = moe.gating_network(token).softmax(-1)
        for expert in gate.argsort(descending=True)[: moe.top_k]:
            out[i] += gate[expert] * moe.experts[expert](token)
    return out


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_output_is_the_gated_sum_of_the_best_experts(top_k):
    torch.manual_seed(top_k)
    moe, x = SparseMoELayer(6, 4, top_k, dropout_p=0.5).eval(), torch.randn(23, 6)
    torch.testing.assert_close(moe(x), naive(moe, x))
    torch.testing.assert_close(moe(x.view(1, 23, 6)), naive(moe, x).view(1, 23, 6))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gradients_are_those_of_the_loop(top_k):
    torch.manual_seed(0)
    moe, x = SparseMoELayer(6, 4, top_k, dropout_p=0.0).double(), torch.randn(23, 6).double()
    weight = torch.randn(23, 6).double()
    found = torch.autograd.grad((weight * moe(x)).sum(), tuple(moe.parameters()))
    truth = torch.autograd.grad((weight * naive(moe, x)).sum(), tuple(moe.parameters()))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b)
    assert found[0].abs().sum() > 0  # the gate's, which the original's argmax left at zero


@pytest.mark.parametrize("top_k", [1, 3])
def test_load_balancing_loss(top_k):
    torch.manual_seed(0)
    moe, x = SparseMoELayer(6, 4, top_k), torch.randn(50, 6)
    with recorded(torch.ones(5, 10, dtype=torch.bool)) as record:
        moe(x)
    gate = moe.gating_network(x).softmax(-1)
    chosen = torch.zeros(4)
    for row in gate:
        chosen[row.argsort(descending=True)[:top_k]] += 1
    truth = 4 * sum(chosen[e] / (50 * top_k) * gate[:, e].mean() for e in range(4))
    (loss,), (counts,) = record.notes["imbalance"], record.notes["routed"]
    torch.testing.assert_close(loss, truth)
    assert counts.tolist() == chosen.tolist()
    loss.backward()
    assert moe.gating_network.weight.grad.abs().sum() > 0


def test_a_uniform_router_has_loss_one_and_a_collapsed_one_has_more():
    moe, x = SparseMoELayer(6, 4), torch.randn(50, 6)
    nn.init.zeros_(moe.gating_network.weight)
    nn.init.zeros_(moe.gating_network.bias)
    with recorded(torch.ones(5, 10, dtype=torch.bool)) as record:
        moe(x)
        nn.init.constant_(moe.gating_network.bias[:1], 20.0)
        moe(x)
    uniform, collapsed = record.notes["imbalance"]
    torch.testing.assert_close(uniform, torch.tensor(1.0))
    torch.testing.assert_close(collapsed, torch.tensor(4.0), rtol=1e-3, atol=0)


def test_experts_refuse_states_of_another_width():
    with pytest.raises(ValueError, match=r"states \(3, 16\): .* must be 8"):
        SparseMoELayer(8)(torch.randn(3, 16))


@pytest.mark.parametrize("top_k", [0, 5, -1])
def test_top_k_must_lie_between_one_and_the_number_of_experts(top_k):
    with pytest.raises(ValueError, match="top_k"):
        SparseMoELayer(6, 4, top_k)


def test_an_expert_is_linear_activation_dropout_linear():
    kinds = [type(m) for m in SparseMoELayer(6, dropout_p=0.3).experts[0]]
    assert (kinds[0], kinds[2], kinds[3]) == (nn.Linear, nn.Dropout, nn.Linear)


@pytest.mark.parametrize("options", [{"bk_heads": 1}, {"bk_values": 0}, {"mixing": "none"}])
def test_layer_is_the_mixture_then_the_experts(options):
    torch.manual_seed(0)
    layer, u = MoEResNetBKLayer(6, 10, **options).eval(), torch.randn(2, 10, 6)
    flat = u.flatten(0, 1)
    mixed = layer.mixing.read(flat, layer.mixing.mix(flat, layer.mixing.contribution(u), None))
    torch.testing.assert_close(layer(u), (mixed + layer.moe(flat + mixed)).view_as(u))
    layer(u).sum().backward()
    assert all(p.grad is not None for name, p in layer.named_parameters() if "experts" not in name)


def test_block_returns_its_output_and_the_logits_of_its_exit():
    torch.manual_seed(0)
    block = EarlyExitResNetBKBlock(6, 10, 31, 4, 1, 0.1).eval()
    x = torch.randn(2, 10, 6)
    output, logits = block(x)
    torch.testing.assert_close(output, x + block.bk_layer(block.layer_norm(x)))
    torch.testing.assert_close(logits, block.exit_classifier(output))
    assert isinstance(block.layer_norm, nn.LayerNorm)
    assert isinstance(block.bk_layer, MoEResNetBKLayer)
    shapes = sorted(tuple(p.shape) for p in block.exit_classifier.parameters())
    assert shapes == [(6,), (6,), (31,), (31, 6)]  # the original's LayerNorm + Linear


def test_a_borrowed_unembedding_is_used_but_not_owned():
    torch.manual_seed(0)
    linear = nn.Linear(6, 31)
    head, h = ExitHead(6, linear, borrowed=True, translate=True), torch.randn(3, 6)
    assert head.unembedding is linear
    assert not any(p is linear.weight for p in head.parameters())
    # A new translator changes nothing.
    torch.testing.assert_close(head(h), linear(nn.functional.layer_norm(h, (6,))))
