"""The ways to leave something behind: the same weights, each row the run of a model built that way."""

from __future__ import annotations

from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from earlyexit.calibration.collect import collect_trace
from earlyexit.corpus.windows import loader
from earlyexit.cost.parts import policy_flops
from earlyexit.evaluation.evaluator import EarlyExitEvaluator
from earlyexit.evaluation.left_behind import WAYS, compare_ways, ways_in_words, with_left_behind
from earlyexit.nn.config import ModelConfig


def test_all_ways_of_the_configuration_are_known():
    assert get_args(get_type_hints(ModelConfig)["left_behind"]) == WAYS


def test_another_way_has_the_same_weights_and_leaves_the_model_as_it_is(make_model):
    model = make_model()
    other = with_left_behind(model, "kept")
    assert (model.config.left_behind, other.config.left_behind) == ("recomputed", "kept")
    assert not other.training
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    with pytest.raises(ValueError, match="no potentials"):
        with_left_behind(make_model(mixing="attention"), "potentials")


@pytest.fixture(scope="module")
def found(make_model, make_policy, corpus):
    """A model that keeps values, two policies, and the table of all ways."""
    model = make_model(left_behind="kept")
    batches = list(loader(corpus.splits["fit"], 12, 5, corpus.eos_id))
    trace = collect_trace(model, corpus.splits["fit"], corpus.eos_id)
    policies = {share: make_policy(model, batches[0][0], "gate", share) for share in (0.3, 0.6)}
    table = compare_ways(model, policies, trace, iter(batches), batches[0], repeats=2)
    return model, policies, trace, batches, table


def test_each_row_is_the_run_of_a_model_with_that_way(found):
    model, policies, trace, batches, table = found
    assert table["way"].tolist() == ["full depth", *WAYS, *WAYS]
    assert table["in_use"].sum() == 2 and (table.loc[table["in_use"], "way"] == "kept").all()
    full, runs = table.iloc[0], table.iloc[1:]
    assert np.isnan(full["stay"]) and full["left_behind"] == full["quality_loss"] == 0
    assert full["layers"] == 3 and full["speedup_flops"] == full["speedup_time"] == 1
    assert runs["perplexity"].nunique() == 6  # what is left behind matters here
    for row in runs.itertuples():
        other, policy = with_left_behind(model, row.way), policies[row.stay]
        real = EarlyExitEvaluator(other, "cpu").evaluate_policy(batches, policy)
        assert row.perplexity == pytest.approx(real["perplexity"])
        assert row.layers == pytest.approx(3 / real["speedup_estimate"])
        traced = trace.evaluate(policy)["perplexity"]
        assert row.left_behind == pytest.approx(row.perplexity / traced - 1)
        assert row.quality_loss == pytest.approx(row.perplexity / full["perplexity"] - 1)
        assert row.low <= row.speedup_time <= row.high
        assert row.against_in_use_low <= row.against_in_use <= row.against_in_use_high
        assert row.against_in_use == 1 or not row.in_use
    shares = np.array(real["exit_distribution"]) / 100
    truth = policy_flops(other, shares, policy)["total"]
    assert table["flops_per_token"].iloc[-1] == pytest.approx(truth)


def test_the_choice_is_not_made_on_the_test_split(found, corpus):
    model, policies, _, batches, _ = found
    test = collect_trace(model, corpus.splits["test"], corpus.eos_id)
    with pytest.raises(ValueError, match="test split reports"):
        compare_ways(model, policies, test, batches, batches[0], repeats=1)


def test_the_sentence_names_what_beats_the_way_in_use(found):
    loss, faster = [1, 2, 3, 4, 3, 3, 4], [1, 0.9, 0.9, 1.1, 0.9, 0.9, 0.9]
    table = found[-1].assign(perplexity=loss, against_in_use_low=faster)
    first, second = ways_in_words(table).splitlines()
    assert first.startswith("- Meant to stay: 30%") and "kept (in use) loses" in first
    assert "than **kept** by loss: recomputed; by time, beyond its interval: potentials." in first
    assert "than **kept** by loss: none; by time, beyond its interval: none." in second
