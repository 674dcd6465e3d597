"""Several scales: nothing looks ahead, blocks leave together, both executions agree, positions count."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import SIZES, VOCABULARY, future_jacobian

from earlyexit.calibration.collect import collect_trace
from earlyexit.calibration.trace import block_trace
from earlyexit.evaluation.causality import future_effect, replace_future
from earlyexit.evaluation.evaluator import EarlyExitEvaluator
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models import checkpoints
from earlyexit.models.act_multi_scale import ACTMultiScaleLanguageModel, convert_act_multi_scale
from earlyexit.models.multi_scale import MultiScaleLanguageModel
from earlyexit.training.config import TrainingConfig
from earlyexit.training.gates import train_gates
from earlyexit.training.train import perplexity_per_exit, train

READY = [name for name in CRITERIA if name != "depth"]
MULTI = SIZES | {"n_layers": 5, "n_seq": 13}
KINDS = ("plain", "sparse", "act", "act and sparse")
MIXINGS = [{"bk_values": 0}, {"mixing": "attention"}, {"mixing": "none"}]  # beside the resolvent


def noisy(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
        for block in model.blocks:
            block.exit_classifier.layer_norm.weight.mul_(3)
        for unit in getattr(model, "units", ()):
            unit.linear.weight.normal_(std=0.6)
            unit.linear.bias.fill_(-0.3)
        if model.gates is not None:
            model.gates.trained.fill_(True)
    return model.eval()


@pytest.fixture(scope="module")
def make_multi():
    """``make_multi(kind="plain", seed=0, **changes)``: noise on every weight; with ACT, converted."""

    def make(kind: str = "plain", seed: int = 0, **changes):
        torch.manual_seed(seed)
        keep = 0.5 if "sparse" in kind else 1.0
        if "act" not in kind:
            return noisy(MultiScaleLanguageModel(**MULTI | {"keep": keep} | changes))
        sizes = MULTI | {"keep": keep, "gate_hidden": None, "epsilon": 0.25} | changes
        return convert_act_multi_scale(noisy(ACTMultiScaleLanguageModel(**sizes)))

    return make


def slow_reads(model, x):
    """The definition, one position at a time: r ``(B, N, D)`` after every layer at full depth."""
    (d1, d2), (u1, u2) = model.down, model.up
    half, quarter = math.ceil(x.shape[1] / 2), math.ceil(x.shape[1] / 4)

    def pool(weights, fine, length):
        zero = torch.zeros_like(fine[:, 0])
        out = []
        for j in range(length):
            left = fine[:, 2 * j - 1] if j else zero
            out.append(weights(torch.cat([left, fine[:, 2 * j]], dim=-1)))
        return torch.stack(out, dim=1)

    def add(fine, weights, coarse):
        return torch.stack(
            [fine[:, i] + weights(coarse[:, i // 2]) for i in range(fine.shape[1])], 1
        )

    f0, f1, f2, f3, f4 = (block.hidden for block in model.blocks)
    h = f0(model.embed(x))
    c = f1(pool(d1, h, half))
    q = f2(pool(d2, c, quarter))
    c2 = add(c, u2, q)
    c3 = f3(c2)
    return [h, add(h, u1, c), add(h, u1, c2), add(h, u1, c3), f4(add(h, u1, c3))]


@torch.no_grad()
@pytest.mark.parametrize("length", [13, 12, 11, 2, 1])
def test_states_are_those_of_the_definition(make_multi, make_tokens, length):
    model, x = make_multi().double(), make_tokens(2, length)
    states = model.hidden_states(x)
    for found, truth in zip(states[1:], slow_reads(model, x), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model(x), model.blocks[-1].exit_classifier(states[-1]))


@pytest.mark.parametrize("kind", KINDS)
def test_causal_at_full_depth(make_multi, make_tokens, kind):
    model, x = make_multi(kind, top_k=2).double(), make_tokens(3, 13)
    for cut in range(1, 13):
        assert future_effect(model, x, cut) <= 1e-10
    for length in (13, 8):
        future, past = future_jacobian(model, x[:1, :length], model)
        assert future == 0 and past > 0


def test_every_exit_is_causal(make_multi, make_tokens):
    model, x = make_multi().double(), make_tokens(1, 11)
    for layer in range(5):
        future, past = future_jacobian(
            model, x, lambda ids, layer=layer: model.hidden_states(ids)[layer + 1]
        )
        assert future == 0 and past > 0


def test_a_window_aligned_to_its_block_would_leak(make_multi, make_tokens):
    """The control: pooling tokens (2j, 2j + 1) for the block that they form reads the answer."""
    model, x = make_multi().double(), make_tokens(3, 12)
    pool = model.pool
    model.pool = lambda level, fine: pool(level, fine.roll(-1, dims=1))
    assert future_effect(model, x, 5) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("length", [13, 12, 6])
@pytest.mark.parametrize(
    "kind, criterion",
    [(k, c) for k in KINDS[:2] for c in READY] + [(k, "agreement") for k in KINDS[2:]],
)
def test_with_exits_both_executions_agree_and_see_no_future(
    make_multi, make_tokens, make_policy, kind, criterion, length
):
    model, x = make_multi(kind).double(), make_tokens(4, length)
    policy = model.act_policy() if "act" in kind else make_policy(model, x, criterion, 0.3)
    (a, one), (b, two) = (
        model(x, use_early_exit=True, policy=policy, execution=e) for e in ("compacted", "dense")
    )
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert torch.equal(one["exit_layers"], two["exit_layers"])
    torch.testing.assert_close(
        one["exit_confidences"], two["exit_confidences"], rtol=1e-9, atol=1e-11, equal_nan=True
    )
    if length == 13:
        assert len(one["exit_layers"].unique()) > 2
    for cut in (1, 3, 5):
        other = replace_future(x, cut, VOCABULARY, seed=cut)
        c, three = model(other, use_early_exit=True, policy=policy)
        assert (a[:, :cut] - c[:, :cut]).abs().max() <= 1e-10
        assert torch.equal(one["exit_layers"][:, :cut], three["exit_layers"][:, :cut])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "act"])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_whatever_mixes_both_executions_agree(make_multi, make_tokens, make_policy, kind, mixing):
    model, x = make_multi(kind, **mixing).double(), make_tokens(4, 13)
    policy = model.act_policy() if kind == "act" else make_policy(model, x, "agreement", 0.3)
    (a, one), (b, two) = (
        model(x, use_early_exit=True, policy=policy, execution=e) for e in ("compacted", "dense")
    )
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert torch.equal(one["exit_layers"], two["exit_layers"])
    assert len(one["exit_layers"].unique()) > 1


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_static_exits_are_the_states_and_never_is_full_depth(make_multi, make_tokens, kind):
    model, x = make_multi(kind).double(), make_tokens(2, 13)
    states = model.hidden_states(x)
    for layer in range(6):
        logits, info = model(x, use_early_exit=True, policy=ExitPolicy.static(layer, 5))
        head = model.blocks[min(layer, 4)].exit_classifier
        assert (info["exit_layers"] == layer).all()
        torch.testing.assert_close(logits, head(states[min(layer + 1, 5)]), rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_blocks_leave_by_the_score_of_their_first_token(make_multi, make_tokens):
    model, x = make_multi(), make_tokens(6, 13)
    policy = ExitPolicy("agreement", (1.0, 1.0, 0.5, 1.0, 1.0))  # at N/4 only
    _, info = model(x, use_early_exit=True, policy=policy)
    left = info["exit_layers"] == 2
    assert left.any() and not left.all()
    score = info["exit_confidences"]
    for start in range(0, 13, 4):
        block = left[:, start : start + 4]
        assert (block == block[:, :1]).all()
        same = score[:, start : start + 4]
        assert torch.equal(same[block], same[:, :1].expand_as(same)[block])
    # Tokens of a block share the decision, not the prediction.
    rows = model(x, use_early_exit=True, policy=policy)[0][left]
    assert len(rows.unique(dim=0)) > len(rows) / 2


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_what_the_experts_see(make_multi, make_tokens, make_policy, kind):
    model, x = make_multi(kind), make_tokens(5, 13)
    policy = model.act_policy() if "act" in kind else make_policy(model, x, "gate", 0.3)
    rows, handles = [], []
    for block in model.blocks:
        handles.append(
            block.bk_layer.moe.register_forward_hook(
                lambda m, inputs, out: rows.append(inputs[0].numel() // inputs[0].shape[-1])
            )
        )
    _, info = model(x, use_early_exit=True, policy=policy)
    counted, rows[:] = list(rows), []
    model(x)
    assert rows == [65, 35, 20, 35, 65]
    for handle in handles:
        handle.remove()
    exits = info["exit_layers"]
    positions = model.operations().run_positions(exits) * x.numel()
    assert positions[: len(counted)] == pytest.approx(counted)
    assert not positions[len(counted) :].any() and positions.sum() < sum(rows)
    assert model.operations().run_positions(torch.full((5, 12), 5)).sum() == 3.25


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "act"])
def test_trace_and_evaluator(make_multi, corpus, kind):
    model = make_multi(kind)
    trace = collect_trace(model, corpus.splits["fit"], corpus.eos_id)
    judged = block_trace(trace, model)
    policy = ExitPolicy.constant(0.6, 5, "agreement")
    layers = judged.exit_layers(policy)
    first = trace.position % 4 == 0
    assert np.array_equal(
        judged.scores["agreement"][first], trace.scores["agreement"][first], equal_nan=True
    )
    if kind == "act":
        assert np.array_equal(layers, trace.exit_layers(policy))  # a block's scores are one anyway
    # Where nothing has left before, trace and run agree: all at one exit.
    only = ExitPolicy("agreement", (0.6, *[math.inf] * 4))
    from earlyexit.corpus.windows import loader

    batches = list(loader(corpus.splits["fit"], model.n_seq, 4, corpus.eos_id))
    evaluator = EarlyExitEvaluator(model, "cpu")
    found = evaluator.evaluate_policy(batches, only)
    assert found["exit_distribution"][0] / 100 == pytest.approx(
        (judged.exit_layers(only) == 0).mean()
    )
    full = evaluator.evaluate_policy(batches)["perplexity"]
    assert full == pytest.approx(np.exp(trace.full_nll), rel=1e-5)
    assert evaluator.benchmark_speedup(batches, 1, policy)["actual_speedup"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "act and sparse"])
def test_it_learns(corpus, kind):
    torch.manual_seed(0)
    if kind == "plain":
        model = MultiScaleLanguageModel(**MULTI)
    else:
        sizes = MULTI | {"gate_hidden": None, "keep": 0.5, "ponder_weight": 0.1}
        model = ACTMultiScaleLanguageModel(**sizes)
    weight = 0.3 if kind == "plain" else 0.0
    config = TrainingConfig(epochs=5, batch_size=8, learning_rate=1e-2, exit_loss_weight=weight)
    train(model, corpus, config, "cpu")
    found = perplexity_per_exit(model, corpus.splits["train"], corpus.eos_id)
    assert found[-1] < 0.6 * VOCABULARY
    if kind == "plain":
        train_gates(model, corpus.splits["train"], corpus.eos_id, 500, steps=20)
        assert bool(model.gates.trained)
        for wrong in ({"layer_dropout": 0.1}, {"exit_sampling": "tokens"}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                train(model, corpus, TrainingConfig(**wrong), "cpu")


@torch.no_grad()
@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_act_at_its_threshold_is_the_act_model(make_tokens, dtype, keep):
    torch.manual_seed(0)
    sizes = MULTI | {"gate_hidden": None, "epsilon": 0.25, "keep": keep}
    act, x = noisy(ACTMultiScaleLanguageModel(**sizes)).to(dtype), make_tokens(5, 13)
    model = convert_act_multi_scale(act)
    truth, cost = act(x, return_ponder_cost=True)
    steps = act.steps(act.hidden_states(x))
    for execution in ("compacted", "dense"):
        logits, info = model(x, use_early_exit=True, execution=execution)
        tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {}
        torch.testing.assert_close(logits, truth, **tolerance)
        assert torch.equal((info["exit_layers"] + 1).clamp_max(5), steps)
    assert len(steps.unique()) > 1 and steps.double().mean() < cost < 6


@torch.no_grad()
def test_generation_and_checkpoints(make_multi, make_tokens, tmp_path):
    model, x = make_multi(), make_tokens(2, 4)
    ids, exits = model.generate(x, 3)
    assert ids.shape == (2, 7) and exits.shape == (2, 6)
    for position in range(4, 7):
        assert torch.equal(model(ids[:, :position])[:, -1].argmax(-1), ids[:, position])
    checkpoints.save_model(model, tmp_path / "m.safetensors")
    again = checkpoints.load_model(tmp_path / "m.safetensors", kind=MultiScaleLanguageModel)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("wrong", [{"n_layers": 4}, {"n_layers": 1}, {"causal": False}])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError):
        MultiScaleLanguageModel(**MULTI | wrong)
