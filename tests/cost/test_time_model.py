"""Prices found again from times that obey them; work that adds up; files that are whole or refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PRICES

from earlyexit.cost import time_model as times
from earlyexit.cost.break_even import break_even_map, errors_by_check, measured_points
from earlyexit.cost.parts import FULL_DEPTH, Load, part_flops, work
from earlyexit.cost.synthetic import geometric_shares
from earlyexit.cost.time_model import TimeModel, check, fit, loads, measure
from earlyexit.exits.clock import PARTS
from earlyexit.models.operations import operations
from earlyexit.nn.config import ModelConfig
from earlyexit.runs.cache import time_model_path

CONFIG = ModelConfig(500, 16, 3, n_seq=16, bk_heads=4, dropout_p=0.0, gate_hidden=0)
CPU = torch.device("cpu")


def test_full_depth_does_no_work_for_exits():
    amounts = work(Load(CONFIG, 4, 16))
    assert set(amounts) == {"blocks", "head", "rest"}
    flops = part_flops(operations(CONFIG))
    matrix = amounts["blocks"]["expert_flops"] + amounts["blocks"]["thin_flops"]
    layer = operations(CONFIG).layers[0]
    elementwise = sum(part.get("elementwise_flops", 0) for part in layer.values())
    assert matrix == pytest.approx(64 * 3 * (sum(flops[k] for k in layer) - elementwise))
    assert amounts["head"]["flops"] == 64 * flops["unembedding"]


@pytest.mark.parametrize("criterion", ["gate", "saturation", "max_probability"])
def test_work_shrinks_as_tokens_leave_earlier(criterion):
    previous = None
    for depth in (3.0, 2.5, 2.0, 1.5, 1.0):
        amounts = work(Load(CONFIG, 4, 16, criterion, tuple(geometric_shares(3, depth))))
        blocks = amounts["blocks"]
        assert blocks["expert_flops"] == pytest.approx(
            64 * depth * part_flops(operations(CONFIG))["experts"]
        )
        assert blocks["steps"] + amounts["propagation"]["steps"] <= 64 * 3 * (4 + 16) + 1e-6
        if previous is not None:
            assert blocks["bytes"] < previous
        previous = blocks["bytes"]


def test_every_token_is_projected_once_by_a_gate_and_once_a_check_by_its_logits():
    shares = (0.5, 0.25, 0.25, 0.0)
    by_gate = work(Load(CONFIG, 4, 16, "gate", shares))
    assert by_gate["head"]["logits"] == 64 * 500
    by_logits = work(Load(CONFIG, 4, 16, "max_probability", shares))
    assert by_logits["projected check"]["logits"] == 64 * 1.5 * 500
    assert by_logits["head"]["logits"] == 64 * 0.25 * 500
    adaptive = replace(CONFIG, output_head="adaptive", tie_embeddings=False)
    checked = work(Load(adaptive, 4, 16, "entropy", shares))
    assert checked["projected check"]["logits"] == 64 * 1.5 * 502  # all words, and two clusters
    assert checked["head"]["logits"] < 64 * 0.25 * 200
    # The most probable word opens a third of 150 words and a fifth of 300; scoring is left to do.
    checked = work(Load(adaptive, 4, 16, "max_probability", shares))
    assert checked["top check"]["logits"] == pytest.approx(64 * 1.5 * (52 + 50 + 60))
    scored = work(Load(adaptive, 4, 16, "gate", shares))["head"]
    assert all(checked["head"][kind] == scored[kind] for kind in ("launches", "logits"))


@pytest.mark.parametrize(
    "change, what",
    [
        ({"batch": 0}, "batch"),
        ({"criterion": "vibes"}, "criterion"),
        ({"shares": (1.0,)}, "shares"),
        ({"shares": (0.5, 0.6, 0.0, 0.0)}, "shares"),
        ({"shares": (1.5, -0.5, 0.0, 0.0)}, "shares"),
        ({"shares": (float("nan"), 0.0, 0.0, 1.0)}, "shares"),
    ],
)
def test_impossible_loads_are_refused(change, what):
    load = {"criterion": "gate", "shares": (1.0, 0.0, 0.0, 0.0), "batch": 1, "length": 2} | change
    with pytest.raises(ValueError, match=what):
        Load(CONFIG, **load)


def synthetic(wanted, prices, noise=0.0, seed=0) -> pd.DataFrame:
    """Times that obey ``prices``, a few of them disturbed."""
    rng, truth, rows = np.random.default_rng(seed), TimeModel(prices, {}), []
    for index, load in enumerate(wanted):
        parts = truth.predict(load)
        factor = 1 + noise * rng.standard_normal()
        total = sum(parts.values()) * factor
        rows += [
            {"load": index, "part": p, "milliseconds": ms * factor, "total_ms": total}
            for p, ms in parts.items()
        ]
    return pd.DataFrame(rows)


def test_prices_are_recovered_and_hold_for_other_configurations():
    fitted, other = loads(times.FITTED), loads(times.CHECKED)
    model = fit(synthetic(fitted, PRICES), fitted)
    assert check(model, synthetic(other, PRICES), other)["error"].abs().max() < 1e-3
    assert all(price >= 0 for kinds in model.prices.values() for price in kinds.values())
    noisy = fit(synthetic(fitted, PRICES, noise=0.05), fitted)
    assert check(noisy, synthetic(other, PRICES), other)["error"].abs().median() < 0.06


def test_one_disturbed_measurement_decides_nothing():
    fitted, other = loads(times.FITTED), loads(times.CHECKED)
    disturbed = synthetic(fitted, PRICES)
    disturbed.loc[disturbed["load"] == 4, ["milliseconds", "total_ms"]] *= 3
    model = fit(disturbed, fitted)
    assert check(model, synthetic(other, PRICES), other)["error"].abs().median() < 0.03


def test_what_is_fitted_and_what_is_checked_are_different_configurations():
    assert not {grid[:5] for grid in times.FITTED} & {
        grid[:5] for grid in times.CHECKED + times.MAPPED
    }


def test_measured_loads_are_complete():
    wanted = loads([(16, 3, 300, 2, 8, 1.5)])
    table = measure(wanted, CPU, repeats=2)
    assert set(table["load"]) == set(range(len(wanted)))
    assert (table.groupby("load")["part"].nunique() == len(PARTS)).all()
    model = fit(table, wanted)
    assert set(model.predict(wanted[0])) == set(PARTS)
    assert model.milliseconds(wanted[0]) > 0 and model.speedup(wanted[1]) > 0


def test_the_map_is_the_model_at_every_point():
    model = TimeModel(PRICES, {})
    grid = break_even_map(model, panels=((4, 8),))
    assert len(grid) == len(grid[["criterion", "head_ratio", "executed"]].drop_duplicates())
    lost = grid[(grid["criterion"] == "max_probability") & (grid["executed"] == 1)]
    assert (lost["speedup_time"] < 1).all()  # every check is paid and nothing is saved
    gates = grid[grid["criterion"] == "gate"].pivot(
        index="executed", columns="head_ratio", values="speedup_time"
    )
    assert (
        np.diff(gates.to_numpy()[:-1], axis=0) < 1e-9
    ).all()  # while some leave, deeper is slower
    wanted = loads(times.MAPPED)
    checked = check(model, synthetic(wanted, PRICES), wanted)
    points = measured_points(checked.assign(used="checked"))
    assert len(points) == 2 * len(times.MAPPED)
    np.testing.assert_allclose(points["speedup_time"], points["speedup_predicted"])


def test_only_held_out_runs_score_the_map_and_each_kind_of_check_by_itself():
    wanted, model = loads(times.FITTED[:3] + times.CHECKED[:4]), TimeModel(PRICES, {})
    table = check(model, synthetic(wanted, PRICES), wanted)
    table["used"] = ["fitted"] * 9 + ["checked"] * 12
    table.loc[:8, "measured_ms"] *= 7  # must not matter
    linear = (table["criterion"] == "max_probability") & (table["output_head"] == "linear")
    table.loc[linear, "measured_ms"] *= 1.33  # predicted a third too fast
    errors = errors_by_check(measured_points(table)).set_index(["criterion", "output_head"])
    assert errors["runs"].tolist() == [2] * 4
    expected = pd.Series(0.0, errors.index)
    expected["max_probability", "linear"] = 0.33
    for column in ("bias", "median_error", "largest_error"):
        np.testing.assert_allclose(errors[column], expected, atol=1e-9)


def test_checks_of_all_logits_and_of_the_top_word_have_prices_of_their_own():
    fitted, other = loads(times.FITTED), loads(times.CHECKED)
    dear = PRICES | {"projected check": {"flops": 2e-10, "logits": 2e-8}}
    model = fit(synthetic(fitted, dear), fitted)
    assert check(model, synthetic(other, dear), other)["error"].abs().max() < 0.01


def test_a_time_model_is_stored_whole(tmp_path):
    errors = {"median_error": 0.05, "largest_error": 0.2}
    model = TimeModel(PRICES, check=errors, machine={"threads": 2})
    model.save(tmp_path / "a" / "m.json")
    assert TimeModel.load(tmp_path / "a" / "m.json") == model
    text = (tmp_path / "a" / "m.json").read_text()
    changed = (text.replace("0.05", "0.04"), text.replace("0.05", "NaN"), text[:-9])
    for text in ("", "{}", '{"prices": {}, "machine": {}}', "[1]", "[" * 10**5, *changed):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json: "):
            TimeModel.load(tmp_path / "bad.json")


def test_other_threads_have_other_prices(tmp_path, monkeypatch):
    before = time_model_path(tmp_path, CPU)
    assert time_model_path(tmp_path, CPU) == before
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert time_model_path(tmp_path, CPU) != before


def test_an_adaptive_head_is_predicted_cheaper():
    model = TimeModel(PRICES, {})
    adaptive = replace(CONFIG, output_head="adaptive", tie_embeddings=False)
    assert model.milliseconds(Load(adaptive, 4, 16)) < model.milliseconds(Load(CONFIG, 4, 16))
    assert Load(CONFIG, 4, 16).criterion == FULL_DEPTH
