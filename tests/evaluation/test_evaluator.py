"""The evaluator: all tokens count, nothing is changed, and the baseline is honest."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from earlyexit.calibration.collect import collect_trace
from earlyexit.corpus.windows import IGNORE, loader
from earlyexit.evaluation.evaluator import EarlyExitEvaluator
from earlyexit.evaluation.routing import opened_shares
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.original import original_early_exit
from earlyexit.exits.policy import ExitPolicy

READY = [name for name in CRITERIA if name != "depth"]
METRICS = {
    "perplexity", "avg_exit_layer", "exit_distribution", "speedup_estimate", "total_tokens"
}  # fmt: skip


@pytest.fixture(scope="module")
def ragged(corpus) -> list:
    """Batches of 5, 5, 5 and 6 windows' remainder, with padded positions."""
    batches = list(loader(corpus.splits["fit"], 12, 5, corpus.eos_id))
    assert len(batches[-1][0]) < 5 and any((y == IGNORE).any() for _, y in batches)
    return batches


def directly(model, batches, policy) -> dict:
    """Every scored token's NLL and exit, from logits, in one sum."""
    nll, exits = [], []
    with torch.no_grad():
        for x, y in batches:
            logits, info = model(x, use_early_exit=True, policy=policy, execution="dense")
            scored = y != IGNORE
            nll.append(F.cross_entropy(logits[scored], y[scored], reduction="none"))
            exits.append(info["exit_layers"][scored])
    nll, exits = torch.cat(nll).double(), torch.cat(exits)
    executed = (exits + 1).clamp_max(model.n_layers).double().mean().item()
    return {
        "perplexity": math.exp(nll.mean()),
        "avg_exit_layer": exits.double().mean().item(),
        "exit_distribution": pytest.approx(
            [100 * (exits == k).double().mean().item() for k in range(model.n_layers + 1)]
        ),
        "speedup_estimate": model.n_layers / executed,
        "total_tokens": len(nll),
    }


def test_results_are_token_weighted_over_all_batches(make_model, ragged):
    model = make_model()
    results = EarlyExitEvaluator(model, "cpu").evaluate(ragged, [0.3, 0.6])
    assert list(results) == [0.3, 0.6]
    for threshold, found in results.items():
        assert set(found) == METRICS
        truth = directly(model, ragged, ExitPolicy.constant(threshold, 3))
        distribution = truth.pop("exit_distribution")
        assert found["exit_distribution"] == distribution
        assert {k: found[k] for k in truth} == pytest.approx(truth, rel=1e-5)
    # The controls: what the original reported is something else.
    means = [directly(model, [b], ExitPolicy.constant(0.6, 3))["perplexity"] for b in ragged]
    assert abs(sum(means) / len(means) / results[0.6]["perplexity"] - 1) > 1e-3
    assert abs(means[-1] / results[0.6]["perplexity"] - 1) > 1e-3


def test_default_thresholds_and_any_device_name(make_model, ragged):
    for device in ("auto", "cpu", torch.device("cpu")):
        evaluator = EarlyExitEvaluator(make_model(), device)
    assert list(evaluator.evaluate(ragged)) == [0.7, 0.8, 0.9, 0.95]


@pytest.mark.parametrize("criterion", READY)
def test_any_policy_in_either_execution(make_model, make_policy, ragged, criterion):
    model = make_model()
    evaluator = EarlyExitEvaluator(model, "cpu")
    policy = make_policy(model, ragged[0][0], criterion)
    compacted = evaluator.evaluate_policy(ragged, policy)
    dense = evaluator.evaluate_policy(ragged, policy, "dense")
    assert compacted["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-5)
    assert compacted["exit_distribution"] == pytest.approx(dense["exit_distribution"])


def test_full_depth_is_the_traces_last_exit(make_model, corpus, ragged):
    model = make_model()
    full = EarlyExitEvaluator(model, "cpu").evaluate_policy(ragged)
    trace = collect_trace(model, corpus.splits["fit"], corpus.eos_id)
    assert full["perplexity"] == pytest.approx(math.exp(trace.full_nll), rel=1e-5)
    assert (full["speedup_estimate"], full["avg_exit_layer"]) == (1.0, 3.0)
    assert full["total_tokens"] == trace.n_tokens


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was_found(make_model, ragged, training):
    model = make_model(confidence_threshold=0.42).train(training)
    model(ragged[0][0], use_early_exit=True)
    evaluator = EarlyExitEvaluator(model, "cpu")

    def everything():
        return (
            copy.deepcopy(dict(model.state_dict())),
            [b.clone() for b in model.buffers()],
            [m.training for m in model.modules()],
            model.confidence_threshold,
            model.get_exit_statistics(),
            next(model.parameters()).device,
        )

    before, random = everything(), torch.get_rng_state()
    evaluator.evaluate(ragged, [0.5])
    evaluator.benchmark_speedup(ragged, num_batches=2)
    for bad in ([(torch.full((1, 2), 99), torch.zeros(1, 2, dtype=torch.long))], []):
        with pytest.raises(ValueError):
            evaluator.evaluate(bad)
    after = everything()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert before[2:] == after[2:]


def test_benchmark(make_model, make_policy, ragged):
    model = make_model(confidence_threshold=0.5)
    evaluator = EarlyExitEvaluator(model, "cpu")
    result = evaluator.benchmark_speedup(ragged, num_batches=2)
    assert set(result) == {
        "time_no_exit", "time_with_exit", "actual_speedup", "theoretical_speedup",
        "avg_exit_layer", "exit_distribution",
    }  # fmt: skip
    assert result["time_no_exit"] > 0 and result["time_with_exit"] > 0
    ratio = result["time_no_exit"] / result["time_with_exit"]
    assert result["actual_speedup"] == pytest.approx(ratio)
    truth = evaluator.evaluate_policy(ragged[:2], ExitPolicy.constant(0.5, 3))
    assert result["theoretical_speedup"] == pytest.approx(truth["speedup_estimate"])
    assert result["avg_exit_layer"] == pytest.approx(truth["avg_exit_layer"])
    assert result["exit_distribution"] == pytest.approx(truth["exit_distribution"])
    first = evaluator.benchmark_speedup(ragged, 1, policy=ExitPolicy.static(0, 3))
    assert first["theoretical_speedup"] == 3


def test_the_benchmarks_baseline_runs_no_exit_head(make_model, ragged):
    model, calls = make_model(), []
    for block in model.blocks[:-1]:
        block.exit_classifier.layer_norm.register_forward_hook(lambda *_: calls.append(1))
    full = ExitPolicy.static(3, 3)
    EarlyExitEvaluator(model, "cpu").benchmark_speedup(ragged, 2, policy=full)
    assert not calls


def test_bad_input_is_refused(make_model, ragged):
    evaluator = EarlyExitEvaluator(make_model(), "cpu")
    for bad in (1.1, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="threshold"):
            evaluator.evaluate(ragged, [0.5, bad])
    unscored = [(x, torch.full_like(y, IGNORE)) for x, y in ragged]
    empty = torch.zeros(0, 12, dtype=torch.long)
    for loader_ in ([], [(empty, empty)], unscored):
        with pytest.raises(ValueError):
            evaluator.evaluate(loader_)
    for loader_ in ([], [(empty, empty)]):
        with pytest.raises(ValueError):
            evaluator.benchmark_speedup(loader_)
    with pytest.raises(ValueError, match="num_batches"):
        evaluator.benchmark_speedup(ragged, 0)


def test_a_loader_that_can_be_read_once_is_not_taken_for_an_empty_one(make_model, ragged):
    evaluator = EarlyExitEvaluator(make_model(), "cpu")
    try:
        once = evaluator.evaluate(iter(ragged), [0.5, 0.6])
    except (TypeError, ValueError) as error:
        assert "iterator" in str(error)
    else:
        assert once == evaluator.evaluate(ragged, [0.5, 0.6])


@pytest.mark.parametrize("policy", [None, ExitPolicy.constant(0.5, 3), ExitPolicy.static(1, 3)])
def test_nan_weights_are_no_result(make_model, ragged, policy):
    model = make_model()
    with torch.no_grad():
        model.blocks[0].bk_layer.mixing.contribution.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        EarlyExitEvaluator(model, "cpu").evaluate_policy(ragged, policy)


# ---------------------------------------------------------------- the original's procedure


def test_with_two_layers_the_originals_procedure_gives_our_answer(make_model, make_tokens):
    """The states differ from the second layer after an exit on; with two layers there is none."""
    model, x = make_model(n_layers=2, confidence_threshold=0.5).double(), make_tokens(5, 12)
    logits, exits = original_early_exit(model, x, 0.5)
    ours, info = model(x, use_early_exit=True)
    assert len(exits.unique()) == 3
    assert torch.equal(exits, info["exit_layers"])
    torch.testing.assert_close(logits, ours)


def test_with_more_layers_they_agree_until_an_exited_tokens_state_is_read(make_model, make_tokens):
    """Ours freezes an exited token; the original goes on computing it. A window agrees up to and
    with the first token that leaves two layers before the last or earlier."""
    model, x = make_model(n_layers=4).double(), make_tokens(40, 12)
    model.confidence_threshold = 0.7
    logits, exits = original_early_exit(model, x, 0.7)
    ours, info = model(x, use_early_exit=True)
    frozen = (exits < 2).cumsum(dim=1) - (exits < 2).long() > 0  # an early exit lies before
    assert (~frozen).any() and frozen.any()
    assert torch.equal(exits[~frozen], info["exit_layers"][~frozen])
    torch.testing.assert_close(logits[~frozen], ours[~frozen])
    assert (exits < 2).equal(info["exit_layers"] < 2)  # nothing frozen has been read by then
    assert not torch.allclose(logits, ours)


def test_the_original_stops_when_all_have_left(make_model, make_tokens):
    model, x, ran = make_model(), make_tokens(2, 5), []
    model.blocks[1].layer_norm.register_forward_hook(lambda *_: ran.append(1))
    _, exits = original_early_exit(model, x, 0.0)
    assert not exits.any() and not ran
    with torch.no_grad():
        logits, exits = original_early_exit(model, x, 1.0)
        assert (exits == 3).all() and ran
        torch.testing.assert_close(logits, model(x))


def test_a_cluster_is_opened_where_all_of_it_outweighs_every_more_frequent_word(make_model, ragged):
    """As told from the probabilities of all words."""
    model = make_model(output_head="adaptive", tie_embeddings=False)
    found = opened_shares(model, ragged)
    cuts, hits = (5, 21, model.vocab_size), torch.zeros(3, 2, 2, dtype=torch.double)
    tokens = 0
    for x, y in ragged:
        tokens += int((y != IGNORE).sum())
        for layer, block in enumerate(model.blocks):
            p = block.exit_classifier(model.hidden_states(x)[layer + 1][y != IGNORE]).exp()
            for k, (first, end) in enumerate(pairwise(cuts)):
                hits[layer, k, 0] += ((y >= first) & (y < end)).sum()
                hits[layer, k, 1] += (p[:, first:end].sum(1) > p[:, :first].amax(1)).sum()
    truth = (hits / tokens).reshape(-1, 2)
    torch.testing.assert_close(torch.tensor(found[["word", "top"]].to_numpy()), truth)
    assert (truth > 0).all() and (truth < 1).all()
    with pytest.raises(ValueError, match="clusters"):
        opened_shares(make_model(), ragged)
    with pytest.raises(ValueError, match="empty"):
        opened_shares(model, [])
