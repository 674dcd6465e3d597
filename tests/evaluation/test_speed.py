"""Tables of timed runs: their layers and FLOPs are those of the exits that happen."""

from __future__ import annotations

import pytest
import torch

from earlyexit.cost import time_model
from earlyexit.cost.breakdown import ORIGINAL, execution_runs, run_times
from earlyexit.cost.parts import policy_flops
from earlyexit.evaluation import speed
from earlyexit.evaluation.evaluator import EarlyExitEvaluator
from earlyexit.exits.statistics import exit_shares
from earlyexit.nn.config import ModelConfig

SMALL = ModelConfig(40, 16, 3, n_seq=16, num_experts=2, bk_heads=4, dropout_p=0.0, gate_hidden=0)


def test_end_to_end(subject, make_policy):
    model, (x, y) = subject.model, subject.batch
    policy = make_policy(model, x, "gate")
    pieces = run_times(execution_runs(model, x, y, policy, model, 0.5), x.device, 2)
    (row,) = speed.end_to_end(model, policy, (x, y), pieces, subject.batches).to_dict("records")
    evaluator = EarlyExitEvaluator(model, "cpu")
    real, full = (evaluator.evaluate_policy(subject.batches, p) for p in (policy, None))
    assert row["quality_loss"] == pytest.approx(real["perplexity"] / full["perplexity"] - 1)
    shares = exit_shares(model, x, y, policy)
    assert row["speedup_layers"] == pytest.approx(3 / (shares @ [1, 2, 3, 3]))
    assert row["speedup_flops"] == pytest.approx(
        policy_flops(model, shares, policy)["speedup_flops"]
    )
    assert row["time_of_flops"] == pytest.approx(row["speedup_time"] / row["speedup_flops"])
    totals = pieces.groupby("run")["total_ms"].first()
    assert row["original_time"] == pytest.approx(totals[ORIGINAL] / totals["compacted"])


def test_quantiles_keep_the_share_of_tokens_they_are_meant_to(subject):
    for name in ("gate", "max_probability"):
        policies = speed.policies_of_quantiles(subject.fit, name, [0.0, 0.5])
        scores = subject.fit.score(name)[:, :2]
        passed = [p.rule.passes(scores, p.thresholds[0]).mean() for p in policies]
        assert passed == pytest.approx([1, 0.5], abs=0.01)
        assert all(p.thresholds[-1] == p.rule.never for p in policies)


def test_every_way_of_running_a_policy(subject):
    names, shares = ("gate", "max_probability"), [0.2, 0.6]
    policies = [p for n in names for p in speed.policies_of_quantiles(subject.fit, n, shares)]
    table = speed.execution_speedups(subject.model, subject.model, subject.batch, policies, 2)
    ways = table["execution"].tolist()
    assert [way.split(",")[0] for way in ways] == ["compacted", "dense"] * 2 + [
        "compacted", ORIGINAL
    ] * 2  # fmt: skip
    assert (table["layers"] * table["speedup_layers"]).tolist() == pytest.approx([3] * 8)
    assert table["speedup_flops"].notna().tolist() == [way.startswith("comp") for way in ways]
    assert (table[["speedup_time", "milliseconds"]] > 0).all(axis=None)
    assert (table["low"] <= table["high"]).all()
    ratio = table["speedup_time"] / table["speedup_layers"]
    assert table["efficiency"].tolist() == pytest.approx(ratio.tolist())


def test_compaction_has_the_depths_it_was_asked_for():
    device = torch.device("cpu")
    table = speed.compaction(SMALL, 2, 16, [1.5, 2.5], 2, device)
    assert table["depth"].tolist() == [1.5, 2.5]
    assert table["speedup_layers"].tolist() == pytest.approx([2, 1.2])
    assert table["speedup_flops"].is_monotonic_decreasing
    assert [c for c in table if c.startswith("beyond_")] == [
        f"beyond_{part}_ms" for part in speed.PARTS_OF_FLOPS
    ]


def test_output_heads(subject, make_policy, make_model):
    models = {}
    for name, head in (("tied", "linear"), ("adaptive", "adaptive")):
        model = make_model(output_head=head, tie_embeddings=head == "linear")
        models[name] = model, make_policy(model, subject.batch[0], "gate")
    table = speed.output_heads(models, subject.batch, subject.batches, 2).set_index("head")
    for name, (model, policy) in models.items():
        evaluator = EarlyExitEvaluator(model, "cpu")
        full = evaluator.evaluate_policy(subject.batches)["perplexity"]
        real = evaluator.evaluate_policy(subject.batches, policy)
        row = table.loc[name]
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        assert row["perplexity"] == pytest.approx(full)
        assert row["quality_loss"] == pytest.approx(real["perplexity"] / full - 1)
        for task in ("scoring", "prediction"):
            ratio = row[f"{task}_ms"] / row[f"{task}_exits_ms"]
            assert row[f"{task}_speedup_time"] == pytest.approx(ratio)


def test_few_configurations_are_the_smallest_and_prices_have_a_row_each():
    grids, few = speed.price_grids("all"), speed.price_grids("few")
    assert grids["fitted"] is time_model.FITTED and not set(grids["fitted"]) & set(grids["checked"])
    assert few["fitted"] == [time_model.FITTED[0], time_model.FITTED[3]]
    assert few["checked"] == [time_model.MAPPED[3]]
    prices = time_model.TimeModel({"blocks": {"launches": 2e-5, "bytes": 1e-10}}, {})
    assert speed.price_table(prices).to_dict("records") == [
        {"part": "blocks", "work": "launches", "seconds_per_unit": 2e-5},
        {"part": "blocks", "work": "bytes", "seconds_per_unit": 1e-10},
    ]
