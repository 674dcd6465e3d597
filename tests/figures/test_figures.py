"""Every figure draws on the axes it is given and nowhere else, or makes a figure of its own."""

from __future__ import annotations

import inspect
from itertools import combinations, product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from earlyexit import figures

DRAWING = {
    name: function
    for name, function in vars(figures).items()
    if inspect.isfunction(function)
    and name
    not in {
        *("coloured_html", "coloured_words", "label_of", "layer_colours", "setting_of", "use_style")
    }
}


def grid(**columns) -> pd.DataFrame:
    """A row for each combination of values."""
    return pd.DataFrame(list(product(*columns.values())), columns=list(columns))


def between(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Columns of plausible numbers between 1 and 2."""
    rng = np.random.default_rng(0)
    return table.assign(**{c: 1 + rng.random(len(table)) for c in columns})


def interval(table: pd.DataFrame, y: str) -> pd.DataFrame:
    return table.assign(low=table[y] - 0.1, high=table[y] + 0.1)


HISTORY = between(grid(seed=[0, 1], tokens=[1e6, 2e6]), "train_nll", "perplexity_0", "perplexity_1")
PARTS = grid(part=["norm", "head"]).assign(group=["block", "head"], share_of_block=[0.02, 20.0])
BINS = between(grid(seed=[0], exit=[0, 1], calibration=["before", "after"], bin=[0.2, 0.6]))
BINS = BINS.assign(confidence=BINS["bin"], accuracy=BINS["bin"], share=0.5)
ERRORS = grid(seed=[0], exit=[0, 1], calibration=["before", "after"], ece=[0.1])
SPEEDUPS = ("speedup_layers", "speedup_flops", "speedup_time")
POLICIES = between(
    grid(seed=[0, 1], criterion=["gate", "patience"], threshold=np.linspace(0, 1, 15)),
    *("quality_loss", "layers", *SPEEDUPS),
)
POLICIES["quality_loss"] /= 10
STATIC = POLICIES[:2].assign(criterion="static", threshold=np.nan, exit_layer=[0, 1])
ORACLE = POLICIES[:15].assign(criterion="oracle (kl)", threshold=np.nan, price=range(15))
CURVES = pd.concat([POLICIES, STATIC, ORACLE], ignore_index=True)
CLAIMS = pd.DataFrame({"speedup": [2.0], "quality_loss": [0.05]})
EXITS = between(
    grid(seed=[0, 1], exit=[0, 1, 2]).assign(recipe="joint"), "perplexity", "agreement", "kl"
)
SHARES = grid(threshold=[0.1, 0.5], exit_layer=[0, 1, 2]).assign(share=0.3, layer_equivalents=0.6)
SHARES["layer_equivalents"] = SHARES["share"] * (SHARES["exit_layer"] + 1)
RUNS = grid(run=["full", "dense", "original"], part=["blocks", "head"]).assign(
    milliseconds=1.0, total_ms=2.5
)
TIMES = interval(between(grid(execution=["dense"], depth=[2, 3]), *SPEEDUPS), "speedup_time")
BATCHES = between(
    grid(batch=[1, 4], execution=["dense", "compacted"], grouping=["random"]),
    *("tokens_per_second", "layers_run"),
)
PROPAGATION = pd.concat(
    [
        grid(by=["layers executed", "position"], value=[1, 2], cost=[0.1, 0.2]),
        pd.DataFrame({"by": ["all"], "value": [0], "cost": [0.1]}),
    ]
)
WAYS = interval(
    between(grid(way=["full depth", "kept"], stay=[np.nan, 0.3]), *SPEEDUPS, "quality_loss"),
    "speedup_time",
).assign(in_use=[False, False, True, True])
HEADS = between(
    grid(head=["tied", "full"]),
    *(f"{task}{exits}_ms" for task in ("scoring", "prediction") for exits in ("", "_exits")),
)
CHECKED = between(grid(criterion=["gate"], used=["fitted", "checked"]), "measured_ms")
CHECKED["predicted_ms"] = CHECKED["measured_ms"]
SIZES = {"criterion": ["gate", "entropy"], "n_layers": [4], "batch": [1, 32]}
MAP = grid(**SIZES, head_ratio=[1.0, 10.0], executed=[0.5, 1.0])
MAP["speedup_time"] = 1.5 / MAP["executed"] / MAP["head_ratio"] ** 0.5
CERTIFICATES = between(
    grid(policy=["fitted", "certified"], epsilon=[0.01, 0.05]), "test_quality_loss"
).assign(test_speedup_layers=[1.1, 1.5, np.nan, 1.2])
AUDIT = interval(
    grid(units=["synthetic", "documents"], procedure=["last"], n=[30, 100], rate=[0.1]), "rate"
)
BOUNDS = between(grid(method=["betting", "bentkus"], n=[10, 100, 120, 1000]), "mean", "bound")
LEAST = pd.DataFrame({"n": [10, 100], "level": [0.1, 0.01]})
SPARSE = between(
    pd.DataFrame({"heads": [4, 8], "batch": 2, "positions": 16, "d_model": 8}),
    *("at_most", "measured"),
)
SYSTEMS = between(
    grid(system=["plain", "ACT"], policy=[0, 1]), "quality_loss", "speedup_layers", "speedup_flops"
)
ALONE = SYSTEMS[SYSTEMS["policy"] == 0]
PRODUCTS = pd.DataFrame({"claim": ["a", "b (c)"], "claimed": [4.0, np.nan], "time": [0.8, 1.5]})
ACT = between(grid(exits=["as converted", "ACT itself"], layers=[1.0, 2.0]), "perplexity")
WORDS = grid(seed=[0, 1], word_class=["<eos>", "word"], share=[0.5], layers=[1.5])
POSITIONS = between(grid(seed=[0, 1], position=[0, 8]), "layers", "nll")
DEPTH = between(
    grid(seed=[0, 1], system=["trained alone", "no mixing", "5-gram"], layers=[1, 3]),
    "perplexity_test",
)
RISES = grid(seed=[0, 1], exit_layer=[0, 1], context=[0, 1, 96])
RISES = RISES.assign(rise_nats=1 / (1 + RISES["context"]), standard_error=0.002)
BINNED = between(grid(seed=[0], exit_layer=[0, 1], position=[0, 1, 2]), "nll", "standard_error")
CHANGED = between(grid(change=["as it is", "attention"], seed=[0, 1]), "perplexity_fit")
MEMORY = between(grid(execution=["full", "dense"], batch=[1, 8]), "logits_mib", "rest_mib")

RIVALS = between(
    grid(seed=[0, 1], epsilon=[0.01, 0.05], cost=["FLOPs", "time"]),
    *("speedup", "perplexity", "rival_perplexity"),
)

# For each figure the arguments, and its number of panels.
DECODED = grid(method=["full depth", "exits, certified"], batch=[1, 8], temperature=[0.0, 1.0])
DECODED = between(DECODED, "speedup_time")
DRAFTS = grid(temperature=[0.0, 1.0], exit_layer=[0, 1], draft=[1, 4])
DRAFTS = between(DRAFTS, "acceptance", "needed") - [0, 0, 0, 1, 1]
DRAFTS.loc[0, "needed"] = np.nan
SPENT = grid(method=["full depth", "lossless"], part=["layers", "rest"])
SPENT = SPENT.assign(microseconds=[20.0, 2.0, 15.0, -0.5])
CASES = {
    "ablation": ((CHANGED,), 1),
    "act_conversion": ((ACT,), 1),
    "bound_widths": ((BOUNDS, 0.05, LEAST), 1),
    "break_even": ((MAP, MAP[::3]), 4),
    "break_even_map": ((MAP, MAP[::3], "gate", 4, 32), 1),
    "claimed_measured": ((PRODUCTS,), 1),
    "coloured_text": ((["the", "<eos>", "end"], np.array([1, 2, 2]), 2, 6), 1),
    "decoding": ((DECODED, DRAFTS, SPENT), 3),
    "decoding_parts": ((SPENT,), 1),
    "decoding_speeds": ((DECODED,), 1),
    "draft_break_even": ((DRAFTS,), 1),
    "combination_curves": ((SYSTEMS, ALONE, 0.05, "speedup_layers"), 1),
    "combinations": ((SYSTEMS, ALONE, 0.05), 2),
    "compaction": ((TIMES,), 2),
    "compaction_efficiency": ((TIMES,), 1),
    "compaction_speedups": ((TIMES,), 1),
    "confidence_shares": ((BINS, 0), 1),
    "cost_shares": ((PARTS,), 1),
    "depth_by_class": ((WORDS,), 1),
    "depth_by_position": ((POSITIONS,), 2),
    "depth_and_memory": ((DEPTH, RISES), 2),
    "depth_curve": ((DEPTH,), 1),
    "equal_cost": (
        (interval(between(grid(seed=[0, 1], depth=[1, 2]), "difference"), "difference"),),
        1,
    ),
    "exit_distribution": ((SHARES, "gate", 0.5), 1),
    "exit_distributions": ((SHARES, "gate"), 2),
    "exit_quality": ((EXITS,), 3),
    "front": ((CURVES, CLAIMS), 3),
    "layer_equivalents": ((SHARES,), 1),
    "left_behind": ((WAYS,), 1),
    "leak": ((between(grid(model=["causal"], future=["true", "replaced"]), "perplexity"),), 1),
    "lines": ((MEMORY, "batch", "rest_mib", "execution", "batch", "MiB"), 1),
    "loss_against": ((CURVES, CLAIMS, "speedup_time"), 1),
    "memory": ((MEMORY,), 1),
    "memory_curve": ((RISES,), 1),
    "output_head_times": ((HEADS, "scoring"), 1),
    "output_heads": ((HEADS,), 2),
    "position_curve": ((BINNED,), 1),
    "over_batch_sizes": ((BATCHES, "layers_run"), 1),
    "over_threshold": ((POLICIES, "gate", "quality_loss"), 1),
    "pareto": ((CURVES, "speedup_layers", "speedup"), 1),
    "part_times": ((PARTS,), 1),
    "predicted_measured": ((CHECKED,), 1),
    "price_of_certainty": ((CERTIFICATES,), 1),
    "propagation": ((PROPAGATION,), 2),
    "propagation_by": ((PROPAGATION, "position"), 1),
    "recipes": ((EXITS.assign(difference=0.03 * EXITS["exit"], gate_speedup_layers=2.0),), 1),
    "reliability": ((BINS, ERRORS), 4),
    "reliability_diagram": ((BINS, ERRORS, 1), 1),
    "rivals": ((RIVALS,), 2),
    "rivals_at": ((RIVALS[RIVALS["cost"] == "time"], "speedup (time)"), 1),
    "run_parts": ((RUNS, "original"), 2),
    "sparse_limits": ((SPARSE,), 1),
    "speedups": ((TIMES,), 1),
    "target_achieved": ((CERTIFICATES,), 1),
    "threshold_sweep": ((POLICIES,), 4),
    "throughput": ((BATCHES,), 2),
    "time_by_part": ((RUNS,), 1),
    "trained_exits": ((HISTORY,), 1),
    "training_curves": ((HISTORY,), 2),
    "training_nll": ((HISTORY,), 1),
    "violation_rate": ((AUDIT[:2], 0.05), 1),
    "violation_rates": ((AUDIT, 0.05), 2),
}


@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    plt.close("all")


def test_every_figure_has_a_case_and_takes_ax():
    assert set(CASES) == set(DRAWING)
    for name, function in DRAWING.items():
        ax = inspect.signature(function).parameters["ax"]
        assert (ax.kind, ax.default) == (inspect.Parameter.KEYWORD_ONLY, None), name


@pytest.mark.parametrize("name", CASES)
def test_draws_on_the_given_axes_and_nowhere_else(name):
    arguments, n_panels = CASES[name]
    fig, axes = plt.subplots(1, n_panels + 1)
    *given, other = axes
    drawn = DRAWING[name](*arguments, ax=given[0] if n_panels == 1 else given)
    assert list(np.ravel(drawn)) == given
    assert isinstance(drawn, np.ndarray) == (n_panels > 1)
    assert plt.get_fignums() == [fig.number]
    assert fig.axes == list(axes)
    assert not fig.legends and not fig.texts and fig._supxlabel is None and fig._supylabel is None
    assert all(ax.has_data() or ax.texts for ax in given)
    assert not other.has_data() and not other.texts and other.get_legend() is None
    fig.draw_without_rendering()


@pytest.mark.parametrize("name", CASES)
def test_makes_a_figure_of_its_own(name):
    arguments, n_panels = CASES[name]
    drawn = np.ravel(DRAWING[name](*arguments))
    assert len(drawn) == n_panels
    assert plt.get_fignums() == [drawn[0].figure.number]
    assert all(ax.figure is drawn[0].figure for ax in drawn)


@pytest.mark.parametrize("name", CASES)
def test_fills_a_column_or_a_page_and_nothing_is_cut(name):
    """A paper prints it at its size: a legend that leaves the figure would be lost."""
    figure = np.ravel(DRAWING[name](*CASES[name][0]))[0].figure
    width, height = figure.get_size_inches()
    assert width in (3.4, 7.0)
    figure.draw_without_rendering()
    drawn = figure.get_tightbbox()
    assert drawn.x0 > -0.02 and drawn.y0 > -0.02, "inches"
    assert drawn.x1 < width + 0.02 and drawn.y1 < height + 0.02


@pytest.mark.parametrize("name", [name for name, (_, n_panels) in CASES.items() if n_panels > 1])
def test_as_many_axes_as_panels(name):
    arguments, n_panels = CASES[name]
    with pytest.raises(ValueError, match=f"1 axes given: give {n_panels}, row by row"):
        DRAWING[name](*arguments, ax=[plt.subplots()[1]])


@pytest.mark.parametrize("name", CASES)
def test_no_two_labels_of_an_axis_touch(name):
    figure = np.ravel(DRAWING[name](*CASES[name][0]))[0].figure
    figure.draw_without_rendering()
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        labels = [t.label1 for t in ticks if t.label1.get_visible() and low <= t.get_loc() <= high]
        boxes = {label.get_text(): label.get_window_extent().padded(1) for label in labels}
        boxes.pop("", None)
        touching = [p for p in combinations(boxes, 2) if boxes[p[0]].overlaps(boxes[p[1]])]
        assert touching == []


def test_settings_are_the_first_number_of_a_row():
    table = pd.DataFrame(
        {"threshold": [0.7, None, None], "exit_layer": [None, 2, None], "price": [None, None, 9.0]}
    )
    assert figures.setting_of(table).tolist() == [0.7, 2, 9]
    assert figures.setting_of(table[["exit_layer"]]).isna().tolist() == [True, False, True]


def test_points_are_means_over_seeds_per_setting():
    curves = grid(seed=[0, 1], exit_layer=[0, 1]).assign(criterion="static", threshold=np.nan)
    curves = curves.assign(speedup=[2.0, 1.0, 2.0, 1.0], quality_loss=[0.1, 0.0, 0.2, 0.0])
    points = figures.pareto(curves, "speedup", "speedup").containers[0].lines[0]
    np.testing.assert_allclose(points.get_xydata(), [[2, 0.15], [1, 0]])


def test_a_page_has_every_word_and_escapes_it():
    page = figures.coloured_html(["a<b", "<eos>"], np.array([1, 2]), 2, "Title")
    first, second = figures.layer_colours(2)
    assert f'<span style="background:{first}" title="1 layer">a&lt;b</span>' in page
    assert f'<span style="background:{second}" title="2 layers">¶</span> <br>' in page
