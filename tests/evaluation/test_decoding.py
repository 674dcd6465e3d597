"""Words per second: what is compared is the same words, and the break-even line solves its equation."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from earlyexit.evaluation import decoding, decoding_costs
from earlyexit.exits.policy import ExitPolicy


def costs(layer: float, head: float, joined: float, longest: int, n_layers: int) -> pd.DataFrame:
    """Prices of a machine on which a row of a pass of several costs ``joined`` of one alone."""
    rows = []
    for n in range(1, longest + 2):
        share = joined if n > 1 else 1.0
        rows.append(("layer", -1, n, layer * share))
        rows += [("head", k, n, head * share) for k in range(n_layers)]
    return pd.DataFrame(rows, columns=["part", "exit_layer", "joined", "microseconds"])


@pytest.mark.parametrize(("exit_layer", "draft"), [(0, 1), (0, 4), (2, 3)])
def test_a_draft_breaks_even_where_its_words_take_the_time_of_plain_ones(exit_layer, draft):
    a = decoding_costs.needed_acceptance(costs(4.0, 6.0, 0.25, 4, 4), 4, exit_layer, draft)
    words = (1 - a ** (draft + 1)) / (1 - a)
    early = (draft + 1) * (exit_layer + 1) * 4.0 + draft * 6.0
    verified = (draft + 1) * ((3 - exit_layer) * 1.0 + 1.5)
    assert 0 < a < 1 and early + verified == pytest.approx(words * (4 * 4.0 + 6.0))


def test_without_cheaper_passes_no_acceptance_pays():
    for draft in (1, 4):
        assert math.isnan(decoding_costs.needed_acceptance(costs(4.0, 6.0, 1.0, 4, 4), 4, 0, draft))
    assert decoding_costs.needed_acceptance(costs(4.0, 0.0, 1.0, 4, 4), 4, 0, 2) == pytest.approx(
        1.0
    )


@pytest.fixture(scope="module")
def measured(make_model, make_tokens):
    model, prompts = make_model(exit_head="own"), make_tokens(3, 3)
    methods = {decoding.PLAIN: {}, "exits": {"policy": ExitPolicy.static(0, 3)}}
    methods |= decoding.fixed_drafts(3, [2]) | decoding.gated_drafts(3, [0.5], 2)
    speed = decoding.speeds(model, methods, prompts, 8, [1, 3], 3)
    return model, prompts, methods, speed


def test_every_method_is_timed_on_the_same_words(measured):
    model, prompts, methods, speed = measured
    assert len(speed) == 2 * len(methods)
    speed = speed.set_index(["method", "batch"])
    assert (
        (speed.loc[decoding.PLAIN, ["speedup_time", "layers", "same_words"]] == [1, 3, 1])
        .to_numpy()
        .all()
    )
    assert (speed.loc["exits", "layers"] == 1).all() and (
        speed.loc["exits", "same_words"] < 1
    ).all()
    for name in [*methods][2:]:
        rows = speed.loc[name]
        assert (rows["same_words"] == 1).all() and rows["acceptance"].between(0, 1).all()
        assert rows["acceptance"].nunique() == 1  # a batch is its sequences, one after another
    stepped = decoding.stepped(model, prompts[:1], 4, 3).iloc[0]
    assert stepped["same_words"] == 1 and stepped["speedup_time"] < 1


def test_words_are_drawn_the_same_in_every_run(measured):
    model, prompts, methods, speed = measured
    once, again = (
        decoding.speeds(model, methods, prompts, 8, [1], 3, temperature=1.0).set_index("method")
        for _ in range(2)
    )
    told = ["temperature", "layers", "acceptance", "same_words"]
    pd.testing.assert_frame_equal(once[told], again[told])
    assert (once["temperature"] == 1).all() and once["same_words"].isna().all()
    drafts = once["acceptance"].dropna()
    assert len(drafts) > 1 and drafts.between(0, 1).all()
    greedy = speed[speed["batch"] == 1].set_index("method")["acceptance"]
    assert (drafts != greedy[drafts.index]).any()


def test_the_parts_of_a_word_add_up(measured):
    model, prompts, methods, speed = measured
    cost = decoding_costs.prices(model, prompts, 2, 9)
    assert (cost.loc[cost["part"] == "layer", "microseconds"] > 0).all()
    assert set(cost.loc[cost["part"] == "head", "exit_layer"]) == {0, 1, 2}
    parts = decoding_costs.breakdown(model, methods, prompts, 8, cost, speed)
    total = parts.groupby("method")["microseconds"].sum()
    told = speed[speed["batch"] == 1].set_index("method")["words_per_second"]
    np.testing.assert_allclose(total[told.index], 1e6 / told)
    accepted = decoding_costs.acceptance(model, prompts, 8, [1, 2], cost, [0.0, 1.0])
    assert len(accepted) == 8 and accepted["words_per_pass"].between(1, 3).all()
    best = decoding.fastest(speed, decoding.fixed_drafts(3, [2]))
    plain = decoding_costs.plain_parts(model, prompts, 8, 3)
    said = decoding.verdict(speed, plain, accepted, "exits", list(best))
    assert "nan" not in said and "100% the same words" in said and "drawn" not in said
    drawn = decoding.speeds(model, methods, prompts, 8, [1], 3, temperature=1.0)
    both = pd.concat([speed, drawn])
    assert decoding.verdict(both, plain, accepted, "exits", list(best)).startswith(said)
    assert decoding.fastest(both, decoding.fixed_drafts(3, [2])) == best


def test_drawn_words_are_scored_by_the_last_layer(measured):
    model, prompts, methods, _ = measured
    table = decoding.quality(model, methods, prompts, 8, [0.0, 1.0])
    wide = table.pivot(index="method", columns="temperature", values="nll")
    lossless = wide.drop(index=["exits"])
    assert (lossless[0.0] == lossless.loc[decoding.PLAIN, 0.0]).all()
    assert wide.loc["exits", 0.0] > wide.loc[decoding.PLAIN, 0.0]
    assert (wide[1.0] > wide[0.0]).all() and (table["words"] == 24).all()


@pytest.mark.parametrize("exit_head", ["own", "translator"])
def test_a_shortened_model_says_what_its_exit_says(make_model, make_tokens, exit_head):
    model, prompts = make_model(exit_head=exit_head), make_tokens(2, 3)
    smaller = decoding.smaller_models(model, [1, 2, 3])
    assert list(smaller) == ["trained alone, 1 layer", "trained alone, 2 layers"]
    short = smaller["trained alone, 2 layers"]["model"]
    static = ExitPolicy.static(1, 3)
    assert torch.equal(short.decode(prompts, 4).ids, model.decode(prompts, 4, policy=static).ids)
    assert short.n_layers == 2 and short.gates is None
    methods = {decoding.PLAIN: {}} | smaller
    speed = decoding.speeds(model, methods, prompts, 4, [1], 3).set_index("method")
    assert speed.loc["trained alone, 2 layers", "layers"] == 2
    assert speed["same_words"].notna().tolist() == [True, False, False]
