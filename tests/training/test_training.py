"""Training learns, repeats itself exactly, and survives an interruption to the bit."""

from __future__ import annotations

import io
import math
import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from earlyexit.corpus.windows import IGNORE, loader
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models import ACTLanguageModel, ACTMultiScaleLanguageModel, SparseBKLanguageModel
from earlyexit.models.checkpoints import CheckpointError
from earlyexit.nn.record import recorded
from earlyexit.training import train as training
from earlyexit.training.config import TrainingConfig
from earlyexit.training.losses import training_loss
from earlyexit.training.train import perplexity_per_exit, train

FAST = {"epochs": 0.5, "batch_size": 8, "learning_rate": 1e-2}  # 8 steps
HEADS = ("translator", "own", "full")


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(a: dict, b: dict) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["one", "tokens"])
@pytest.mark.parametrize(
    "change", [*({"exit_head": h} for h in HEADS), {"output_head": "adaptive", "exit_head": "own"}]
)
def test_a_learnable_sequence_is_learnt_at_every_exit(make_model, corpus, change, sampling):
    model = make_model(**change, dropout_p=0.0)
    recipe = FAST | {"epochs": 12, "exit_loss_weight": 1.0, "exit_sampling": sampling}
    history = train(model, corpus, TrainingConfig(**recipe), "cpu")
    first, last = history[0], history[-1]
    assert last["step"] == 12 * 15 and last["tokens"] == 12 * corpus.splits["train"].n_tokens
    assert last["train_nll"] < first["train_nll"] - 1
    for layer in range(3):
        assert last[f"perplexity_{layer}"] < 0.3 * first[f"perplexity_{layer}"]
    assert last["perplexity_2"] < 20  # of 53 words; the first word of a document is anyone's guess


@pytest.mark.parametrize("freeze", [False, True])
def test_the_seed_fixes_the_weights(make_model, corpus, freeze):
    results = []
    for seed in (0, 0, 1):
        model, config = make_model(), TrainingConfig(**FAST, seed=seed, freeze_backbone=freeze)
        torch.manual_seed(len(results))  # what happened before does not matter
        history = train(model, corpus, config, "cpu")
        results.append((weights(model), history))
    assert not differing(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert differing(results[0][0], results[2][0])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("sampling, optimizer", [("one", "adamw"), ("all", "muon")])
def test_an_interrupted_training_goes_on_to_the_same_result(
    make_model, corpus, tmp_path, monkeypatch, sampling, optimizer
):
    config = TrainingConfig(**FAST | {"epochs": 1.6}, exit_sampling=sampling, optimizer=optimizer)
    whole = make_model()
    history = train(whole, corpus, config, "cpu")

    def interrupt(model, x, y, config, step, **rest):
        if step == 20:
            raise Interrupted
        return training_loss(model, x, y, config, step, **rest)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(training, "training_loss", interrupt)
        train(make_model(), corpus, config, "cpu", tmp_path, checkpoint_every=9)
    steps = []

    def watch(model, x, y, config, step, **rest):
        steps.append(step)
        return training_loss(model, x, y, config, step, **rest)

    monkeypatch.setattr(training, "training_loss", watch)
    resumed = make_model(seed=5)  # its own weights do not matter
    torch.manual_seed(99)
    resumed_history = train(resumed, corpus, config, "cpu", tmp_path, checkpoint_every=9)
    assert steps == list(range(18, 24))
    assert not differing(weights(whole), weights(resumed))
    assert resumed_history == history


def test_a_state_saved_before_the_first_report_loses_no_tokens(
    make_model, corpus, tmp_path, monkeypatch
):
    config = TrainingConfig(**FAST)
    history = train(make_model(), corpus, config, "cpu")

    def interrupt(model, x, y, config, step, **rest):
        if step == 5:
            raise Interrupted
        return training_loss(model, x, y, config, step, **rest)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(training, "training_loss", interrupt)
        train(make_model(), corpus, config, "cpu", tmp_path, checkpoint_every=4)
    assert train(make_model(), corpus, config, "cpu", tmp_path) == history


def test_a_state_of_another_configuration_is_not_resumed(make_model, corpus, tmp_path):
    train(make_model(), corpus, TrainingConfig(**FAST, seed=1), "cpu", tmp_path, checkpoint_every=3)
    fresh, beside = make_model(), make_model()
    train(fresh, corpus, TrainingConfig(**FAST), "cpu")
    train(beside, corpus, TrainingConfig(**FAST), "cpu", tmp_path)
    assert not differing(weights(fresh), weights(beside))
    other = [make_model(d_model=8) for _ in range(2)]
    train(other[0], corpus, TrainingConfig(**FAST), "cpu", tmp_path)
    train(other[1], corpus, TrainingConfig(**FAST), "cpu")
    assert not differing(*map(weights, other))


@pytest.mark.parametrize("damage", ["truncated", "pickle"])
def test_a_damaged_state_is_said_to_be_damaged(make_model, corpus, tmp_path, damage):
    config = TrainingConfig(**FAST)
    train(make_model(), corpus, config, "cpu", tmp_path, checkpoint_every=3)
    (state,) = tmp_path.iterdir()
    if damage == "truncated":
        state.write_bytes(state.read_bytes()[:-100])
    elif damage == "pickle":
        torch.save({"key": random.Random(0)}, state)
    with pytest.raises(CheckpointError):
        train(make_model(), corpus, config, "cpu", tmp_path)


@pytest.mark.parametrize("sampling", ["one", "all"])
@pytest.mark.parametrize("exit_head", HEADS)
def test_a_frozen_backbone_is_not_touched(make_model, corpus, exit_head, sampling):
    model = make_model(exit_head=exit_head)
    before = weights(model)
    own = {n for n in before for k in (0, 1) if n.startswith(f"blocks.{k}.exit_classifier.")}
    x, _ = next(iter(loader(corpus.splits["fit"], 12, 8, corpus.eos_id)))
    full, exits = model(x), perplexity_per_exit(model, corpus.splits["fit"], corpus.eos_id)
    config = TrainingConfig(**FAST | {"epochs": 3}, freeze_backbone=True, exit_sampling=sampling)
    train(model, corpus, config, "cpu")
    assert set(differing(before, weights(model))) == own | {"gates.trained"}  # of other exits
    assert torch.equal(model(x), full)
    after = perplexity_per_exit(model, corpus.splits["fit"], corpus.eos_id)
    assert after[0] < exits[0] and after[1] < exits[1] and after[2] == exits[2]


def test_exits_of_a_frozen_backbone_are_trained_on_the_states_they_will_see(make_model, corpus):
    """Dropout in a backbone that does not learn would only be noise on the exits' input."""
    model = make_model(dropout_p=0.5)
    config, seen = TrainingConfig(**FAST | {"epochs": 0.1}, freeze_backbone=True), []
    model.blocks[0].bk_layer.moe.experts[0][2].register_forward_hook(
        lambda module, *_: seen.append(module.training)
    )
    train(model, corpus, config, "cpu")
    assert seen and not any(seen)


def test_after_frozen_exits_the_whole_model_can_be_trained_again(make_model, corpus):
    model = make_model()
    train(model, corpus, TrainingConfig(**FAST, freeze_backbone=True), "cpu")
    before = weights(model)
    train(model, corpus, TrainingConfig(**FAST, exit_sampling="all"), "cpu")
    assert "blocks.0.bk_layer.mixing.contribution.weight" in differing(before, weights(model))


def test_the_joint_loss_is_the_sum_it_says(make_model, corpus):
    model = make_model()
    x, y = next(iter(loader(corpus.splits["fit"], 12, 8, corpus.eos_id)))
    with recorded(y != IGNORE) as record:
        states = model.hidden_states(x)
    nll = [
        F.cross_entropy(b.exit_classifier(h).flatten(0, 1), y.flatten(), ignore_index=IGNORE)
        for b, h in zip(model.blocks, states[1:], strict=True)
    ]
    balance = sum(record.notes["imbalance"]) / 3
    config = TrainingConfig(exit_loss_weight=0.7, exit_sampling="all", balance_weight=0.05)
    loss, last = training_loss(model, x, y, config, 0)
    truth = nll[2] + 0.7 * (nll[0] + nll[1]) / 2 + 0.05 * balance
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert last.item() == pytest.approx(nll[2].item(), rel=1e-5)
    one = TrainingConfig(exit_loss_weight=0.7, exit_sampling="one", balance_weight=0.05)
    sampled = {round(training_loss(model, x, y, one, step)[0].item(), 4) for step in range(20)}
    assert sampled == {round((nll[2] + 0.7 * nll[k] + 0.05 * balance).item(), 4) for k in (0, 1)}


def test_a_share_of_the_exits_gradient_reaches_the_layers(make_model, corpus):
    """Heads of exits learn all the same; in layers the gradient is linear in the share."""
    model = make_model(dropout_p=0.0, exit_head="own", tie_embeddings=False)
    x, y = next(iter(loader(corpus.splits["fit"], 12, 8, corpus.eos_id)))
    found = {}
    for share in (0.0, 0.5, 1.0):
        config = TrainingConfig(exit_sampling="all", exit_gradient=share)
        model.zero_grad()
        loss = training_loss(model, x, y, config, 0)[0]
        loss.backward()
        found[share] = {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }
    for name, grad in found[0.5].items():
        none, whole = found[0.0].get(name), found[1.0][name]
        if "exit_classifier" in name:
            torch.testing.assert_close(grad, whole)
        else:
            torch.testing.assert_close(grad, (none + whole) / 2, rtol=1e-4, atol=1e-7)
    assert not torch.equal(
        found[0.0]["token_embedding.weight"], found[1.0]["token_embedding.weight"]
    )


@pytest.mark.parametrize(
    "kind", [SparseBKLanguageModel, ACTLanguageModel, ACTMultiScaleLanguageModel]
)
def test_padding_takes_part_in_nothing_that_is_learned(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 53, "d_model": 16, "n_seq": 16, "bk_heads": 4, "keep": 0.5}
    model = kind(**sizes, **({"ponder_weight": 0.3} if "ACT" in kind.__name__ else {})).eval()
    x = torch.randint(53, (5, 16))
    padded = x.clone()
    padded[:, 8:] = 1  # <eos>, and the tokens before it are those of the short batch
    config = TrainingConfig(balance_weight=1.0, exit_sampling="all")
    y = padded.roll(-1, 1)
    y[:, 8:] = IGNORE
    short = training_loss(model, x[:, :8], y[:, :8], config, 0)
    for alone, with_padding in zip(short, training_loss(model, padded, y, config, 0), strict=True):
        torch.testing.assert_close(with_padding, alone)
    y[:] = IGNORE  # nothing but padding: nothing is learned, and nothing breaks
    assert training_loss(model, padded, y, config, 0)[1] == 0


def test_what_failed_in_training_leaves_the_model_as_it_was(make_model, corpus):
    model = make_model().train()
    model.blocks[0].eval()
    model.token_embedding.requires_grad_(False)
    broken = replace(corpus, splits=corpus.splits | {"fit": corpus.splits["fit"].limit(1)})
    broken.splits["fit"].ids[:] = 99
    config = TrainingConfig(**FAST, freeze_backbone=True)
    with pytest.raises(ValueError, match="target 99"):
        train(model, broken, config, "cpu")
    assert model.training and not model.blocks[0].training and model.blocks[1].training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        "token_embedding.weight"
    ]


def test_half_precision_is_not_trained_and_double_is(make_model, corpus):
    with pytest.raises(ValueError, match=r"bfloat16 are too coarse .* train model.float\(\)"):
        train(make_model().bfloat16(), corpus, TrainingConfig(**FAST), "cpu")
    for change in ({}, {"output_head": "adaptive"}):
        history = train(make_model(**change).double(), corpus, TrainingConfig(**FAST), "cpu")
        single = train(make_model(**change), corpus, TrainingConfig(**FAST), "cpu")
        assert history[-1]["perplexity_2"] == pytest.approx(single[-1]["perplexity_2"], rel=1e-2)


@pytest.mark.parametrize("change", [{}, {"exit_head": "full"}, {"output_head": "adaptive"}])
def test_sampled_exits_are_those_of_a_real_run(make_model, corpus, change):
    """Tokens at random exits, states frozen: the NLL of a dense run with those very exits."""
    model = make_model(dropout_p=0.0, n_layers=2, **change)
    x, y = next(iter(loader(corpus.splits["fit"], 12, 8, corpus.eos_id)))
    scored = y != -100
    for weight, layer in ((0.0, 1), (1e12, 0)):  # no token leaves early; every token does
        config = TrainingConfig(exit_loss_weight=weight, exit_sampling="tokens", balance_weight=0)
        loss, nll = training_loss(model, x, y, config, 0)
        truth, _ = model.nll(x, y, ExitPolicy.static(layer, 2), "dense")
        assert loss.item() == pytest.approx(truth[scored].mean().item(), rel=1e-5)
        assert nll.item() == pytest.approx(loss.item())
    half = TrainingConfig(exit_loss_weight=1.0, exit_sampling="tokens", balance_weight=0)
    loss = training_loss(model, x, y, half, 3)[0].item()
    assert (
        loss
        == training_loss(model, x, y, half, 3)[0].item()
        != training_loss(model, x, y, half, 4)[0].item()
    )
    state = random.Random(half.seed * 1_000_003 + 3).getrandbits(60)
    leaves = torch.rand(x.shape, generator=torch.Generator().manual_seed(state)) < 0.5
    assert 0.3 < leaves.double().mean() < 0.7
    with leaving(leaves) as policy:
        truth, exits = model.nll(x, y, policy, "compacted")
    assert torch.equal(exits == 0, leaves)
    assert loss == pytest.approx(truth[scored].mean().item(), rel=1e-5)


@contextmanager
def leaving(leaves):
    """A policy by which the tokens ``leaves`` ``(B, N)`` leave at exit 0."""
    order = iter([torch.where(leaves.flatten(), 1.0, -1.0)])
    rule = replace(CRITERIA["saturation"], score=lambda state: next(order))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CRITERIA, "saturation", rule)
        yield ExitPolicy("saturation", (0.0, rule.never))


def test_no_exit_loss_trains_no_exit(make_model, corpus):
    model = make_model()
    before = weights(model)
    train(model, corpus, TrainingConfig(**FAST, exit_loss_weight=0.0, weight_decay=0.0), "cpu")
    changed = differing(before, weights(model))
    assert changed and not any("translator" in n for n in changed)


def test_perplexity_per_exit_is_token_weighted(make_model, corpus):
    model, split = make_model().train(), corpus.splits["fit"]
    found = perplexity_per_exit(model, split, corpus.eos_id, batch_size=5)
    assert model.training
    assert found == pytest.approx(perplexity_per_exit(model, split, corpus.eos_id), rel=1e-6)
    model.eval()
    ((x, y),) = loader(split, 12, 10**6, corpus.eos_id)
    for layer, h in enumerate(model.hidden_states(x)[1:]):
        logits = model.blocks[layer].exit_classifier(h).flatten(0, 1)
        nll = F.cross_entropy(logits, y.flatten(), ignore_index=IGNORE)
        assert found[layer] == pytest.approx(math.exp(nll.item()), rel=1e-5)


@pytest.mark.parametrize("freeze", [False, True])
def test_nan_stops_the_training(make_model, corpus, freeze):
    model = make_model()
    with torch.no_grad():
        model.blocks[0].layer_norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match="nan"):
        train(model, corpus, TrainingConfig(**FAST, freeze_backbone=freeze), "cpu")


def test_a_broken_state_is_never_kept(make_model, corpus, tmp_path, monkeypatch):
    def explode(model, x, y, config, step, **rest):
        loss, nll = training_loss(model, x, y, config, step, **rest)
        return (loss * math.nan, nll * math.nan) if step == 4 else (loss, nll)

    monkeypatch.setattr(training, "training_loss", explode)
    with pytest.raises(FloatingPointError):
        train(make_model(), corpus, TrainingConfig(**FAST), "cpu", tmp_path, checkpoint_every=2)
    for state in tmp_path.iterdir():
        content = state.read_bytes()[32:]  # after its digest
        tensors = torch.load(io.BytesIO(content), weights_only=True)["model"].values()
        assert all(torch.isfinite(t).all() for t in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "adaptive"])
def test_bfloat16_learns_nearly_what_float32_does(make_model, corpus, head):
    found = []
    for bf16 in (True, False):
        config = TrainingConfig(**FAST | {"epochs": 3}, bf16=bf16)
        with torch.autocast("cpu", torch.bfloat16):  # which decides nothing
            found.append(train(make_model(output_head=head), corpus, config, "cpu")[-1])
    assert found[0]["perplexity_2"] == pytest.approx(found[1]["perplexity_2"], rel=0.2)
    assert found[0]["perplexity_2"] != found[1]["perplexity_2"]


def test_max_tokens_limits_the_text_and_a_fraction_of_an_epoch_is_allowed(make_model, corpus):
    history = train(
        make_model(), corpus, TrainingConfig(**FAST | {"epochs": 1}), "cpu", max_tokens=300
    )
    assert history[-1]["tokens"] == 300
    history = train(make_model(), corpus, TrainingConfig(**FAST | {"epochs": 0.01}), "cpu")
    assert history[-1]["step"] == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0}, {"batch_size": 0}, {"learning_rate": -1.0}, {"learning_rate": math.nan},
        {"exit_sampling": "some"}, {"exit_sampling": "tokens", "distillation": 0.5},
        {"freeze_backbone": True, "exit_loss_weight": 0.0},
    ],
)  # fmt: skip
def test_impossible_configurations_are_refused(bad):
    with pytest.raises(ValueError):
        TrainingConfig(**bad)


def test_a_single_layer_trains_and_has_no_exit_to_train_alone(make_model, corpus):
    history = train(make_model(n_layers=1), corpus, TrainingConfig(**FAST), "cpu")
    assert set(history[-1]) == {"step", "tokens", "train_nll", "perplexity_0"}
    with pytest.raises(ValueError, match="exit"):
        train(make_model(n_layers=1), corpus, TrainingConfig(**FAST, freeze_backbone=True), "cpu")
