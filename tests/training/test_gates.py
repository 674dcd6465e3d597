"""Gates: they learn what they are told to predict, see no vocabulary, and never the test split."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import PoissonRegressor

from earlyexit.calibration.collect import collect_trace
from earlyexit.exits.policy import ExitPolicy
from earlyexit.training.gates import gate_data, train_gates


def test_targets_are_the_trace_s(make_model, corpus):
    model, split = make_model(), corpus.splits["train"]
    normal, kl, agree = gate_data(model, split, 1, split.n_tokens)
    trace = collect_trace(model, split, 1)
    assert kl.shape == agree.shape == normal.shape[:2] == (model.n_layers - 1, split.n_tokens)
    for layer in range(model.n_layers - 1):  # shuffled windows: compare what order does not change
        assert kl[layer].sort().values.numpy() == pytest.approx(
            np.sort(trace.kl[:, layer]), abs=1e-4
        )
        assert agree[layer].mean() == pytest.approx(trace.agreement[:, layer].mean())


def test_a_linear_gate_is_poisson_regression_and_leaves_the_rest_alone(make_model, corpus):
    model, split = make_model(), corpus.splits["train"]
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("gates")}
    report = train_gates(model, split, corpus.eos_id, steps=600, batch_size=1200)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    normal, kl, _ = gate_data(model, split, 1, split.n_tokens)
    for row, x, y in zip(report, normal.numpy(), kl.numpy(), strict=True):
        best = PoissonRegressor(alpha=0, max_iter=1000).fit(x, y).score(x, y)
        assert best - 0.02 <= row["explained"] <= best + 1e-6
    trace = collect_trace(model, split, 1)
    means = trace.kl.mean(axis=0)[:-1]  # the log link fits conditional means: their mean is right
    assert trace.scores["gate"].mean(axis=0)[:-1] == pytest.approx(means, rel=0.05)


@pytest.mark.slow
def test_hidden_units_explain_more(make_model, corpus):
    split = corpus.splits["train"]
    explained = [
        train_gates(make_model(gate_hidden=hidden), split, 1, steps=400, batch_size=600)[0][
            "explained"
        ]
        for hidden in (0, 16)
    ]
    assert explained[1] > explained[0] > 0


def test_refusals(make_model, corpus):
    with pytest.raises(ValueError, match="training split"):
        train_gates(make_model(), corpus.splits["test"], 1)
    with pytest.raises(ValueError, match="no gates"):
        train_gates(make_model(gate_hidden=None), corpus.splits["train"], 1)
    x = torch.randint(5, (2, 6))
    for untrained in (make_model(gate_hidden=None), make_model()):
        if untrained.gates is not None:
            untrained.gates.trained.fill_(False)
        with pytest.raises(ValueError, match="trained gates"):
            policy = ExitPolicy.constant(0.1, 3, "gate")
            untrained(x, use_early_exit=True, policy=policy)
