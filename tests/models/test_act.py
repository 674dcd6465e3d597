"""ACT against a loop over tokens written from the paper; the conversion; the price of pondering."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import SIZES, VOCABULARY
from torch.nn import functional as F

from earlyexit.calibration.collect import collect_trace
from earlyexit.evaluation.causality import future_effect, replace_future
from earlyexit.evaluation.evaluator import EarlyExitEvaluator
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models import checkpoints
from earlyexit.models.act import ACTLanguageModel, convert_act_to_early_exit
from earlyexit.training.config import TrainingConfig
from earlyexit.training.train import train

ACT = {k: v for k, v in SIZES.items() if k != "gate_hidden"} | {"n_layers": 4}


@pytest.fixture(scope="module")
def make_act():
    """``make_act(seed=0, **changes)``: noise on every weight; tokens halt at every layer."""

    def make(seed: int = 0, **changes) -> ACTLanguageModel:
        torch.manual_seed(seed)
        model = ACTLanguageModel(**ACT | {"epsilon": 0.2} | changes)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.15 * torch.randn_like(parameter)
            for block in model.blocks[:-1]:
                block.bk_layer.halting.linear.weight.normal_(std=0.6)
                block.bk_layer.halting.linear.bias.fill_(-0.3)
        return model.eval()

    return make


def slow_act(model: ACTLanguageModel, x: torch.Tensor):
    """Graves's equations, one token at a time: outputs ``(B, N, D)``, N and ρ ``(B, N)``."""
    h = model.embed(x)[..., : model.d_model]
    limit = 1 - model.config.epsilon
    shape = x.shape
    running = [[[0.0, torch.zeros(model.d_model).to(h), False] for _ in row] for row in x]
    output, steps, ponder = torch.zeros_like(h), torch.zeros(shape), torch.zeros(shape).to(h)
    for layer, block in enumerate(model.blocks):
        inner, norm = block.bk_layer.layer, block.layer_norm
        u = F.layer_norm(h, h.shape[-1:], norm.weight, norm.bias, norm.eps)
        after = h + inner(u)
        last = layer == model.n_layers - 1
        for b in range(shape[0]):
            for i in range(shape[1]):
                c, average, halted = running[b][i]
                if halted:
                    after[b, i] = h[b, i]  # its state stays; deeper layers read it as it is
                    continue
                state = after[b, i]
                p = 1.0
                if not last:
                    unit = block.bk_layer.halting.linear
                    p = unit(F.layer_norm(state, state.shape)).sigmoid().item()
                if last or c + p >= limit:
                    remainder = 1 - c
                    output[b, i] = average + remainder * state
                    steps[b, i], ponder[b, i] = layer + 1, layer + 1 + remainder
                    running[b][i][2] = True
                else:
                    running[b][i][:2] = c + p, average + p * state
        h = after
    return output, steps.long(), ponder


def as_logits(model, output):
    head = model.blocks[-1].exit_classifier
    return head.unembedding(head.layer_norm(output))


@torch.no_grad()
@pytest.mark.parametrize("values", [4, 0])
def test_outputs_steps_and_ponder_cost_are_those_of_the_paper(make_act, make_tokens, values):
    model, x = make_act(1, bk_values=values).double(), make_tokens(3, 9)
    output, steps, ponder = slow_act(model, x)
    assert set(steps.flatten().tolist()) == {1, 2, 3, 4}
    logits, cost = model(x, return_ponder_cost=True)
    torch.testing.assert_close(logits, as_logits(model, output), rtol=1e-9, atol=1e-11)
    streams = model.hidden_states(x)
    assert torch.equal(model.steps(streams), steps)
    torch.testing.assert_close(model.ponder_cost(streams), ponder, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(cost, ponder.mean(), rtol=1e-9, atol=1e-11)
    assert torch.equal(model(x), logits)
    torch.testing.assert_close(
        model.nll(x, make_tokens(3, 9, 1)),
        F.cross_entropy(logits.mT, make_tokens(3, 9, 1), reduction="none"),
    )


@torch.no_grad()
def test_never_halting_costs_the_most(make_act, make_tokens):
    x, costs = make_tokens(3, 9), []
    for bias in (30.0, 1.0, 0.0, -1.0, -30.0):  # from halting at once to never
        model = make_act().double()
        for block in model.blocks[:-1]:
            block.bk_layer.halting.linear.weight.zero_()
            block.bk_layer.halting.linear.bias.fill_(bias)
        costs.append(model(x, return_ponder_cost=True)[1].item())
    assert costs == sorted(costs)
    assert costs[0] == pytest.approx(2) and costs[-1] == pytest.approx(model.n_layers + 1)
    model = make_act().double()
    steps, ponder = (f(model.hidden_states(x)) for f in (model.steps, model.ponder_cost))
    assert ponder[steps == 4].min() > 4 >= ponder[steps < 4].max()


def test_the_ponder_cost_pulls_every_used_unit_towards_halting(make_act, make_tokens):
    model, x = make_act().double(), make_tokens(3, 9)
    _, cost = model(x, return_ponder_cost=True)
    cost.backward()
    for block in model.blocks[:2]:
        assert block.bk_layer.halting.linear.bias.grad < 0  # a larger p costs less


@torch.no_grad()
@pytest.mark.parametrize("execution", ["compacted", "dense"])
@pytest.mark.parametrize("exit_head", ["translator", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_the_conversion_reproduces_act_at_its_threshold(
    make_act, make_tokens, keep, dtype, exit_head, execution
):
    act, x = make_act(exit_head=exit_head, keep=keep).to(dtype), make_tokens(5, 12)
    model = convert_act_to_early_exit(act)
    truth, steps = act(x), act.steps(act.hidden_states(x))
    logits, info = model(x, use_early_exit=True, policy=model.act_policy(), execution=execution)
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {}
    torch.testing.assert_close(logits, truth, **tolerance)
    assert torch.equal((info["exit_layers"] + 1).clamp_max(model.n_layers), steps)
    assert info["exited_mask"].any() and not info["exited_mask"].all()
    # It owns its weights: calibrating it leaves the ACT model alone.
    assert not {p.data_ptr() for p in act.parameters()} & {p.data_ptr() for p in model.parameters()}


@torch.no_grad()
@pytest.mark.parametrize("values", [4, 0])
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, 1.0])
def test_at_any_threshold_both_executions_agree(make_act, make_tokens, threshold, values):
    act, x = make_act(bk_values=values), make_tokens(5, 12)
    model = convert_act_to_early_exit(act).double()
    policy = ExitPolicy.constant(threshold, model.n_layers, "agreement")
    (a, one), (b, other) = (
        model(x, use_early_exit=True, policy=policy, execution=e) for e in ("compacted", "dense")
    )
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert torch.equal(one["exit_layers"], other["exit_layers"])
    trace_like = model(x, use_early_exit=True, policy=ExitPolicy.static(3, 4))[0]
    torch.testing.assert_close(trace_like, model(x), rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_leaving_anywhere_reads_a_proper_average(make_act, make_tokens):
    """Weights of the states sum to one: with equal states the average is the state."""
    model, x = convert_act_to_early_exit(make_act()).double(), make_tokens(2, 7)
    for stream in model.hidden_states(x)[1:]:
        c = stream[..., -1]
        assert (c >= 0).all() and (c <= 1 + 1e-12).all()
    for block in model.blocks:  # layers that change nothing
        block.bk_layer.layer.transform = lambda u, features: torch.zeros_like(u)
    h = model.embed(x)[..., : model.d_model]
    for layer in range(4):
        logits, _ = model(x, use_early_exit=True, policy=ExitPolicy.static(layer, 4))
        torch.testing.assert_close(logits, as_logits(model, h))


@pytest.mark.parametrize("converted", [False, True])
def test_causal(make_act, make_tokens, converted):
    model, x = make_act(top_k=2).double(), make_tokens(4, 12)
    policy = model.act_policy()
    if converted:
        model = convert_act_to_early_exit(model)
    for cut in (1, 6, 11):
        assert future_effect(model, x, cut) <= 1e-10
        if converted:
            other = replace_future(x, cut, VOCABULARY, seed=cut)
            (a, one), (b, two) = (model(i, use_early_exit=True, policy=policy) for i in (x, other))
            assert (a[:, :cut] - b[:, :cut]).abs().max() <= 1e-10
            assert torch.equal(one["exit_layers"][:, :cut], two["exit_layers"][:, :cut])
    x = x[:1]
    embedded = model.embed(x).detach()
    model.embed = lambda _: embedded
    embedded.requires_grad_()
    for i in range(x.shape[1]):
        (grad,) = torch.autograd.grad(model(x)[0, i].square().sum(), embedded)
        assert grad[0, : i + 1].abs().sum() > 0
        assert grad[0, i + 1 :].abs().sum() == 0


@torch.no_grad()
def test_trace_and_evaluator_agree_with_act(make_act, corpus):
    act = make_act()
    model = convert_act_to_early_exit(act)
    trace = collect_trace(model, corpus.splits["fit"], corpus.eos_id)
    x, y = (torch.as_tensor(t)[:4] for t in _windows(model, corpus))
    found = EarlyExitEvaluator(model, "cpu").evaluate_policy([(x, y)], model.act_policy())
    scored = y != -100
    assert found["perplexity"] == pytest.approx(math.exp(act.nll(x, y)[scored].mean()), rel=1e-5)
    steps = act.steps(act.hidden_states(x))[scored].double().mean().item()
    assert model.n_layers / found["speedup_estimate"] == pytest.approx(steps)
    # The trace's states are full-depth ones: its depth is near, its scores lie in [0, 1] and rise.
    assert (
        0 <= trace.score("agreement")[:, :-1].min() <= trace.score("agreement")[:, :-1].max() <= 1
    )
    assert (trace.score("agreement")[:, 1:-1] >= trace.score("agreement")[:, :-2] - 1e-6).all()


def _windows(model, corpus):
    from earlyexit.corpus.windows import windows

    w = windows(corpus.splits["fit"], model.n_seq, corpus.eos_id)
    return w.inputs, w.targets


@pytest.mark.slow
def test_a_larger_ponder_weight_means_fewer_layers(corpus):
    depths, ponders = [], []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model = ACTLanguageModel(**ACT | {"ponder_weight": weight})
        config = TrainingConfig(epochs=5, batch_size=8, learning_rate=1e-2, exit_loss_weight=0.0)
        history = train(model, corpus, config, "cpu")
        assert history[-1]["train_nll"] < history[0]["train_nll"]
        x = torch.as_tensor(_windows(model, corpus)[0])
        with torch.no_grad():
            streams = model.hidden_states(x)
            depths.append(model.steps(streams).double().mean().item())
            ponders.append(model.ponder_cost(streams).mean().item())
    assert depths[1] < depths[0] - 0.5
    assert ponders[1] < ponders[0] - 0.5


def test_calibration_trains_the_exits_and_nothing_else(make_act, corpus):
    act = make_act()
    model = convert_act_to_early_exit(act)
    config = TrainingConfig(epochs=4, learning_rate=1e-2, freeze_backbone=True)
    before = train_quality(model, corpus)
    train(model, corpus, config, "cpu")
    after = train_quality(model, corpus)
    assert after[0] < before[0] and after[-1] == before[-1]
    assert bool(model.gates.trained)
    for name, weight in act.state_dict().items():
        if "exit_classifier" not in name:
            assert torch.equal(weight, model.state_dict()[name])


def train_quality(model, corpus):
    from earlyexit.training.train import perplexity_per_exit

    return perplexity_per_exit(model, corpus.splits["train"], corpus.eos_id)


def test_a_checkpoint_serves_both_kinds(make_act, make_tokens, tmp_path):
    act, x = make_act(), make_tokens(2, 5)
    checkpoints.save_model(act, tmp_path / "a.safetensors")
    again = checkpoints.load_model(tmp_path / "a.safetensors", act.config, kind=ACTLanguageModel)
    assert torch.equal(again(x), act(x))


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"keep": 0.5}, {"bk_values": 0}])
def test_generation_continues_as_the_model_predicts(make_act, make_tokens, change):
    model, x = convert_act_to_early_exit(make_act(**change)).double(), make_tokens(2, 4)
    ids, exits = model.generate(x, 3, model.act_policy())
    assert ids.shape == (2, 7) and exits.shape == (2, 6)
    for position in range(4, 7):
        logits, _ = model(ids[:, :position], use_early_exit=True)
        assert torch.equal(logits[:, -1].argmax(-1), ids[:, position])
    with pytest.raises(ValueError, match="exceed"):
        model.generate(x, 20)


@pytest.mark.parametrize("wrong", [{"epsilon": 0.0}, {"ponder_weight": -1.0}, {"gate_hidden": 0}])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError):
        ACTLanguageModel(**ACT | wrong)


def test_halting_alone_decides_in_training(make_act, corpus):
    with pytest.raises(ValueError, match="exit_sampling"):
        train(make_act(), corpus, TrainingConfig(exit_sampling="tokens"), "cpu")
