"""Systems and their measures: in the same units for all, and what the plain cost table says."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SIZES

from earlyexit import figures
from earlyexit.cost.parts import policy_flops, run_flops
from earlyexit.cost.system_times import sparse_times, system_times
from earlyexit.evaluation.combinations import full_depth_table, worth_of_parts
from earlyexit.evaluation.systems import (
    candidate_policies,
    cheapest_within,
    choose,
    quantile_policies,
    run_policy,
    speedups,
    sweep,
)
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models.act import ACTLanguageModel, convert_act_to_early_exit
from earlyexit.models.multi_scale import MultiScaleLanguageModel
from earlyexit.models.sparse_bk import SparseBKLanguageModel
from earlyexit.runs.system_cache import train_system, with_exits
from earlyexit.training.systems import CONTROLS, EXITS, REFERENCE, SYSTEMS, Budget


@pytest.fixture
def batch(make_tokens):
    return [(make_tokens(6, 12), make_tokens(6, 12, 1))]


def test_of_a_plain_model_flops_are_those_of_the_cost_table(make_model, make_policy, batch):
    model = make_model()
    for criterion in ("gate", "entropy"):
        policy = make_policy(model, batch[0][0], criterion)
        _, exits = model.nll(*batch[0], policy)
        shares = exits.flatten().bincount(minlength=4).double().numpy() / exits.numel()
        truth = policy_flops(model, shares, policy)
        row = run_policy(model, batch, policy)
        assert row["flops_total"] == pytest.approx(truth["total"])
        assert row["flops_layers"] == pytest.approx(truth["total"] - truth["head"])
        assert row["layers"] == pytest.approx(shares @ np.minimum(np.arange(4) + 1, 3))
        assert row["layers"] == pytest.approx(row["mean_exit"])
    assert run_policy(model, batch, None)["flops_total"] == pytest.approx(truth["full_depth"])


def layer_flops(model, positions, policy=None, **changes) -> float:
    flops = run_flops(replace(model.operations(), **changes), positions, policy)
    return flops["total"] - flops["head"]


def test_a_sparse_core_saves_what_it_skips_and_several_scales_count_positions():
    plain = layer_flops(SparseBKLanguageModel(**SIZES | {"keep": 1.0}), np.ones(3))
    sparse = SparseBKLanguageModel(**SIZES)
    d, h, values = 16, 4, 4 * 4
    skipped = 2 * d * (h + values) + 18 * h + 9 * values  # a product and two recursions
    half = layer_flops(sparse, np.ones(3), kept=(0.5,) * 3)
    assert half == pytest.approx(plain - 3 * (0.5 * skipped - 2 * d))
    scales = MultiScaleLanguageModel(**SIZES | {"n_layers": 5})
    positions = scales.operations().run_positions(torch.full((2, 12), 5))
    assert positions == pytest.approx([1, 0.5, 0.25, 0.5, 1])
    # Pooling: 4 d² at N/2 and at N/4; raising: 2 d² at N/4 and at N/2.
    moved = (0.5 + 0.25) * 4 * d * d + (0.25 + 0.5) * 2 * d * d
    found = layer_flops(scales, positions)
    assert found == pytest.approx(3.25 * plain / 3 + moved)
    left = layer_flops(scales, np.array([1, 0, 0, 0, 0]), ExitPolicy.static(0, 5))
    assert plain / 3 < left < found


def test_thresholds_are_quantiles_of_the_scores(make_model, batch):
    model = make_model()
    for criterion in ("gate", "agreement"):
        policies = quantile_policies(model, batch[0][0], criterion, [0.1, 0.5, 0.9])
        layers = sweep(model, batch, policies)["layers"]
        assert layers.is_monotonic_decreasing and layers.iloc[0] > layers.iloc[-1]
    kinds = candidate_policies(EXITS, model, batch[0][0], [0.5])
    assert [len(group) for group in kinds.values()] == [1, 1, 2]
    for system in (REFERENCE, *CONTROLS):
        assert candidate_policies(system, model, batch[0][0], [0.5]) == {"full depth": [None]}


def test_choosing_is_by_the_reference_if_it_can_be_reached():
    curve = pd.DataFrame({"perplexity": [100.0, 103, 120], "flops_layers": [3.0, 2, 1]})
    assert cheapest_within(curve, 105) == 1 and cheapest_within(curve, 99) is None
    assert choose(curve, 100, 0.05) == (1, "the plain model")
    assert choose(curve, 80, 0.05) == (1, "itself")
    rows = curve.assign(layers=[4.0, 2, 1], flops_total=[9.0, 8, 7])
    found = speedups(rows, rows.iloc[0])
    assert found["quality_loss"].tolist() == pytest.approx([0, 0.03, 0.2])
    assert found["speedup_layers"].tolist() == [1, 2, 4]
    assert found["speedup_flops"].tolist() == [1, 1.5, 3]


def test_layers_alone_are_timed_beside_the_whole(make_model, batch):
    model, (x, y) = make_model(), batch[0]
    policy = quantile_policies(model, x, "gate", [0.5])[0]
    seconds = system_times({"full": (model, None), "exits": (model, policy)}, x, y, repeats=2)
    assert {len(v) for v in seconds["total"].values()} == {2}
    assert all((v > 0).all() for part in seconds.values() for v in part.values())


def test_every_system_sweeps_and_is_drawn(batch):
    tables = []
    for system in SYSTEMS:
        torch.manual_seed(0)
        sizes = SIZES | {"n_layers": 3}
        if system.convert:
            sizes["gate_hidden"] = None
        if "sparse" in system.parts:
            sizes["keep"] = 0.5
        model = system.kind(**sizes).eval()
        if system.convert:
            model = system.convert(model)
        else:
            model.gates.trained.fill_(True)
        kinds = candidate_policies(system, model, batch[0][0], [0.3, 0.7])
        rows = sweep(model, batch, [policy for group in kinds.values() for policy in group])
        assert np.isfinite(rows["perplexity"]).all() and math.isnan(rows["threshold"].iloc[0])
        names = [name for name, group in kinds.items() for _ in group]
        rows = speedups(rows, (tables or [rows])[0].iloc[0])
        tables.append(rows.assign(system=system.name, policy=names))
    curves = pd.concat(tables)
    alone = curves[curves["policy"] == "full depth"]
    figures.combinations(curves[curves["policy"] == "adaptive"], alone, 0.05)
    plt.close("all")


def test_controls_are_trained_as_the_reference_and_differ_in_one_thing_each():
    calls = []
    study = SimpleNamespace(train=lambda *args, **options: calls.append((args, options)))
    budget = Budget(1000, 1.0, 8, 100, 100, 100)
    for system in (REFERENCE, *CONTROLS):
        train_system(study, system, 0, budget)
        assert with_exits(study, system, 0, "as it is", budget) == "as it is"
    changes = [args[1] for args, _ in calls]
    assert changes == [{}, {"mixing": "none"}, {"n_layers": 1}]
    like_reference = [((args[0], *args[2:]), options) for args, options in calls]
    assert like_reference == 3 * like_reference[:1]
    assert like_reference[0][0][1]["exit_loss_weight"] == 0


def test_controls_stand_in_the_table_and_say_what_mixing_and_depth_are_worth(make_model, batch):
    models = {s.name: make_model(**s.changes) for s in (REFERENCE, EXITS, *CONTROLS)}
    table = full_depth_table(models, batch, batch)
    assert table["control"].tolist() == [False, False, True, True]
    found = [  # two seeds: without mixing it is always much worse, with one layer only once
        table.assign(seed=seed, perplexity=[100.0, 100.0, 120.0, one_layer])
        for seed, one_layer in enumerate((110.0, 104.0))
    ]
    mixing, depth = worth_of_parts(pd.concat(found), 0.05).splitlines()
    assert "120.0 against 100.0 (+20.0%" in mixing and "mixing matters" in mixing
    assert "by seed +4.0% to +10.0%" in depth and "**depth does not matter" in depth
    assert "by seed" not in worth_of_parts(found[0], 0.05)


def test_sparse_times_say_what_could_be_gained():
    table = sparse_times([(2, 16, 8, 4)], 0.5, 2, torch.device("cpu"))
    row = table.iloc[0]
    assert row["kept"] == pytest.approx(0.5, abs=0.05)
    share = row["skippable_share"] * (1 - row["kept"])
    assert row["at_most"] == pytest.approx(1 / (1 - share))
    assert 0 < row["core_share"] < row["skippable_share"] <= 1
    figures.sparse_limits(table)
    plt.close("all")


def test_an_act_policy_beyond_its_threshold_runs_deeper(batch):
    torch.manual_seed(0)
    model = convert_act_to_early_exit(ACTLanguageModel(**SIZES | {"gate_hidden": None}).eval())
    policies = [ExitPolicy.constant(t, 3, "agreement") for t in (0.1, 0.5, 0.99)]
    assert sweep(model, batch, policies)["layers"].is_monotonic_increasing
