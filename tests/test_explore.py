"""The explorer shows the package's own numbers, of any threshold, tolerated loss and text."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import Split

from earlyexit.calibration.collect import collect_trace
from earlyexit.calibration.thresholds import fit_policy
from earlyexit.corpus.load import encode_texts
from earlyexit.corpus.tokenizers import WORD
from earlyexit.cost.parts import Load, run_flops, work
from earlyexit.cost.time_model import TimeModel
from earlyexit.exits.policy import ExitPolicy
from earlyexit.explore import BATCH, SHOWN, Explorer


@pytest.fixture(scope="module")
def explorer(make_model, corpus):
    """An explorer of a random model, by prices of one second for each launch."""
    model, tokenizer = make_model(), Tokenizer.from_str(corpus.tokenizer.to_str())
    tokenizer.pre_tokenizer = Split(Regex(WORD), behavior="removed", invert=True)
    corpus = replace(corpus, tokenizer=tokenizer)
    traces = {name: collect_trace(model, corpus.splits[name], 1) for name in ("fit", "test")}
    load = Load(model.config, 2, 8, "margin", (0.5, *[0.0] * (model.n_layers - 1), 0.5))
    prices = TimeModel({part: {"launches": 1.0} for part in work(load)}, {})
    return Explorer(model, corpus, traces["fit"], traces["test"], prices)


def token_by_token(explorer, criterion: str, threshold: float) -> list[int]:
    """Layers executed by each test token, by the definition of the exit rule."""
    scores, n_layers = explorer.test.score(criterion), explorer.test.n_layers
    above = criterion != "entropy"
    layers = []
    for row in scores:
        passed = [k for k in range(n_layers - 1) if (row[k] >= threshold) == above]
        layers.append(passed[0] + 1 if passed else n_layers)
    return layers


@pytest.mark.parametrize("criterion", ["margin", "entropy", "saturation"])
def test_a_threshold_is_read_out_as_the_rule_says(explorer, criterion):
    threshold = explorer.thresholds(criterion)[len(explorer.thresholds(criterion)) // 2]
    layers = np.array(token_by_token(explorer, criterion, threshold))
    assert 1 < layers.mean() < explorer.test.n_layers  # some leave, not all
    read = explorer.read_out(explorer.at(criterion, threshold))
    nll = explorer.test.nll[np.arange(len(layers)), layers - 1].mean(dtype=float)
    full = explorer.test.nll[:, -1].mean(dtype=float)
    assert read["perplexity"] == pytest.approx(np.exp(nll))
    assert read["quality_loss"] == pytest.approx(np.exp(nll - full) - 1)
    assert read["speedup_layers"] == pytest.approx(explorer.test.n_layers / layers.mean())
    running = [(layers > k).mean() for k in range(explorer.test.n_layers)]
    policy = explorer.at(criterion, threshold)
    positions = np.array(running) * explorer.model.operations().positions
    flops = run_flops(explorer.model, positions, policy, stops=True)["speedup_flops"]
    assert read["speedup_flops"] == pytest.approx(flops)


def test_a_tolerated_loss_is_kept_on_the_part_that_chooses(explorer):
    for epsilon in (0.001, 0.05, 1.0):
        policy = explorer.within("margin", epsilon)
        assert explorer.fit.evaluate(policy)["quality_loss"] <= epsilon
    assert policy == fit_policy(explorer.fit, "margin", 1.0, "global")
    full = explorer.within("margin", 1e-12)
    assert explorer.read_out(full)["speedup_layers"] == 1.0
    assert explorer.read_out(full)["speedup_time"] == 1.0


def test_time_is_predicted_from_prices_or_not_at_all(explorer):
    policy = explorer.at("margin", explorer.thresholds("margin")[20])
    shares = tuple(explorer.shares(policy))
    load = Load(explorer.model.config, BATCH, explorer.test.n_seq, "margin", shares)
    launches = [
        sum(kinds.get("launches", 0) for kinds in work(one).values())
        for one in (load.at_full_depth, load)
    ]
    assert explorer.read_out(policy)["speedup_time"] == pytest.approx(launches[0] / launches[1])
    fewer = {part: kinds for part, kinds in explorer.prices.prices.items() if part != "head"}
    for prices in (TimeModel(fewer, {}), None):
        without = Explorer(explorer.model, explorer.corpus, explorer.fit, explorer.test, prices)
        assert np.isnan(without.read_out(policy)["speedup_time"])
        assert "no price" in without.numbers_html(policy)


def test_a_text_of_the_readers_own_is_read_as_the_package_reads_it(explorer):
    text = "3 4 5 zyx 7\n\n8 <b> 9"
    passage = explorer.passage(text)
    policy = explorer.at("margin", explorer.thresholds("margin")[20])
    assert passage.words == ["3", "4", "5", "zyx", "7", "<eos>", "8", "<", "b", ">", "9", "<eos>"]
    unknown = [w for w, known in zip(passage.words, passage.known, strict=True) if not known]
    assert unknown == ["zyx", "<", "b", ">"]
    split = encode_texts(explorer.corpus, [text], "test")
    trace = collect_trace(explorer.model, split, 1)
    table = explorer.read(policy, passage)
    layers = np.minimum(trace.exit_layers(policy) + 1, trace.n_layers)
    assert table["layers"].tolist() == layers.tolist()
    assert table["nll"].to_numpy() == pytest.approx(trace.nll[np.arange(len(layers)), layers - 1])
    page = explorer.passage_html(policy, passage)
    assert "<s>zyx</s>" in page and "<s>&lt;</s>" in page and "4 unknown" in page
    shown = re.findall(r'title="(\d+) layers?"', page)
    assert [int(n) for n in shown] == layers.tolist()


def test_a_long_text_is_counted_whole_and_shown_in_part(explorer):
    passage = explorer.passage("3 4 5\n" * SHOWN)
    assert len(passage.words) == len(passage.known) == SHOWN
    assert passage.trace.n_tokens == 4 * SHOWN
    policy = ExitPolicy.static(1, explorer.test.n_layers)
    assert f"first {SHOWN} of {4 * SHOWN:,} words" in explorer.passage_html(policy, passage)


# ------------------------------------------------------------------ the widget


def test_controls_move_what_is_shown(explorer):
    box = explorer.widget()
    criterion, turned, epsilon, threshold, numbers, pasted, coloured = box.children
    assert criterion.value == explorer.criteria[0] and epsilon.value == explorer.epsilon
    assert threshold.layout.display == "none" and epsilon.layout.display is None
    policy = explorer.within(criterion.value, epsilon.value)
    assert numbers.value == explorer.numbers_html(policy)
    epsilon.value = 0.2
    assert numbers.value == explorer.numbers_html(explorer.within(criterion.value, 0.2))
    criterion.value, turned.value = "margin", "threshold"
    assert threshold.layout.display is None and epsilon.layout.display == "none"
    assert [value for _, value in threshold.options] == explorer.thresholds("margin")
    threshold.index = 30
    policy = explorer.at("margin", threshold.value)
    assert numbers.value == explorer.numbers_html(policy)
    assert coloured.value == explorer.passage_html(policy, explorer.first_words)
    pasted.value = "3 4 nobody"
    assert "<s>nobody</s>" in coloured.value
    pasted.value = " "
    assert coloured.value == explorer.passage_html(policy, explorer.first_words)


def test_a_page_without_a_kernel_shows_how_it_stands_first(explorer):
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    policy = explorer.within(explorer.criteria[0], explorer.epsilon)
    assert explorer.numbers_html(policy) in bundle["text/html"]
    assert len(bundle["text/html"]) < 100 * SHOWN + 3000  # bytes: it goes into executed notebooks
