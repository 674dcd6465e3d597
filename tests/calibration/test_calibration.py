"""Calibration on cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from earlyexit.calibration.collect import collect_trace
from earlyexit.calibration.temperature import (
    calibration_errors,
    fit_temperatures,
    refuse_test,
    reliability,
)
from earlyexit.calibration.trace import ExitTrace
from earlyexit.corpus.splits import Split
from earlyexit.corpus.windows import IGNORE, loader


def trace_of(confidence: list, correct: list) -> ExitTrace:
    """A trace of one exit per column, ``confidence`` and ``correct`` being ``(T, L)``."""
    confidence, correct = np.array(confidence, np.float32), np.array(correct)
    tokens = np.arange(len(confidence), dtype=np.int32)
    return ExitTrace(
        split="fit",
        document=tokens,
        position=tokens,
        target=tokens,
        nll=np.ones_like(confidence),
        kl=np.zeros_like(confidence),
        prediction=np.where(correct, tokens[:, None], -1),
        scores={"max_probability": confidence},
        n_seq=16,
    )


def test_reliability_of_hand_made_tokens():
    trace = trace_of(
        [[0.1, 1.0], [0.15, 1.0], [0.5, 0.0], [0.95, 0.5], [1.0, 0.5]],
        [[0, 1], [1, 1], [1, 0], [1, 0], [0, 1]],
    )
    table = reliability(trace, n_bins=4)
    first = table[table.exit == 0].set_index("bin")
    assert first.index.tolist() == [0.125, 0.625, 0.875]  # 1/2 opens the third bin
    assert first.confidence.tolist() == pytest.approx([0.125, 0.5, 0.975])
    assert first.accuracy.tolist() == [0.5, 1.0, 0.5]
    assert first.share.tolist() == pytest.approx([0.4, 0.2, 0.4])
    second = table[table.exit == 1].set_index("bin")
    assert second.confidence.tolist() == [0.0, 0.5, 1.0]
    assert second.accuracy.tolist() == [0.0, 0.5, 1.0]
    errors = calibration_errors(trace, n_bins=4)
    expected = 0.4 * abs(0.5 - 0.125) + 0.2 * abs(1 - 0.5) + 0.4 * abs(0.5 - 0.975)
    assert errors.ece.tolist() == pytest.approx([expected, 0.0], abs=1e-6)
    assert errors.accuracy.tolist() == pytest.approx([0.6, 0.6])
    assert errors.confidence.tolist() == pytest.approx([0.54, 0.6])


def test_the_error_is_what_the_reliability_diagram_shows():
    rng = np.random.default_rng(0)
    confidence = rng.random((500, 3))
    trace = trace_of(confidence, rng.random((500, 3)) < confidence**2)
    diagram = reliability(trace)
    gap = diagram.share * (diagram.confidence - diagram.accuracy).abs()
    errors = calibration_errors(trace)
    assert errors.ece.tolist() == pytest.approx(gap.groupby(diagram.exit).sum().tolist(), abs=1e-5)
    assert diagram.groupby("exit").share.sum().tolist() == pytest.approx([1, 1, 1])
    assert (errors.ece > 0.1).all()  # a calibrated one is the control
    honest = trace_of(confidence, rng.random((500, 3)) < confidence)
    assert (calibration_errors(honest).ece < 0.09).all()


def test_rounding_above_one_is_still_a_confidence():
    trace = trace_of([[np.nextafter(np.float32(1), np.float32(2))]], [[1]])
    assert reliability(trace).confidence.item() == 1.0


@pytest.fixture(scope="module")
def sampled(make_model):
    """A model, and text drawn from its own predictions: it is calibrated by construction."""
    model = make_model(tie_embeddings=False)
    start = torch.ones(1500, 1, dtype=torch.long)  # <eos>
    ids, _ = model.generate(start, 12, temperature=1.0, generator=torch.manual_seed(0))
    text = ids[:, 1:].flatten().numpy().astype(np.int32)
    document = np.repeat(np.arange(1500, dtype=np.int32), 12)
    return model, Split("fit", text, document, np.ones_like(text))


@pytest.mark.parametrize("scale", [1.0, 0.4, 3.0])
def test_a_known_temperature_is_recovered(make_model, sampled, scale):
    calibrated, split = sampled
    model = make_model(tie_embeddings=False)
    with torch.no_grad():
        model.blocks[-1].exit_classifier.linear.weight.mul_(scale)
        model.blocks[-1].exit_classifier.linear.bias.mul_(scale)
    temperatures = fit_temperatures(model, split, 1)
    assert len(temperatures) == 3
    assert temperatures[-1] == pytest.approx(scale, rel=0.04)
    before = collect_trace(model, split, 1)
    after = collect_trace(model, split, 1, temperatures=temperatures)
    truth = collect_trace(calibrated, split, 1)
    assert after.full_nll == pytest.approx(truth.full_nll, abs=2e-3)
    assert (after.nll.mean(0) <= before.nll.mean(0) + 1e-5).all()
    assert calibration_errors(after).ece.iloc[-1] < 0.03
    if scale != 1:
        assert calibration_errors(before).ece.iloc[-1] > 0.05


def test_each_temperature_minimises_its_exits_nll(sampled):
    model, split = sampled
    found = fit_temperatures(model, split, 1, precision=1e-6)
    ((x, y),) = loader(split, 12, 10**6, 1)
    with torch.no_grad():
        states = model.hidden_states(x)
    for layer, block in enumerate(model.blocks):
        with torch.no_grad():
            logits = block.exit_classifier(states[layer + 1]).flatten(0, 1).double()

        def nll(log_t, logits=logits):
            return torch.nn.functional.cross_entropy(
                logits / np.exp(log_t), y.flatten(), ignore_index=IGNORE
            ).item()

        best = np.exp(minimize_scalar(nll, bounds=(-4, 4), method="bounded").x)
        assert found[layer] == pytest.approx(best, rel=2e-3)


def test_fitting_uses_a_part_of_the_tokens_if_told(sampled):
    model, split = sampled
    few = fit_temperatures(model, split, 1, max_tokens=500)
    assert few != fit_temperatures(model, split, 1)
    assert few == fit_temperatures(model, split, 1, max_tokens=500)


def test_the_test_split_is_refused(sampled):
    model, split = sampled
    with pytest.raises(ValueError, match="test split"):
        fit_temperatures(model, Split("test", split.ids, split.document, split.characters), 1)
    refuse_test("fit")
    with pytest.raises(ValueError, match="test split"):
        refuse_test("test")
