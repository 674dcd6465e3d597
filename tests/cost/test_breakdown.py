"""The clock books every interval once, in every way of running; parts are timed on what they read."""

from __future__ import annotations

import time

import pytest
import torch

from earlyexit.cost.breakdown import ORIGINAL, execution_runs, part_times, run_times
from earlyexit.cost.parts import FULL_DEPTH
from earlyexit.exits.clock import PARTS, marker, timed_parts
from earlyexit.exits.criteria import CRITERIA

CPU = torch.device("cpu")


def test_parts_add_up_and_unclaimed_time_is_the_rest():
    with timed_parts(CPU) as clock:
        mark = marker()
        time.sleep(0.004)
        mark("blocks")
        time.sleep(0.004)
        mark("blocks", "propagation", 0.25)
        time.sleep(0.002)
    assert sum(clock.seconds.values()) == pytest.approx(clock.total)
    assert clock.seconds["propagation"] >= 0.003
    assert clock.seconds["blocks"] >= 0.005
    assert clock.seconds["rest"] >= 0.002
    assert clock.seconds["check"] == clock.seconds["head"] == 0


def test_no_clock_runs_outside_and_after_an_error():
    with pytest.raises(ZeroDivisionError), timed_parts(CPU) as clock:
        marker()("head")
        raise ZeroDivisionError
    before = dict(clock.seconds)
    marker()("head")
    assert clock.seconds == before


@pytest.mark.parametrize("exit_head", ["translator", "full"])
def test_every_way_of_running_is_accounted_for(make_model, make_tokens, make_policy, exit_head):
    model, x = make_model(exit_head=exit_head), make_tokens(6, 12)
    policy = make_policy(model, x, "gate")
    runs = execution_runs(model, x, x, policy, model, threshold=0.5)
    table = run_times(runs, CPU, repeats=3)
    assert len(table) == len(runs) * len(PARTS)
    assert (table["milliseconds"] >= 0).all() and (table["total_ms"] > 0).all()
    for name, rows in table.groupby("run"):
        parts = rows.set_index("part")["milliseconds"]
        assert parts.sum() == pytest.approx(rows["sum_ms"].iloc[0])
        assert (parts[["blocks", "head", "rest"]] > 0).all(), name
        extra = parts[["check", "propagation", "gather/scatter"]]
        if name == FULL_DEPTH:
            assert (extra == 0).all()
        elif name == "compacted":
            assert (extra > 0).all()
        else:  # nobody leaves, so nothing is propagated
            assert extra["propagation"] == 0 and (extra.drop("propagation") > 0).all()
    assert ORIGINAL in set(table["run"])


def test_a_clock_does_not_change_the_answer(make_model, make_tokens, make_policy):
    model, x = make_model(), make_tokens(6, 12)
    policy = make_policy(model, x, "max_probability")
    plain = model.nll(x, x, policy)
    with timed_parts(CPU):
        clocked = model.nll(x, x, policy)
    assert all(torch.equal(a, b) for a, b in zip(plain, clocked, strict=True))


@pytest.mark.parametrize("change", [{}, {"gate_hidden": None}])
def test_each_part_is_timed_against_the_whole_block(make_model, make_tokens, change):
    table = part_times(make_model(**change), make_tokens(4, 12), repeats=2)
    assert (table["milliseconds"] > 0).all()
    whole = table[table["group"] == "whole"].iloc[0]
    assert whole["share_of_block"] == 1
    checks = set(table[table["group"] == "check"]["part"])
    gates = {CRITERIA["gate"].label, CRITERIA["agreement"].label}
    assert (gates <= checks) == (change == {})
    assert CRITERIA["max_probability"].label in checks
