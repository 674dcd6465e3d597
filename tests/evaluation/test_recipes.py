"""Against a twin and a shallow model, differences are paired by document and costs are counted."""

from __future__ import annotations

import numpy as np
import pytest

from earlyexit.calibration.collect import collect_trace
from earlyexit.calibration.trace import by_document
from earlyexit.cost.parts import exit_costs
from earlyexit.evaluation.compare import fitted_policy
from earlyexit.evaluation.evaluator import EarlyExitEvaluator
from earlyexit.evaluation.recipes import against_twin, equal_cost, twin_row

EPSILON = 0.3


@pytest.fixture(scope="module")
def other(make_model, corpus):
    """A shallow model, and its trace of the test split."""
    model = make_model(seed=1, n_layers=2)
    return model, collect_trace(model, corpus.splits["test"], corpus.eos_id)


def test_every_exit_against_a_twin(subject, other):
    twin = other[1]
    table = against_twin(subject.model, subject.fit, subject.test, twin, subject.batches, EPSILON)
    assert table["exit"].tolist() == [0, 1, 2]
    np.testing.assert_allclose(table["perplexity"], subject.test.static()["perplexity"])
    row = table.iloc[0]
    policy = fitted_policy(subject.model, subject.fit, "gate", EPSILON)
    traced = subject.test.evaluate(policy)
    real = EarlyExitEvaluator(subject.model, "cpu").evaluate_policy(subject.batches, policy)
    assert row["gate_speedup_layers"] == pytest.approx(traced["speedup_layers"])
    assert row["gate_loss_own"] == pytest.approx(traced["quality_loss"])
    twin_perplexity = np.exp(twin.nll[:, -1].mean(dtype=float))
    assert row["gate_loss_twin"] == pytest.approx(traced["perplexity"] / twin_perplexity - 1)
    assert row["left_behind"] == pytest.approx(real["perplexity"] / traced["perplexity"] - 1)
    assert row["real_loss_twin"] == pytest.approx(real["perplexity"] / twin_perplexity - 1)
    gap = by_document(subject.test.nll[:, -1] - twin.nll[:, -1], twin.document).mean()
    assert row["last_vs_twin"] == pytest.approx(np.expm1(gap))
    assert twin_row(twin).to_dict("records") == [
        {"exit": 1, "perplexity": pytest.approx(twin_perplexity)}
    ]


def test_against_itself_a_model_is_neither_better_nor_worse(subject):
    table = against_twin(
        subject.model, subject.fit, subject.test, subject.test, subject.batches, 1e-12
    )
    assert table["last_vs_twin"].tolist() == [0, 0, 0]


def test_gates_are_fitted_to_the_cost_of_the_shallow_model(subject, other):
    shallow, trace = other
    row = equal_cost(subject.model, subject.fit, subject.test, shallow, trace).iloc[0]
    cost, costs = exit_costs(shallow, "depth")[-1], exit_costs(subject.model, "gate")
    assert costs[0] < cost  # so that some exit is affordable
    assert row["adaptive_cost"] < 1.1 and 1 <= row["adaptive_layers"] <= 3
    assert row["low"] <= row["difference"] <= row["high"]
    assert row["shallow_perplexity"] == pytest.approx(np.exp(trace.nll[:, -1].mean(dtype=float)))


def test_where_no_exit_is_as_cheap_the_first_stands_in(subject, make_model, corpus):
    cheap = make_model(n_layers=1, d_model=8)
    trace = collect_trace(cheap, corpus.splits["test"], corpus.eos_id)
    row = equal_cost(subject.model, subject.fit, subject.test, cheap, trace).iloc[0]
    assert row["adaptive_layers"] == 1 and row["adaptive_cost"] > 1
    first = subject.test.static()["perplexity"].iloc[0]
    assert row["adaptive_perplexity"] == pytest.approx(first)
