"""No output depends on a later token. The two-sided form, which does, is the control."""

from __future__ import annotations

import pytest
import torch
from conftest import future_jacobian

from earlyexit.evaluation.causality import future_effect, perplexity_without_future, replace_future
from earlyexit.exits.criteria import CRITERIA

READY = [name for name in CRITERIA if name != "depth"]


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("exit_head", ["translator", "full"])
def test_replacing_the_future_changes_nothing_before_it(make_model, make_tokens, top_k, exit_head):
    model, x = make_model(top_k=top_k, exit_head=exit_head).double(), make_tokens(4, 12)
    for cut in (1, 6, 11):
        assert future_effect(model, x, cut) <= 1e-10


@pytest.mark.parametrize("execution", ["compacted", "dense"])
@pytest.mark.parametrize("criterion", READY)
def test_nor_with_exits(make_model, make_tokens, make_policy, criterion, execution):
    model, x = make_model(top_k=2).double(), make_tokens(4, 12)
    policy = make_policy(model, x, criterion)
    for cut in (1, 5, 11):
        other = replace_future(x, cut, model.vocab_size, seed=cut)
        (a, before), (b, after) = (
            model(ids, use_early_exit=True, policy=policy, execution=execution)
            for ids in (x, other)
        )
        assert (a[:, :cut] - b[:, :cut]).abs().max() <= 1e-10
        assert torch.equal(before["exit_layers"][:, :cut], after["exit_layers"][:, :cut])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("exits", [False, True])
def test_the_jacobian_to_the_future_is_exactly_zero(
    make_model, make_tokens, make_policy, causal, exits
):
    model, x = make_model(top_k=2, causal=causal).double(), make_tokens(1, 9)
    policy = make_policy(model, x, "saturation")

    def outputs(x):
        return model(x, use_early_exit=True, policy=policy)[0] if exits else model(x)

    future, past = future_jacobian(model, x, outputs)
    assert past > 0
    assert future == 0 if causal else future > 0


def test_the_two_sided_model_leaks(make_model, make_tokens):
    model, x = make_model(causal=False).double(), make_tokens(4, 12)
    assert future_effect(model, x, 6) > 1e-3


@pytest.mark.parametrize("length", [12, 5, 2])
def test_perplexity_without_the_future(make_model, make_tokens, length):
    x, y = make_tokens(6, length), make_tokens(6, length, 1)
    y[0, 1:] = -100
    true, replaced = perplexity_without_future(make_model().double(), [(x, y)])
    assert true == pytest.approx(replaced, rel=1e-10)
    if length > 2:
        leaky = make_model(causal=False).double()
        true, replaced = perplexity_without_future(leaky, [(x, y)])
        assert abs(true / replaced - 1) > 1e-4


def test_replacing_keeps_the_past(make_tokens):
    x = make_tokens(3, 9)
    other = replace_future(x, 4, 53)
    assert torch.equal(other[:, :4], x[:, :4])
    assert not torch.equal(other[:, 4:], x[:, 4:])
