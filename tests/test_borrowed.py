"""What is done with a model leaves it as it was: its modes, what learns, its state, its copies."""

from __future__ import annotations

import copy
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

import earlyexit
from earlyexit.calibration.certify import Refused, certify
from earlyexit.calibration.collect import collect_trace
from earlyexit.calibration.temperature import fit_temperatures
from earlyexit.calibration.thresholds import Unreachable, fit_policy
from earlyexit.corpus.windows import IGNORE, loader
from earlyexit.evaluation.evaluator import EarlyExitEvaluator
from earlyexit.evaluation.routing import expert_shares, kept_shares
from earlyexit.evaluation.systems import run_policy
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.statistics import exit_shares
from earlyexit.models import (
    ACTLanguageModel,
    ACTMultiScaleLanguageModel,
    EarlyExitLanguageModel,
    MultiScaleLanguageModel,
    SparseBKLanguageModel,
    convert_act_to_early_exit,
)
from earlyexit.models.checkpoints import load_model, save_model
from earlyexit.nn.borrowed import borrowed
from earlyexit.nn.record import recorded
from earlyexit.training.config import TrainingConfig
from earlyexit.training.gates import train_gates
from earlyexit.training.losses import training_loss
from earlyexit.training.train import perplexity_per_exit

KINDS = [
    EarlyExitLanguageModel,
    SparseBKLanguageModel,
    MultiScaleLanguageModel,
    ACTLanguageModel,
    ACTMultiScaleLanguageModel,
]
SMALL = {"vocab_size": 53, "d_model": 16, "n_seq": 12, "bk_heads": 4}


def state(model) -> tuple:
    modes = [module.training for module in model.modules()]
    return modes, [p.requires_grad for p in model.parameters()]


@pytest.fixture
def odd(make_model):
    """A model in training mode, but for one block, that learns, but for its embedding."""
    model = make_model().train()
    model.blocks[1].eval()
    model.token_embedding.requires_grad_(False)
    return model


USES = {
    "trace": lambda m, c: collect_trace(m, c.splits["fit"], 1),
    "temperatures": lambda m, c: fit_temperatures(m, c.splits["fit"], 1, 50),
    "gates": lambda m, c: train_gates(m, c.splits["train"], 1, 50, 2),
    "perplexity": lambda m, c: perplexity_per_exit(m, c.splits["fit"], 1),
    "evaluator": lambda m, c: EarlyExitEvaluator(m, "cpu").evaluate(loader(c.splits["fit"], 12, 8)),
    "generate": lambda m, c: m.generate(torch.ones(1, 2, dtype=torch.long), 3),
    "certify": lambda m, c: certify(
        m, collect_trace(m, c.splits["fit"], 1), c.splits["certify"], 1
    ),
}


@pytest.mark.parametrize("use", USES)
def test_modes_and_what_learns_are_restored(odd, corpus, use):
    before = state(odd)
    try:
        USES[use](odd, corpus)
    except ValueError as error:  # noise certifies nothing
        assert use == "certify" and isinstance(error, (Unreachable, Refused))
    assert state(odd) == before
    with torch.no_grad():
        odd.position_embedding.weight.fill_(torch.nan)
    with pytest.raises((ValueError, FloatingPointError)):
        USES[use](odd, corpus)
    assert state(odd) == before


def test_a_block_that_fails_is_restored_too(odd):
    before = state(odd)
    with pytest.raises(KeyError), borrowed(odd) as model:
        assert model is odd and not odd.training
        odd.requires_grad_(False)
        raise KeyError
    assert state(odd) == before


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_with_a_graph_stays_on_a_model(kind):
    model, x = kind(**SMALL), torch.randint(53, (2, 12))
    model(x).sum().backward()
    training_loss(model, x, x, TrainingConfig(exit_sampling="all"), 0)[0].backward()
    ForkingPickler.dumps(model)  # as handing it to a worker process does
    copied = copy.deepcopy(model)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True)
    )
    for module in model.modules():
        for value in vars(module).values():
            assert not isinstance(value, torch.Tensor) or value.grad_fn is None


@pytest.mark.slow
def test_a_compiled_model_runs_and_is_saved_as_the_model_that_it_is(
    make_model, make_tokens, tmp_path
):
    model, x = make_model(), make_tokens(2, 12)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    save_model(compiled, tmp_path / "m.safetensors")
    assert load_model(tmp_path / "m.safetensors").fingerprint() == model.fingerprint()


# ---------------------------------------------------------------------- padding


def padded(x: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``length`` positions of x with targets, and the rest as padding."""
    inputs, targets = x.clone(), x.roll(-1, 1)
    inputs[:, length:], targets[:, length:] = 1, IGNORE
    return inputs, targets


@pytest.mark.parametrize("kind", KINDS)
def test_padding_takes_part_in_nothing_that_is_counted(kind):
    torch.manual_seed(0)
    model = kind(**SMALL).eval()
    x, y = padded(torch.randint(53, (3, 12)), 8)
    short = x[:, :8], y[:, :8]
    torch.testing.assert_close(expert_shares(model, [(x, y)]), expert_shares(model, [short]))
    assert kept_shares(model, [(x, y)]) == pytest.approx(kept_shares(model, [short]))
    if kind not in (ACTLanguageModel, ACTMultiScaleLanguageModel):  # these run no policy
        policy = ExitPolicy.constant(0.03, model.n_layers)
        assert run_policy(model, [(x, y)], policy) == pytest.approx(
            run_policy(model, [short], policy)
        )
        assert exit_shares(model, x, y, policy) == pytest.approx(exit_shares(model, *short, policy))


def test_a_record_of_a_batch_knows_the_positions_of_coarser_scales():
    counted = torch.zeros(2, 5, dtype=torch.bool)
    counted[0, :3] = counted[1, :1] = True
    with recorded(counted) as record:
        for size, rows in ((5, [0, 1, 2, 5]), (3, [0, 1, 3]), (2, [0, 2]), (1, [0, 1])):
            assert record.counted(torch.arange(2 * size)).tolist() == rows
    with recorded(torch.ones(2, 5, dtype=torch.bool)) as record:
        values = torch.arange(7)
        assert record.counted(values) is values


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("change", [{}, {"output_head": "adaptive"}, {"left_behind": "kept"}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_give_nearly_the_same_numbers(
    make_model, make_tokens, corpus, tmp_path, dtype, change
):
    single, other = make_model(**change), make_model(**change).to(dtype)
    x = make_tokens(6, 12)
    for policy in (None, ExitPolicy.constant(0.2, 3), ExitPolicy.constant(0.3, 3, "gate")):
        for execution in ("compacted", "dense"):
            a, b = (m.nll(x, x, policy, execution) for m in (single, other))
            a, b = (r if policy is None else r[0] for r in (a, b))
            assert b.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert b.mean().item() == pytest.approx(a.mean().item(), rel=0.05)
    traces = [collect_trace(m, corpus.splits["fit"], 1) for m in (single, other)]
    assert traces[1].full_nll == pytest.approx(traces[0].full_nll, rel=0.02)
    policy = fit_policy(traces[1], "max_probability", 5.0)
    assert other.nll(x, x, policy)[1].shape == x.shape
    save_model(other, tmp_path / "m.safetensors")
    back = load_model(tmp_path / "m.safetensors")
    assert {p.dtype for p in back.parameters()} == {dtype}
    assert back.fingerprint() == other.fingerprint() != single.fingerprint()
    assert torch.equal(back.nll(x, x), other.nll(x, x))
    assert other.generate(x[:, :3], 4, policy)[0].shape == (6, 7)


@pytest.mark.parametrize("change", [{}, {"output_head": "adaptive"}])
def test_autocast_changes_nothing_that_is_scored(make_model, make_tokens, corpus, change):
    model, x = make_model(**change), make_tokens(4, 12)
    policy = ExitPolicy.constant(0.2, 3)

    def found():
        trace = collect_trace(model, corpus.splits["fit"], 1)
        evaluated = EarlyExitEvaluator(model, "cpu").evaluate_policy([(x, x)], policy)
        words = model.generate(x[:, :4], 3)[0]
        scores = (
            model.nll(x, x),
            *model.nll(x, x, policy),
            model(x),
            words,
            *model.predict(x, policy),
        )
        return [s.tolist() for s in scores], evaluated["perplexity"], trace.nll.tolist()

    plain = found()
    with torch.autocast("cpu", torch.bfloat16):
        assert found() == plain


@pytest.mark.slow
def test_the_published_model_in_half_precision_is_within_a_thousandth():
    published = earlyexit.load("cpu", device="cpu")
    test = published.corpus.splits["test"].limit(4000)
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = copy.deepcopy(published.model).to(dtype)
        evaluator, data = EarlyExitEvaluator(model, "cpu"), loader(test, 128, 32)
        policy = ExitPolicy.constant(0.1, model.n_layers, "gate")
        found[dtype] = [evaluator.evaluate_policy(data, p)["perplexity"] for p in (None, policy)]
    for dtype in (torch.bfloat16, torch.float16):
        assert found[dtype] == pytest.approx(found[torch.float32], rel=1e-3)


# ---------------------------------------------------------------------- another model's, another text's


def test_a_policy_runs_on_the_model_that_it_was_fitted_for(
    make_model, make_tokens, corpus, tmp_path
):
    model, other, x = make_model(), make_model(seed=1), make_tokens(2, 12)
    trace = collect_trace(model, corpus.splits["fit"], 1)
    policy = fit_policy(trace, "max_probability", 5.0)
    assert policy.model_hash == model.fingerprint() == trace.model_hash
    policy.save(tmp_path / "p.json")
    assert ExitPolicy.load(tmp_path / "p.json").model_hash == policy.model_hash
    model.nll(x, x, policy)
    model.generate(x[:, :3], 2, policy)
    for use in (
        lambda: other.nll(x, x, policy),
        lambda: other(x, True, policy),
        lambda: other.generate(x[:, :3], 2, policy),
        lambda: collect_trace(other, corpus.splits["fit"], 1).evaluate(policy),
    ):
        with pytest.raises(ValueError, match=f"fitted for model {policy.model_hash}"):
            use()
    other.nll(x, x, replace(policy, model_hash=""))  # on purpose
    with torch.no_grad():
        model.blocks[0].layer_norm.weight[0] += 1
    with pytest.raises(ValueError, match="fitted for model"):
        model.nll(x, x, policy)


def test_a_model_knows_the_words_of_one_text(make_model, corpus, tmp_path):
    model, fit = make_model(), corpus.splits["fit"]
    train_gates(model, corpus.splits["train"], 1, 50, 2)
    assert model.trained_on == corpus.data_hash
    save_model(model, tmp_path / "m.safetensors")
    model = load_model(tmp_path / "m.safetensors")
    assert model.trained_on == corpus.data_hash == copy.deepcopy(model).trained_on
    strange = replace(fit, data_hash="f" * 64)
    perplexity = perplexity_per_exit(model, fit, 1)
    assert perplexity == perplexity_per_exit(
        model, replace(fit, data_hash=""), 1
    )  # nothing is known
    for use in (
        lambda: collect_trace(model, strange, 1),
        lambda: fit_temperatures(model, strange, 1),
        lambda: train_gates(model, replace(strange, name="train"), 1),
        lambda: perplexity_per_exit(model, strange, 1),
        lambda: EarlyExitEvaluator(model, "cpu").evaluate(loader(strange, 12, 8)),
        lambda: EarlyExitEvaluator(model, "cpu").benchmark_speedup(loader(strange, 12, 8)),
    ):
        with pytest.raises(ValueError, match="ids are of text ffff"):
            use()
    act = ACTLanguageModel(**SMALL)
    act.trained_on = "a"
    assert convert_act_to_early_exit(act).trained_on == "a"
