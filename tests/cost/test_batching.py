"""Every window is in one batch; grouping helps who waits."""

from __future__ import annotations

import numpy as np
import pytest

from earlyexit.cost.batching import batches, executed_depth, predicted_difficulty, throughput
from earlyexit.exits.policy import ExitPolicy


@pytest.mark.parametrize("difficulty", [None, "given"])
@pytest.mark.parametrize("size", [1, 3, 7, 20])
def test_every_window_is_in_exactly_one_batch(difficulty, size):
    values = np.random.default_rng(0).random(11)
    groups = batches(values if difficulty else None, 11, size)
    assert sorted(np.concatenate(groups)) == list(range(11))
    assert all(len(g) == size for g in groups[:-1]) and 1 <= len(groups[-1]) <= size
    if difficulty:
        assert (np.diff(values[np.concatenate(groups)]) >= 0).all()


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="batch size"):
        batches(None, 4, 0)
    with pytest.raises(ValueError, match="difficulties"):
        batches(np.zeros(3), 4, 2)


def test_difficulty_is_that_of_the_first_exit(make_model, make_tokens, make_policy):
    model, x = make_model(), make_tokens(30, 12)
    policy = make_policy(model, x, "gate")
    found = predicted_difficulty(model, x, policy, batch=7)
    assert found.shape == (30,)
    np.testing.assert_allclose(found, predicted_difficulty(model, x, policy, batch=30), rtol=1e-5)
    above = make_policy(model, x, "saturation")
    assert (predicted_difficulty(model, x, above) <= 0).any()  # sign turned: larger is deeper
    left_early = (executed_depth(model, x, policy) == 1).mean(axis=1)
    assert np.corrcoef(found, left_early)[0, 1] < 0
    with pytest.raises(ValueError, match="criterion"):
        predicted_difficulty(model, x, ExitPolicy.constant(0.5, 3))


def test_grouping_by_hindsight_lets_dense_batches_stop_earlier(
    make_model, make_tokens, make_policy
):
    model, x = make_model(), make_tokens(64, 4)
    policy = make_policy(model, x, "gate", 0.7)
    table = throughput(model, x, policy, [4, 16], repeats=1)
    assert (table["tokens_per_second"] > 0).all()
    run = table[table["execution"] == "dense"].pivot(
        index="batch", columns="grouping", values="layers_run"
    )
    assert (run["hindsight"] <= run["random"]).all() and (run["hindsight"] < run["random"]).any()
    assert set(table["execution"]) == {"compacted", "dense", "full depth"}


def test_dense_execution_stops_with_its_slowest_token(make_model, make_tokens):
    model, x, ran = make_model(), make_tokens(2, 5), []
    hooks = [b.layer_norm.register_forward_hook(lambda *_, k=k: ran.append(k))
             for k, b in enumerate(model.blocks)]  # fmt: skip
    model.nll(x, x, ExitPolicy.static(0, 3), "dense")
    assert 2 not in ran
    for hook in hooks:
        hook.remove()
