"""Targets of gates are compared on documents that no regression saw, at the same depth."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from earlyexit.evaluation.gate_targets import (
    IN_USE,
    cross_fitted,
    gate_inputs,
    gate_targets,
    targets,
)


def test_a_document_is_predicted_by_the_others():
    rng, document = np.random.default_rng(0), np.repeat(np.arange(4), 30)
    inputs, target = rng.standard_normal((1, 120, 3)), rng.standard_normal((120, 2))
    half = document % 2 == 0
    found = cross_fitted(inputs, target, document)
    for part in (half, ~half):
        other = LinearRegression().fit(inputs[0][part], target[part, 0]).predict(inputs[0][~part])
        np.testing.assert_allclose(found[~part, 0], np.exp(other), rtol=1e-5)
    assert np.isposinf(found[:, 1]).all()  # nothing is left to gain after the last layer
    with pytest.raises(ValueError, match="two or more"):
        cross_fitted(inputs, target, np.zeros(120))


def test_inputs_are_in_the_order_of_the_trace(subject, corpus):
    inputs = gate_inputs(subject.model, corpus.splits["fit"], corpus.eos_id, batch_size=5)
    for layer, normal in enumerate(inputs):
        gate = subject.model.gates.gates[layer]
        kl = np.exp(normal @ gate.weight[0].detach().numpy() + gate.bias[0].item())
        np.testing.assert_allclose(kl, subject.fit.scores["gate"][:, layer], rtol=1e-3)


def test_a_target_that_tells_the_future_wins_at_equal_depth(subject):
    trace = subject.fit
    known = targets(trace)["NLL to gain"]
    told = known[:, :-1].T[..., None]  # states that hold what deeper layers gain
    depths = [1.5, 2.0]
    table = gate_targets(told, trace, depths)
    gain = table[table["signal"] == "linear gate: NLL to gain"]
    used = table[table["signal"] == f"linear gate: {IN_USE}"].set_index("layers")
    assert (used[["difference", "low", "high"]] == 0).all(axis=None)
    others = table.groupby("layers")["quality_loss"]
    assert (gain.set_index("layers")["quality_loss"] <= others.min() + 1e-9).all()
    assert (gain["difference"] < 0).all()
    static = trace.static().set_index("layers")["quality_loss"]
    assert table[table["layers"] == 2.0]["quality_loss"].max() <= static[2.0] + 1e-9


def test_a_layer_s_constant_changes_no_thresholds_of_its_own(subject, corpus):
    inputs = gate_inputs(subject.model, corpus.splits["fit"], corpus.eos_id)
    table = gate_targets(inputs, subject.fit, [1.7]).set_index("signal")["quality_loss"]
    gain = table["linear gate: NLL to gain"]
    assert table["linear gate: NLL to gain per layer"] == pytest.approx(gain, abs=1e-6)
