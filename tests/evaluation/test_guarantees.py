"""Tables of candidates and certificates hold the losses, certificates and refusals they are made of."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from earlyexit.calibration.audit import PROCEDURES
from earlyexit.calibration.certificate import CEILING, Certificate, Refused, decide, propose
from earlyexit.calibration.unit_losses import window_losses
from earlyexit.evaluation import guarantees
from earlyexit.evaluation.evaluator import EarlyExitEvaluator

DELTA, EPSILONS = 0.3, (1e-6, 2.0)  # one that nothing can keep to, and one that is generous


@pytest.fixture(scope="module")
def certified(subject, corpus) -> SimpleNamespace:
    path = propose(subject.fit, [0.05, 0.2, 0.5], "gate")
    losses = window_losses(subject.model, corpus.splits["certify"], corpus.eos_id, path)
    found = guarantees.certify_each(path, losses, EPSILONS, DELTA)
    return SimpleNamespace(path=path, losses=losses, found=found)


def test_losses_of_the_candidates(subject, certified):
    table = guarantees.candidate_table(subject.fit, certified.path, certified.losses)
    assert len(table) == 2 * len(certified.path)
    for unit, rows in table.groupby("unit"):
        gaps = certified.losses.per_unit(unit)
        assert rows["n"].unique() == [len(gaps)]
        np.testing.assert_allclose(rows["mean_gap"], gaps.mean(axis=0))
        np.testing.assert_allclose(rows["worst_gap"], gaps.max(axis=0))
        np.testing.assert_allclose(rows["layers"], certified.losses.layers)
    first = subject.fit.evaluate(certified.path[0])["quality_loss"]
    assert table["fit_quality_loss"].iloc[0] == pytest.approx(first)


def test_each_epsilon_and_unit_is_certified_or_refused(certified):
    assert list(certified.found) == [(e, u) for e in EPSILONS for u in ("document", "window")]
    kinds = [type(found) for found in certified.found.values()]
    assert kinds == [Refused, Refused, Certificate, Certificate]
    again = decide(certified.path, certified.losses, EPSILONS[1], DELTA, "document")
    assert certified.found[EPSILONS[1], "document"] == again


def test_certified_policies_are_run_for_real(subject, certified):
    table = guarantees.certificate_table(
        subject.model, subject.fit, certified.found, "gate", subject.batches
    )
    assert list(table["policy"].iloc[:3]) == [
        "fitted, no certificate", "certified by document", "certified by window"
    ]  # fmt: skip
    refused = table[table["reason"].notna()]
    assert refused["test_quality_loss"].isna().all() and (refused["epsilon"] == EPSILONS[0]).all()
    row = table[(table["policy"] == "certified by document")].iloc[-1]
    certificate = certified.found[EPSILONS[1], "document"]
    assert row["n"] == certificate.n and row["bound"] == certificate.bound
    assert row["level"] == math.log1p(EPSILONS[1])
    evaluator = EarlyExitEvaluator(subject.model, "cpu")
    real, full = (evaluator.evaluate_policy(subject.batches, p) for p in (certificate.policy, None))
    loss = real["perplexity"] / full["perplexity"] - 1
    assert row["test_quality_loss"] == pytest.approx(loss)
    assert row["test_speedup_layers"] == pytest.approx(real["speedup_estimate"])


@pytest.mark.slow
def test_bounds_lie_above_the_mean_and_fall_with_n():
    losses = np.random.default_rng(0).gamma(2, 0.01, (40, 3))
    table = guarantees.bound_widths(losses, 0.05, 0.05)
    assert sorted(table["n"].unique()) == [10, 30, 40, 100, 300, 1000]
    assert (table.groupby(["method", "n"]).size() == 3).all()
    assert (table["bound"] >= table["mean"]).all()
    bound = table.groupby(["method", "n"])["bound"].mean()["betting"]
    assert bound[1000] < bound[10]
    least = guarantees.least_levels([10, 100], 0.05, 0.05)
    assert least["level"].is_monotonic_decreasing and least["n"].tolist() == [10, 100]


def test_audits_of_synthetic_and_of_real_units(monkeypatch):
    monkeypatch.setattr(guarantees, "SYNTHETIC_SIZES", (30,))
    losses = np.minimum(np.random.default_rng(0).gamma(2, 0.01, (25, 4)), CEILING * 0.05)
    table = guarantees.audits(losses, 0.05, 0.05, trials=20, real_trials=10)
    sizes = table.groupby("units", sort=False)["n"].unique().map(list).to_dict()
    assert sizes == {"synthetic units": [30], "documents, resampled": [25, 50]}
    assert table.groupby("units")["trials"].first().tolist() == [10, 20]
    assert set(table["procedure"]) == set(PROCEDURES)


def test_on_another_text_nothing_is_certified(subject, certified, corpus, caplog):
    certificate = certified.found[EPSILONS[1], "document"]
    other = corpus.splits["test"]
    table = guarantees.transfer(subject.model, {EPSILONS[1]: certificate}, other, corpus.eos_id)
    alone = window_losses(subject.model, other, corpus.eos_id, [certificate.policy])
    row = table.iloc[0]
    assert row["epsilon"] == EPSILONS[1]
    assert row["covered"] == (other.data_hash == certificate.data_hash)
    assert row["quality_loss"] == pytest.approx(math.expm1(alone.per_token[0]))
    assert row["speedup_layers"] == pytest.approx(3 / alone.layers[0])
