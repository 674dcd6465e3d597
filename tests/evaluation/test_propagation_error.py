"""What exited tokens leave behind: nothing where nothing leaves, and what a naive sum says elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from earlyexit.calibration.collect import collect_trace
from earlyexit.corpus.windows import loader
from earlyexit.evaluation.propagation_error import propagation_cost, propagation_error
from earlyexit.exits.policy import ExitPolicy


def test_propagation_costs_nothing_where_nothing_leaves(make_model, corpus):
    model, split = make_model(), corpus.splits["fit"]
    trace = collect_trace(model, split, corpus.eos_id)
    read = lambda: loader(split, 12, 5, corpus.eos_id)  # noqa: E731
    tokens = propagation_error(model, trace, read(), ExitPolicy.static(3, 3))
    table = propagation_cost(tokens, 3, 12)
    assert table["cost"].abs().max() < 1e-5 and (table["moved"] == 0).all()
    assert table.groupby("by")["tokens"].sum().nunique() == 1


def test_propagation_cost_is_the_ratio_of_perplexities(make_model, make_policy, corpus):
    model, split = make_model(), corpus.splits["fit"]
    trace = collect_trace(model, split, corpus.eos_id)
    first = next(iter(loader(split, 12, 5, corpus.eos_id)))[0]
    policy = make_policy(model, first, "gate")
    tokens = propagation_error(model, trace, loader(split, 12, 5, corpus.eos_id), policy)
    table = propagation_cost(tokens, 3, 12).set_index("by")
    assert table.loc["all", "perplexity_trace"] == pytest.approx(
        trace.evaluate(policy)["perplexity"]
    )
    assert table.loc["all", "cost"] == pytest.approx(
        table.loc["all", "perplexity"] / table.loc["all", "perplexity_trace"] - 1
    )
    # A token that leaves at once has read no state that another one left.
    first_exit = tokens[(tokens["exit_layer"] == 0) & (tokens["exit_layer_trace"] == 0)]
    np.testing.assert_allclose(first_exit["nll"], first_exit["nll_trace"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="not the text"):
        other = loader(corpus.splits["test"], 12, 5, corpus.eos_id)
        propagation_error(model, trace, other, policy)
    assert torch.is_grad_enabled()
