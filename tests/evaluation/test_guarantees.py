"""Tables of candidates and certificates hold the losses, certificates and refusals they are made of."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from earlyexit.calibration.audit import PROCEDURES
from earlyexit.calibration.certificate import Certificate
from earlyexit.calibration.certify import Refused, decide, propose
from earlyexit.calibration.power import ceilings, chosen_ceiling
from earlyexit.calibration.unit_losses import traced_losses, window_losses
from earlyexit.corpus.documents import CorpusConfig
from earlyexit.corpus.load import load_corpus
from earlyexit.evaluation import guarantees
from earlyexit.evaluation.evaluator import EarlyExitEvaluator

DELTA, EPSILONS = 0.3, (1e-6, 2.0)  # one that nothing can keep to, and one that is generous


@pytest.fixture(scope="module")
def certified(subject, corpus) -> SimpleNamespace:
    path = propose(subject.fit, [0.05, 0.2, 0.5], "gate")
    losses = window_losses(subject.model, corpus.splits["certify"], corpus.eos_id, path)
    table = guarantees.ceiling_table(subject.fit, path, losses, EPSILONS, DELTA)
    found = guarantees.certify_each(path, losses, table, DELTA)
    return SimpleNamespace(path=path, losses=losses, ceilings=table, found=found)


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


def test_ceilings_come_from_the_fit_part(subject, certified):
    table = certified.ceilings
    for unit, length in (("document", 0), ("window", subject.model.n_seq)):
        rows = table[(table["epsilon"] == EPSILONS[1]) & (table["unit"] == unit)]
        n = len(certified.losses.per_unit(unit))
        expected = ceilings(
            traced_losses(subject.fit, certified.path, length), EPSILONS[1], DELTA, n
        )
        assert rows["power"].tolist() == expected["power"].tolist() and (rows["n"] == n).all()
        certificate = certified.found[EPSILONS[1], unit]
        assert certificate.ceiling == chosen_ceiling(rows) * math.log1p(EPSILONS[1])


def test_each_epsilon_and_unit_is_certified_or_refused(certified):
    assert list(certified.found) == [(e, u) for e in EPSILONS for u in ("document", "window")]
    kinds = [type(found) for found in certified.found.values()]
    assert kinds == [Refused, Refused, Certificate, Certificate]
    kept = certified.found[EPSILONS[1], "document"]
    ceiling = kept.ceiling / math.log1p(EPSILONS[1])
    assert kept == decide(certified.path, certified.losses, EPSILONS[1], DELTA, ceiling)


def test_certified_policies_are_run_for_real(subject, certified, corpus):
    test = corpus.splits["test"]
    call = subject.model, subject.fit, certified.found, "gate"
    table = guarantees.certificate_table(*call, test, corpus.eos_id)
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
    alone = window_losses(subject.model, test, corpus.eos_id, [certificate.policy])
    mean = alone.per_unit("document").mean()
    assert row["test_document_loss"] == pytest.approx(math.expm1(mean))
    with pytest.raises(ValueError, match="documents cut to 16"):
        guarantees.certificate_table(*call, test.truncate(16), corpus.eos_id)


def test_where_nothing_is_certified_the_table_says_why(subject, corpus):
    refused = {(1e-9, unit): Refused(f"too few {unit}s") for unit in ("document", "window")}
    table = guarantees.certificate_table(
        subject.model, subject.fit, refused, "margin", corpus.splits["test"], corpus.eos_id
    )
    assert table["reason"].tolist()[1:] == ["too few documents", "too few windows"]
    assert table.loc[1:, "test_quality_loss"].isna().all()


@pytest.mark.slow
def test_bounds_lie_above_the_mean_and_fall_with_n():
    losses = np.random.default_rng(0).gamma(2, 0.01, (40, 3))
    table = guarantees.bound_widths(losses, 0.05, 0.05, 3.0)
    assert sorted(table["n"].unique()) == [10, 30, 40, 100, 300, 1000]
    assert (table.groupby(["method", "n"]).size() == 3).all()
    assert (table["bound"] >= table["mean"]).all()
    bound = table.groupby(["method", "n"])["bound"].mean()["betting"]
    assert bound[1000] < bound[10]
    least = guarantees.least_levels([10, 100], 0.05, 0.05, 3.0)
    assert least["level"].is_monotonic_decreasing and least["n"].tolist() == [10, 100]


def test_audits_are_run_at_the_number_of_documents_there_is():
    losses = np.random.default_rng(0).gamma(2, 0.01, (25, 4))
    table = guarantees.audits(losses, 0.05, 0.05, 3.0, trials=20)
    sizes = table.groupby("units", sort=False)["n"].unique().map(list)
    assert sizes.tolist() == [[25, 120, 500]] * 3
    assert table.groupby("units", sort=False)["group"].first().tolist() == [1, 1, 6]
    assert set(table["procedure"]) == set(PROCEDURES) and (table["trials"] == 20).all()


def test_neighbours_that_are_alike_correlate():
    rng = np.random.default_rng(0)
    alone = rng.normal(0.05, 0.01, (60, 1))
    assert guarantees.neighbours_correlation(alone, 0.05)[1] > 0.05
    r, p = guarantees.neighbours_correlation(np.repeat(alone[:20], 3, axis=0), 0.05)
    assert r > 0.4 and p < 0.01


def test_the_price_of_articles_kept_out(tmp_path):
    for name, count in (("train", 9), ("valid", 4), ("test", 2)):
        articles = [f"\n= A =\n\n{'word ' * (40 + i)}\n" for i in range(count)]
        (tmp_path / f"{name}.txt").write_text("".join(articles))
    whole, less = (
        load_corpus(CorpusConfig("wikitext-2", str(tmp_path), certify_articles=k)) for k in (0, 3)
    )
    left = [c.splits["train"].n_tokens for c in (whole, less)]
    assert guarantees.kept_out(whole) == 0
    assert guarantees.kept_out(less) == pytest.approx(1 - left[1] / left[0]) and left[1] < left[0]


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
