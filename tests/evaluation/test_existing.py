"""The answer about an existing model: exits counted by hand, and what the sentence says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from earlyexit.calibration.certify import Refused
from earlyexit.evaluation.compare import fitted
from earlyexit.evaluation.existing import (
    CERTIFIED,
    CLOSE,
    FITTED,
    STATIC,
    candidates_of,
    existing_exits,
    existing_policies,
    policy_times,
    verdict,
)

EPSILONS = [0.05, 0.3]


def test_exits_that_say_the_same_are_counted(subject):
    trace, table = subject.test, existing_exits(subject.test, stage_layers=4)
    assert table["model_layers"].tolist() == [4, 8, 12]
    for layer in range(3):
        near = [bool(kl[layer] <= CLOSE) for kl in trace.kl]
        so_far = [bool((kl[: layer + 1] <= CLOSE).any()) for kl in trace.kl]
        assert table["close"][layer] == pytest.approx(np.mean(near))
        assert table["close_so_far"][layer] == pytest.approx(np.mean(so_far))
    assert table["close_so_far"].iloc[-1] == 1 and table["kl"].iloc[-1] == 0


def test_policies_run_for_real_beside_hindsight_and_chance(subject):
    certificates = dict.fromkeys(EPSILONS, Refused("too few documents"))
    found = candidates_of(subject.model, subject.fit, certificates)
    assert CERTIFIED not in {c.criterion for c in found}
    gates = fitted(subject.model, subject.fit, ["gate"], EPSILONS)
    assert [c.policy for c in found if c.criterion == FITTED] == [c.policy for c in gates]
    static = subject.fit.static().set_index("exit_layer")["quality_loss"]
    for candidate in found:
        if candidate.criterion == STATIC:
            layer = candidate.policy.thresholds[0]
            assert static[layer] <= candidate.value
    twice = [*found, *found]  # equal policies have equal rows, run once
    table = existing_policies(subject.model, subject.test, twice, EPSILONS, subject.batches)
    real = table[table["criterion"].isin([FITTED, STATIC])].reset_index(drop=True)
    half = len(real) // 2
    pd.testing.assert_frame_equal(real[:half], real[half:].reset_index(drop=True))
    for row, candidate in zip(real[:half].itertuples(), found, strict=True):
        promised = subject.test.evaluate(candidate.policy)["quality_loss"]
        assert (row.criterion, row.epsilon) == (candidate.criterion, candidate.value)
        assert row.trace_loss == pytest.approx(promised)
    times = policy_times(subject.model, found, subject.batch, 2)
    assert times["criterion"].tolist() == [c.criterion for c in found]
    assert (times["speedup_time_low"] <= times["speedup_time"]).all()
    hindsight = table[table["criterion"] == "oracle (kl)"]
    assert (hindsight["trace_loss"] == hindsight["quality_loss"]).all() and len(hindsight) == 2


@pytest.mark.parametrize(
    ("low", "high", "tokens", "said"),
    [
        (1.1, 1.3, 200_000, "early exit pays here"),
        (0.7, 0.9, 200_000, "early exit costs time here"),
        (0.9, 1.1, 200_000, "cannot be told from full depth by the clock"),
        (1.1, 1.3, 2_000, "fitted on 2,000 tokens, fewer than the 100,000"),
    ],
)
def test_the_sentence_follows_from_the_table(low, high, tokens, said):
    row = {"criterion": CERTIFIED, "epsilon": 0.05, "quality_loss": 0.031, "speedup_layers": 1.4}
    row |= {"speedup_flops": 1.2, "speedup_time": (low + high) / 2}
    row |= {"speedup_time_low": low, "speedup_time_high": high}
    top = {"criterion": "oracle (kl)", "epsilon": 0.05, "speedup_layers": 1.9}
    sentence = verdict(pd.DataFrame([row, top]), 0.05, tokens)
    assert said in sentence and "1.40× in layers" in sentence and "+3.1%" in sentence
    assert "would save 1.90× in layers" in sentence
    assert ("fewer than" in sentence) == (tokens < 100_000)
    nothing = verdict(pd.DataFrame([top]), 0.05, tokens)
    assert nothing.startswith("Nothing can be certified at 5%") and "1.90×" in nothing
