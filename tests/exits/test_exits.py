"""Criteria against their formulas, and policies that say the same on a trace, in a run and on disk."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit.exits.criteria import CRITERIA, ExitState
from earlyexit.exits.policy import ExitPolicy, check_threshold

NAIVE = {
    "max_probability": lambda p: max(p),
    "margin": lambda p: sorted(p)[-1] - sorted(p)[-2],
    "entropy": lambda p: -sum(q * math.log(q) for q in p if q > 0) / math.log(len(p)),
}
logit_rows = st.lists(
    st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4), min_size=1, max_size=5
)


def probabilities(row) -> list[float]:
    weights = [math.exp(z - max(row)) for z in row]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize("name", NAIVE)
@settings(max_examples=50, deadline=None)
@given(rows=logit_rows)
def test_logit_criteria_are_their_formulas(name, rows):
    rule = CRITERIA[name]
    found = rule.score(torch.tensor(rows, dtype=torch.float64)).tolist()
    assert found == pytest.approx([NAIVE[name](probabilities(r)) for r in rows], abs=1e-9)
    low, high = rule.bounds
    assert all(low - 1e-9 <= score <= high + 1e-9 for score in found)


def test_every_logit_criterion_has_a_formula_here():
    scores = {c.name for c in CRITERIA.values() if c.reads == "logits" and not c.streak}
    assert set(NAIVE) == scores


def test_extreme_logits_give_numbers():
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e30, 0.0, 0.0]])
    for name in NAIVE:
        score = CRITERIA[name].score(logits)
        assert torch.isfinite(score).all()
        sure, clueless, _ = score.tolist()
        assert sure == pytest.approx(1.0 if CRITERIA[name].exit_above else 0.0, abs=1e-6)
        assert clueless == pytest.approx(
            {"max_probability": 1 / 3, "margin": 0, "entropy": 1}[name]
        )


def test_state_criteria_are_their_formulas():
    torch.manual_seed(0)
    state = ExitState(2, torch.randn(5, 8), torch.randn(5, 8))
    truth = [
        sum(a * b) / (sum(a * a) * sum(b * b)) ** 0.5
        for a, b in zip(state.hidden.tolist(), state.previous.tolist(), strict=True)
        for a, b in [(np.array(a), np.array(b))]
    ]
    np.testing.assert_allclose(CRITERIA["saturation"].score(state), truth, rtol=1e-5)
    assert CRITERIA["depth"].score(state).tolist() == [2] * 5


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(CRITERIA)), st.integers(1, 6), st.data())
def test_a_token_leaves_at_the_first_layer_that_passes(name, layers, data):
    rule = CRITERIA[name]
    low, high = rule.bounds[0], min(rule.bounds[1], layers)
    values = st.floats(low, high, width=32) | st.sampled_from([low, high])
    thresholds = data.draw(st.lists(values | st.just(rule.never), min_size=layers, max_size=layers))
    scores = data.draw(
        st.lists(st.lists(values, min_size=layers, max_size=layers), min_size=1, max_size=8)
    )
    policy = ExitPolicy(name, tuple(thresholds))
    truth = []
    for row in scores:
        passing = [
            layer
            for layer, (score, threshold) in enumerate(zip(row, thresholds, strict=True))
            if (score >= threshold if rule.exit_above else score <= threshold)
        ]
        truth.append(min(passing, default=layers))
    found = policy.exit_layers(np.array(scores, np.float32))
    assert found.tolist() == truth
    never = ExitPolicy.constant(rule.never, layers, name)
    assert (never.exit_layers(np.array(scores, np.float32)) == layers).all()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(CRITERIA)), st.data())
def test_a_policy_survives_its_file(tmp_path_factory, name, data):
    rule = CRITERIA[name]
    values = st.floats(*(max(-5, min(5, b)) for b in rule.bounds)) | st.just(rule.never)
    decay = data.draw(st.floats(0, 1e9) | st.integers(0, 9)) if rule.may_decay else 0
    policy = ExitPolicy(name, tuple(data.draw(st.lists(values, min_size=1, max_size=5))), decay)
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    policy.save(path)
    assert ExitPolicy.load(path) == policy
    json.loads(path.read_text(), parse_constant=lambda s: pytest.fail(f"{s} is not JSON"))


WRONG = (
    "x",
    "",
    "0.5",
    -3,
    1e9,
    10**400,
    math.nan,
    math.inf,
    None,
    True,
    [],
    {},
    ["0.5"],
    [True],
    [[]],
)


@pytest.mark.parametrize("value", WRONG, ids=lambda value: f"{value!r:.9}")
@pytest.mark.parametrize("field", ["criterion", "thresholds", "decay"])
def test_a_wrong_field_in_a_file_is_refused_in_one_line(tmp_path, field, value):
    document = ExitPolicy("margin", (0.5, 0.25)).to_dict() | {field: value}
    if (field, value) == ("decay", 1e9):
        assert ExitPolicy.from_dict(document).decay == value
        return
    (tmp_path / "p.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"p\.json: ") as refused:
        ExitPolicy.load(tmp_path / "p.json")
    assert "\n" not in str(refused.value)


def test_what_is_no_policy_is_refused(tmp_path):
    document = ExitPolicy("margin", (0.5, 0.25)).to_dict()
    for name in document:
        with pytest.raises(ValueError, match=f"missing: {name}$"):
            ExitPolicy.from_dict({k: v for k, v in document.items() if k != name})
    with pytest.raises(ValueError, match=r"unknown: layers$"):
        ExitPolicy.from_dict(document | {"layers": 2})
    for other in (None, 3, [], "policy"):
        with pytest.raises(ValueError, match="is not a JSON object"):
            ExitPolicy.from_dict(other)
    for text in ("", "{", "[" * 100_000, "\ufeff{}"):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(ValueError, match=r"p\.json: "):
            ExitPolicy.load(tmp_path / "p.json")


def test_a_threshold_that_json_cannot_hold_is_refused_when_saved(tmp_path):
    always = ExitPolicy.constant(math.inf, 2, "gate")  # null would read back as never
    with pytest.raises(ValueError, match="threshold inf of 'gate' cannot be saved"):
        always.save(tmp_path / "p.json")
    assert not list(tmp_path.iterdir())


def test_static_policies_name_their_layer():
    depth = np.broadcast_to(np.arange(4.0), (3, 4))
    for layer in range(5):
        assert (ExitPolicy.static(layer, 4).exit_layers(depth) == layer).all()


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_thresholds_are_checked_in_the_criterions_own_units(name):
    rule = CRITERIA[name]
    low, high = rule.bounds
    bad = [math.nan, low - 0.01, -rule.never]
    if math.isfinite(high):
        bad.append(high + 0.01)
    for threshold in bad:
        if low <= threshold <= high:  # without an upper bound, infinity is within
            continue
        with pytest.raises(ValueError, match="threshold"):
            check_threshold(threshold, rule)
        with pytest.raises(ValueError, match="threshold"):
            ExitPolicy(name, (low, threshold))
    assert check_threshold(low, rule) == low
    assert ExitPolicy(name, (low, rule.never)).thresholds[1] == rule.never


def test_impossible_policies_are_refused(tmp_path):
    with pytest.raises(ValueError, match="criterion"):
        ExitPolicy("intuition", (0.5,))
    with pytest.raises(ValueError, match="threshold"):
        ExitPolicy("entropy", ())
    for decay in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="decay"):
            ExitPolicy("margin", (0.5,), decay)
    with pytest.raises(ValueError, match="decay"):
        ExitPolicy("entropy", (0.5,), 1.0)  # a falling threshold would not make exits likelier
    for text in (
        '{"criterion": "intuition", "thresholds": [0.5], "decay": 0.0}',
        '{"criterion": "entropy", "thresholds": [0.5]}',
        '{"criterion": "entropy", "thresholds": [1.5], "decay": 0.0}',
        '{"criterion": "entropy"',
    ):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(ValueError):
            ExitPolicy.load(tmp_path / "p.json")
