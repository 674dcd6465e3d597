"""The certificate: what it promises, what it refuses, and the audit with its known-bad control."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from earlyexit.calibration.audit import PROCEDURES, audit, synthetic_units
from earlyexit.calibration.certificate import (
    CEILING,
    Certificate,
    Refused,
    certify,
    certify_losses,
    decide,
)
from earlyexit.calibration.collect import collect_trace
from earlyexit.calibration.unit_losses import WindowLosses, window_losses
from earlyexit.exits.policy import ExitPolicy

POLICIES = [ExitPolicy.constant(t, 3, "saturation") for t in (0.99, 0.9, 0.5)]


def losses(means, n=80, spread=0.01, seed=0):
    noise = np.random.default_rng(seed).normal(0, spread, (n, 1))
    gaps = (np.asarray(means)[None] + noise) * 10
    layers = np.linspace(2.5, 1.5, len(means))
    return WindowLosses(gaps, np.full(n, 10), np.arange(n) // 2, layers, 3, "m", "d")


def test_returns_the_riskiest_accepted_policy():
    found = decide(POLICIES, losses([0.0, 0.02, 0.2]), 0.05, 0.05)
    assert found.policy == POLICIES[1] and found.accepted == 2 and found.candidates == 3
    assert found.n == 40 and found.unit == "document" and found.longest_unit == 20
    assert found.mean_gap <= found.bound <= math.log1p(0.05) < found.ceiling
    assert found.p_value <= 0.05 and found.speedup_layers == pytest.approx(3 / found.layers)
    by_window = decide(POLICIES, losses([0.0, 0.02, 0.2]), 0.05, 0.05, unit="window")
    assert by_window.n == 80


def test_stops_at_the_first_failure():
    index, p = certify_losses(losses([0.0, 0.2, 0.0]).per_unit("document"), 0.05, 0.05)
    assert index == 0 and p[2] <= 0.05


def test_refusal_says_what_would_be_needed():
    with pytest.raises(Refused, match="no test can certify less than"):
        decide(POLICIES, losses([0.1, 0.2, 0.3]), 0.05, 0.05)


def test_clipping_is_from_above_only_and_reported():
    gaps = np.full((60, 1), -0.05)
    gaps[:3] = 5.0  # three documents far over the ceiling
    found = decide(
        POLICIES[:1],
        WindowLosses(gaps, np.ones(60), np.arange(60), np.array([2.0]), 3), 0.05, 0.2,
    )  # fmt: skip
    assert found.clipped_share == pytest.approx(3 / 60)
    assert found.ceiling == pytest.approx(CEILING * math.log1p(0.05))
    assert found.mean_gap > math.log1p(0.05) > found.bound, "the clipped mean is what is certified"


@pytest.mark.parametrize(
    ("epsilon", "delta", "n", "message"),
    [(0.0, 0.05, 9, "epsilon"), (-1, 0.05, 9, "epsilon"), (0.05, 0.0, 9, "delta"),
     (0.05, 1.0, 9, "delta"), (math.nan, 0.05, 9, "epsilon"), (0.05, 0.05, 1, "units")],
)  # fmt: skip
def test_bad_risk_is_refused(epsilon, delta, n, message):
    with pytest.raises(ValueError, match=message):
        certify_losses(np.zeros((n, 2)), epsilon, delta)


def test_nan_and_tokens_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        certify_losses(np.array([[0.0], [np.nan]]), 0.05, 0.05)
    with pytest.raises(ValueError, match="document"):
        losses([0.0]).per_unit("token")


def test_file_round_trip_and_what_it_covers(tmp_path, caplog, make_model, corpus):
    model, text = make_model(), replace(corpus.splits["certify"], data_hash="d")
    measured = replace(losses([0.0, 0.02, 0.2]), model_hash=model.fingerprint())
    found = decide(POLICIES, measured, 0.05, 0.05)
    found.save(tmp_path / "c.json")
    json.loads((tmp_path / "c.json").read_text())
    loaded = Certificate.load(tmp_path / "c.json")
    assert loaded == found
    assert loaded.check(model, text) is True
    assert loaded.check(model, replace(text, data_hash="other")) is False
    assert "nothing is certified" in caplog.text
    with torch.no_grad():
        model.gates.gates[0].bias += 1e-3
    with pytest.raises(ValueError, match="certify again"):
        loaded.check(model, text)


def test_splits_keep_to_their_roles(make_model, corpus):
    model, splits = make_model(), corpus.splits
    traces = {name: collect_trace(model, splits[name], 1) for name in splits}
    call = {"epsilon": 0.05, "criterion": "saturation"}
    with pytest.raises(ValueError, match="certification part"):
        certify(model, traces["fit"], splits["test"], 1, **call)
    with pytest.raises(ValueError, match="may not propose"):
        certify(model, traces["certify"], splits["certify"], 1, **call)
    with pytest.raises(ValueError, match="test split"):
        certify(model, traces["test"], splits["certify"], 1, **call)
    with pytest.raises(ValueError, match="trace is of model"):
        certify(make_model(seed=1), traces["fit"], splits["certify"], 1, **call)


def test_gaps_are_those_of_the_real_run(make_model, corpus):
    model, split = make_model(), corpus.splits["certify"]
    policies = [ExitPolicy.static(layer, model.n_layers) for layer in (0, model.n_layers)]
    found = window_losses(model, split, 1, policies)
    assert np.abs(found.gaps[:, 1]).max() == 0, "full depth has no gap to itself"
    assert found.layers.tolist() == [1.0, float(model.n_layers)]
    assert found.tokens.sum() == split.n_tokens
    documents = found.per_unit("document")
    weights = np.bincount(np.unique(found.document, return_inverse=True)[1], found.tokens)
    assert np.average(documents[:, 0], weights=weights) == pytest.approx(found.per_token[0])
    trace = collect_trace(model, split, 1)
    gap = trace.nll[:, 0] - trace.nll[:, -1]  # leaving at exit 0 there is no propagation
    assert found.per_token[0] == pytest.approx(gap.mean(dtype=float), rel=1e-4)


def test_synthetic_risks_are_the_means():
    units, risks = synthetic_units(200_000, 0.05)
    assert units.mean(axis=0) == pytest.approx(risks, abs=4 * 0.06 / math.sqrt(200_000))
    assert (np.diff(risks) > 0).all() and risks[0] < math.log1p(0.05) < risks[-1]


@pytest.mark.parametrize("n", [30, 500, 2000])
def test_audit_passes_the_certificate_and_catches_the_control(n):
    units, risks = synthetic_units(20_000, 0.05)
    table = audit(units, risks, 0.05, 0.05, n, trials=1000, seed=n).set_index("procedure")
    good, bad = (table.loc[p] for p in PROCEDURES)
    assert good["low"] <= 0.05, "the certificate breaks its word"
    if n >= 500:
        assert bad["low"] > 0.05, "the known-bad control goes unnoticed"
