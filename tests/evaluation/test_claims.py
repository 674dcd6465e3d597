"""The original's rows beside what the evaluator measures at the same thresholds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from earlyexit.evaluation.claims import (
    COMBINED,
    FROZEN,
    claimed_test_rows,
    claims_and_certificates,
    measured_claims,
    verdicts,
)
from earlyexit.evaluation.compare import compare, original_thresholds
from earlyexit.evaluation.evaluator import EarlyExitEvaluator
from earlyexit.runs.parameters import Guarantees


def test_every_claimed_loss_that_a_certificate_can_have_is_tried():
    claimed = claimed_test_rows()["quality_loss"]
    assert set(claimed[claimed > 0]) <= set(Guarantees().epsilons)


def test_claimed_and_measured(subject):
    claims = claimed_test_rows()
    table = measured_claims(subject.model, subject.batches)
    assert table["threshold"].tolist() == claims["threshold"].tolist()
    assert table["claimed_speedup"].tolist() == claims["speedup"].tolist()
    evaluator = EarlyExitEvaluator(subject.model, "cpu")
    full = evaluator.evaluate_policy(subject.batches)["perplexity"]
    found = evaluator.evaluate(subject.batches, claims["threshold"])
    for row in table.itertuples():
        measured = found[row.threshold]
        assert row.measured_speedup_layers == pytest.approx(measured["speedup_estimate"])
        assert row.measured_quality_loss == pytest.approx(measured["perplexity"] / full - 1)
        early = sum(measured["exit_distribution"][:2]) / 100
        assert row.exited_early == pytest.approx(early)


def test_the_best_certificate_within_each_claim(subject):
    claims = claimed_test_rows()
    candidates = original_thresholds(claims["threshold"], 3)
    loaders = dict.fromkeys(("max_probability", "depth"), subject.batches)
    front = compare(subject.model, candidates, loaders, subject.batch, 2)
    largest = claims["quality_loss"].max()
    certificates = pd.DataFrame(
        {
            "policy": ["certified by document"] * 3 + ["certified by window"],
            "epsilon": [largest / 2, largest, 9.0, largest],
            "test_speedup_layers": [1.1, 1.2, 1.9, 1.8],
            "test_quality_loss": [0.01, 0.02, 0.9, 0.8],
        }
    )
    table = claims_and_certificates(front, certificates).set_index("threshold")
    for claim in claims.itertuples():
        row, measured = (
            table.loc[claim.threshold],
            front.set_index("threshold").loc[claim.threshold],
        )
        assert row["claimed_loss"] == claim.quality_loss
        for name in ("speedup_layers", "speedup_flops", "speedup_time", "speedup_time_high"):
            assert row[f"measured_{name}"] == measured[name]
        assert row["measured_loss"] == measured["quality_loss"]
        within = [e for e in (largest / 2, largest) if e <= claim.quality_loss + 1e-9]
        best = max(within, default=np.nan)
        assert row["certified_epsilon"] == pytest.approx(best, nan_ok=True)
    assert table["certified_speedup_layers"].max() == 1.2
    none = claims_and_certificates(front, certificates.iloc[:0])
    assert none["certified_epsilon"].isna().all()


def test_every_promise_is_settled_by_one_number():
    """All are kept, then all but one that counting refutes, and one that merely fails."""
    parts = ["head norm", "unembedding", "softmax"]
    products = {
        "several scales": 5.0, "sparse BK-Core": 2.0, "exits": 3.0, "scales + exits (measured)": 9.0,
        "sparse + exits (measured)": 4.0,
    }  # fmt: skip
    products = pd.DataFrame({"claim": products.keys(), "total time": products.values()})
    tables = {
        "costs": pd.DataFrame({"part": parts, "share_of_block": [0.002, 0.002, 0.001]}),
        "recipes": pd.DataFrame(
            {"recipe": ["frozen"], "gate_speedup_layers": [2.5], "real_loss_twin": [0.049]}
        ),
        "part_times": pd.DataFrame({"part": ["maximum probability"], "share_of_block": [0.009]}),
        "end_to_end": pd.DataFrame({"speedup_time": [1.8], "speedup_layers": [2.0]}),
        "memory_peaks": pd.DataFrame(
            {
                "output": ["scored in chunks"] * 2,
                "execution": ["full depth", "compacted"],
                "peak_mib": [10.0, 6.0],
            }
        ),
        "claimed_products": products.assign(positions=9.0),
        "sparse_limits": pd.DataFrame({"at_most": [2.0]}),
    }
    front = pd.DataFrame(
        {
            "criterion": ["gate", "gate", "static"],
            "epsilon": [0.05, 0.2, np.nan],
            "quality_loss": [0.05, 0.2, 0.1],
            "speedup_time": [2.1, 4, 2],
            "exit_layer": [np.nan, np.nan, 1],
        }
    )
    table = verdicts(tables, front)
    assert len(table) == 11 and set(table["verdict"]) == {"held"}
    tables["part_times"]["share_of_block"] = 0.4
    tables["costs"]["share_of_block"] = 0.3
    late = front.assign(quality_loss=[0.06, 0.2, 0.1])  # the policy fitted to 5 % loses too much
    table = verdicts(tables, late).set_index("claim")["verdict"]
    assert table["exit check / layer"] == table["confidence / layer"] == "cannot hold"
    assert table["time, within 5%"] == "not held"
    assert (table == "held").sum() == 8
    open_yet = verdicts(tables, late, combinations_settle=False).set_index("claim")["verdict"]
    assert (open_yet[list(COMBINED)] == "not settled").all() and (open_yet == "held").sum() == 3
    tables["recipes"]["real_loss_twin"] = 0.051  # as fast as promised, but at a larger loss
    assert verdicts(tables, late).set_index("claim")["verdict"][FROZEN] == "not held"
    tables["claimed_products"]["positions"] = 2.0  # three layers and a half of the positions: 6 < 8
    broken = verdicts(tables, late.assign(speedup_time=1.0)).set_index("claim")
    assert broken.loc["scales + exits", "best_possible"] == 6
    tables["recipes"] = tables["recipes"].iloc[:0]
    table = verdicts(tables, front.iloc[:0]).set_index("claim")["verdict"]
    assert (table == "not measured").sum() == 2
