"""The two commands answer in both forms and refuse what is wrong before they work."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PRICES

from earlyexit.__main__ import main
from earlyexit.cost import bench
from earlyexit.cost.bench import Bench, Row, position_loop
from earlyexit.cost.parts import Load
from earlyexit.cost.synthetic import geometric_shares
from earlyexit.cost.time_model import TimeModel
from earlyexit.models.checkpoints import save_model
from earlyexit.nn.bk_core import BKCore
from earlyexit.nn.config import ModelConfig
from earlyexit.runs.published import published_prices

CALIBRATE = "earlyexit.cost.time_model.calibrate"
SIZES = ["--d-model", "16", "--n-layers", "3", "--vocab", "300"]


@pytest.mark.parametrize("values", [0, 3])
def test_the_slow_loop_computes_the_same(values):
    core, given = BKCore(4, n_values=values), torch.randn(3, 9, 4 + 4 * values)
    torch.testing.assert_close(position_loop(core, given), core(given), rtol=1e-4, atol=1e-5)


def test_bk_core_is_measured_against_a_loop_in_a_layer_and_by_its_length(monkeypatch):
    seconds = {"loop": 8, "core": 2, "loop of g": 6, "g": 1, "layer": 16}

    def times(self, runs, repeats=None):
        for run in runs.values():
            run()  # each of them works
        return {name: np.full(3, seconds.get(name, name)) for name in runs}

    monkeypatch.setattr(Bench, "_times", times)
    sections = Bench(torch.device("cpu"), quick=True).sections()
    rows = [row for name in ("BK-Core", "BK-Core, length") for row in sections[name]()]
    assert [row.value for row in rows] == [4, 6, 2 / 16, pytest.approx(1)]
    assert [row.verdict for row in rows] == ["missed", "missed", "", "met"]
    assert "16 heads of 4 values, d=64" in rows[0].note


def test_a_row_says_what_its_interval_allows():
    assert Row("a", 2.0, "×", 1.5, True, "").verdict == "met"
    assert Row("a", 2.0, "×", 2.5, True, "").verdict == "missed"
    assert Row("a", 0.02, "share", 0.03, False, "").verdict == "met"
    assert Row("a", 2.0, "×", 1.5, True, "", 1.4, 3.0).verdict == "unclear"
    assert Row("a", 2.0, "×", 1.5, True, "", 1.6, 3.0).verdict == "met"
    assert Row("a", 0.02, "share", 0.01, False, "", 0.015, 0.03).verdict == "missed"
    assert Row("a", 2.0, "×", None, True, "").verdict == ""
    assert Row("a", 2.0, "×", None, True, "").to_dict()["low"] is None
    text = bench.table(
        [Row("a", 0.02, "share", 0.03, False, "n"), Row("bb", 2, "×", 3, True, "m", 1.5, 2.5)]
    )
    assert "2.0 %" in text and "≤ 3.0 %" in text and "[1.50×, 2.50×]" in text and "missed" in text


@pytest.fixture
def small(monkeypatch):
    """The benchmark on models of a few kilobytes."""
    tiny = {"d_model": 16, "n_layers": 3, "n_seq": 32, "vocab_size": 300}
    for name in ("SMALL", "LARGE"):
        monkeypatch.setattr(bench, name, bench.replace(getattr(bench, name), **tiny))
    monkeypatch.setattr(Bench, "batch", 2)
    monkeypatch.setattr(Bench, "_tokens", lambda self, config: torch.randint(2, (2, 32)))


@pytest.mark.parametrize("section", ["gate check", "compaction", "end to end, d=16, adaptive head"])
def test_sections_measure_ratios(small, monkeypatch, section):
    monkeypatch.setattr(bench, "geometric_shares", lambda n, depth: [0.5, 0.25, 0.25, 0])
    rows = list(Bench(torch.device("cpu"), repeats=2, quick=True).sections()[section]())
    assert rows and all(math.isfinite(row.value) and row.value > 0 for row in rows)
    assert all(row.low <= row.value <= row.high for row in rows)


def test_bench_prints_json_of_a_given_model(make_model, tmp_path, capsys, monkeypatch):
    save_model(make_model(vocab_size=300), tmp_path / "m.safetensors")
    every = Bench.sections
    only = "end to end, given model"
    monkeypatch.setattr(Bench, "sections", lambda self: {only: every(self)[only]})
    assert main(["bench", "--quick", "--json", "--model", str(tmp_path / "m.safetensors")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["conditions"]["threads"] >= 1
    assert [row["unit"] for row in report["rows"]] == ["×", "share", "×"]


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_what_was_measured_before_a_failure_is_printed_in_any_encoding(monkeypatch, form):
    """A terminal without ≥ and ×, and a section that cannot be measured."""
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, "ascii"))
    seen = []

    def first():
        yield Row("a ≥ b", 2.0, "×", 1.5, True, "note")
        seen.append(said.getvalue())
        raise ValueError("the second row fails")

    monkeypatch.setattr(Bench, "sections", lambda self: {"first": first})
    assert main(["bench", "--quick", *form]) == 1
    sys.stdout.flush()
    if form:
        (row,) = json.loads(said.getvalue())["rows"]
        assert row["value"] == 2.0 and row["name"] == "a ≥ b"
    else:
        assert seen[0].startswith(b"a ? b") and b"2.00?" in seen[0]  # as soon as it is measured


def test_predict_answers_by_published_prices_and_says_whose(capsys, monkeypatch):
    monkeypatch.setattr(CALIBRATE, lambda *a, **k: pytest.fail("measured"))
    monkeypatch.setattr("earlyexit.runs.cache.time_model_path", lambda *_: Path("nowhere"))
    prices = published_prices("cpu")
    assert main(["predict", *SIZES, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    config = ModelConfig(300, 16, 3, dropout_p=0.0, gate_hidden=0)
    load = Load(config, 32, config.n_seq, "gate", tuple(geometric_shares(3, 2.0)))
    assert answer["speedup_time"] == pytest.approx(prices.speedup(load))
    assert answer["prediction_error"] == prices.check and prices.check["median_error"] > 0
    assert main(["predict", *SIZES]) == 0
    text = capsys.readouterr().out
    assert "published prices, results/cpu" in text and prices.machine["hardware"]["cpu"] in text


@pytest.mark.parametrize("asked", [["--refit"], ["--threads", "2"], ["unpriced"]])
def test_predict_measures_where_published_prices_do_not_hold(monkeypatch, tmp_path, asked):
    fits = []

    def measured(*_):
        fits.append(1)
        return TimeModel(PRICES, {})

    if asked == ["unpriced"]:
        asked, fewer = [], {"blocks": PRICES["blocks"]}
        few = TimeModel(fewer, {}, published_prices("cpu").machine)
        monkeypatch.setattr("earlyexit.commands.clocks.published_prices", lambda: few)
    monkeypatch.setattr("earlyexit.runs.cache.time_model_path", lambda *_: tmp_path / "none")
    monkeypatch.setattr("earlyexit.runs.cache.time_model", measured)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert main(["predict", *SIZES, *asked]) == 0
    assert fits == [1]


@pytest.mark.parametrize(
    "arguments, what",
    [
        (["bench", "--model", "nowhere.safetensors"], "nowhere"),
        (["bench", "--repeats", "0"], "repeats"),
        (["bench", "--device", "abacus"], "abacus"),
        (["predict", *SIZES, "--batch", "0"], "batch=0"),
        (["predict", *SIZES, "--criterion", "vibes"], "vibes"),
        (["predict", *SIZES, "--criterion", "depth"], "depth"),
        (["predict", *SIZES, "--mean-depth", "3.5"], "mean depth"),
        (["predict", *SIZES, "--mean-depth", "nan"], "mean depth"),
        (["predict", *SIZES, "--exit-shares", "0.5", "0.5"], "shares"),
        (["predict", *SIZES, "--exit-shares", "1", "1", "-1", "0"], "shares"),
        (["predict", *SIZES, "--top-k", "5"], "top_k=5: must be ≤ num_experts=4"),
        (["predict", *SIZES, "--threads", "-1"], "--threads"),
        (["predict", *SIZES, "--output-head", "hydra"], "hydra"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_measured(
    arguments, what, capsys, monkeypatch
):
    monkeypatch.setattr(CALIBRATE, lambda *a, **k: pytest.fail("measured"))
    monkeypatch.setattr(Bench, "sections", lambda self: pytest.fail("measured"))
    assert main(arguments) == 2
    assert what in capsys.readouterr().err


def test_predict_fits_once_and_answers_in_both_forms(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("EARLYEXIT_HOME", str(tmp_path))
    fits = []

    def calibrate(device):
        fits.append(device)
        return TimeModel(PRICES, check={"median_error": 0.05, "largest_error": 0.2}), None

    monkeypatch.setattr(CALIBRATE, calibrate)
    assert main(["predict", *SIZES, "--mean-depth", "1.5", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["speedup_layers"] == pytest.approx(2)
    assert answer["pays"] == (answer["speedup_time"] > 1)
    assert [told.split("=")[0] for told in answer["beyond"]] == ["d_model", "vocabulary"]
    total = sum(answer["parts"]["with exits"].values())
    assert answer["milliseconds"]["with exits"] == pytest.approx(total)
    shares = ["--exit-shares", "0.5", "0.5", "0", "0", "--criterion", "entropy"]
    assert main(["predict", *SIZES, *shares]) == 0
    text = capsys.readouterr().out
    assert "wall-clock" in text and "5% (median)" in text and "maximum probability" in text
    assert len(fits) == 1, "prices are kept"
    assert main(["predict", *SIZES, "--refit"]) == 0 and len(fits) == 2
