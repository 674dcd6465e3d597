"""The README's numbers are those of the results."""

from __future__ import annotations

import re
import shlex

import pandas as pd
import pytest
from tiny_project import write_project

from earlyexit import stages
from earlyexit.__main__ import main
from earlyexit.runs import publish, runner
from earlyexit.runs.artifacts import MissingResult, read_table
from earlyexit.runs.cache import Trained
from earlyexit.runs.paths import project
from earlyexit.runs.profiles import PROFILES
from earlyexit.runs.provenance import Record


def test_the_readme_quotes_the_results_that_are_here():
    assert publish.check(project().readme) == []


def test_blocks_are_rewritten_and_the_rest_is_not(tmp_path, monkeypatch):
    path = write_project(tmp_path) / "README.md"
    path.write_text("a\n<!-- generated: twice -->\nold\n<!-- end -->\nb 3.5\n")
    monkeypatch.setitem(publish.BLOCKS, "twice", lambda root: "| 1 |")
    assert publish.check(path, tmp_path) == ["twice"]
    assert publish.update(path, tmp_path) == ["twice"]
    assert path.read_text() == "a\n<!-- generated: twice -->\n| 1 |\n<!-- end -->\nb 3.5\n"
    assert publish.update(path, tmp_path) == []


def test_a_block_without_results_says_how_to_make_them(tmp_path, monkeypatch):
    def block(root):
        raise MissingResult("results/cpu/x.csv is missing: run `this`")

    path = tmp_path / "README.md"
    path.write_text("<!-- generated: gone -->\n<!-- end -->\n")
    monkeypatch.setitem(publish.BLOCKS, "gone", block)
    publish.update(path, tmp_path)
    assert "*Results are missing: results/cpu/x.csv is missing: run `this`.*" in path.read_text()
    path.write_text("<!-- generated: misspelt -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="'misspelt' is unknown; there are"):
        publish.check(path, tmp_path)


def test_the_status_block_names_profiles_without_results(tmp_path):
    text = publish.status_block(tmp_path)
    assert "| cpu | none yet: `python -m earlyexit run --profile cpu` |" in text
    assert "smoke" not in text


def test_the_profiles_show_minutes_and_memory_of_their_records(tmp_path):
    def record(label, notebook, **measured):
        made = Record(notebook, label, "", "", {}, None, None, {}, {}, "", **measured)
        made.write(tmp_path / "results" / label)

    record("cpu", "01_build", seconds=600.0, peak_mib=2048.0)
    record("cpu", "02_plot", seconds=90.0, peak_mib=512.0)
    record("recipes", "01_build", seconds=59.0)
    record("cpu~epochs=2.0", "01_build", seconds=1e6, peak_mib=1e6)
    lines = publish.profiles_block(tmp_path).splitlines()
    rows = dict(line.strip("| ").split(" | ", 1) for line in lines if "---" not in line)
    assert rows["`cpu`"].endswith("three seeds | 2 | 12 | 2.0 GiB")
    assert rows["`recipes`"].endswith("training exits | 1 | 1 | not recorded")
    assert rows["`gpu`"].endswith("for a GPU | not run")
    assert {row.strip("`") for row in rows} >= set(PROFILES)


def test_a_card_says_what_the_weights_are(make_model):
    model = make_model(gate_hidden=None)
    history = pd.DataFrame({"step": [1, 2], "perplexity_0": [9.0, 7.25], "perplexity_1": [9, 7]})
    trained = {3: Trained(model, history, "hash", pd.DataFrame())}
    text = publish.model_card(PROFILES["cpu"], "cpu", trained, "f" * 64, {3: "model_seed3.st"})
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in text
    assert "Seeds: 3." in text and "| 3 | 0 | 7.2 |\n| 3 | 1 | 7.0 |\n\n## Use" in text
    assert "| d_model | 16 |" in text and "gate_hidden" not in text
    assert 'load_model("results/cpu/model_seed3.st")' in text
    assert "01_build` trains them" in publish.model_card(PROFILES["cpu"], "cpu", trained, "f", {})


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.1, 0.2, "worse"), (-0.2, -0.1, "better"), (-0.1, 0.1, "not told apart")],
)
def test_a_difference_is_a_verdict_only_with_its_whole_interval(low, high, verdict):
    rows = pd.DataFrame({"difference": [(low + high) / 2], "low": [low], "high": [high]})
    assert publish._against(rows) == (
        f"{(low + high) / 2:+.1%} ({low:+.1%} to {high:+.1%}), {verdict}"
    )
    assert publish._better(rows) == (verdict == "better")
    many = pd.concat([rows.assign(difference=rows["difference"] + d) for d in (-1e-3, 0, 1e-3)])
    assert publish._against(many).endswith(verdict)


@pytest.mark.parametrize(
    ("template", "pattern"),
    [("answer", r"\*\*([^*|]*?)×\*\* fewer"), ("detail", r"\| learned gate[^|]*\| ([^|]*?)× \|")],
)
def test_the_answer_of_several_seeds_holds_their_range(monkeypatch, template, pattern):
    def two_seeds(profile, name, root):
        one = read_table(profile, name, root).query("seed == 0")
        front = {"speedup_layers", "speedup_flops"} & set(one)
        return pd.concat([one, one.assign(seed=9, **{column: 3 * one[column] for column in front})])

    monkeypatch.setattr(publish, "read_table", two_seeds)
    (layers,) = re.findall(pattern, publish.block(f"{template}.md", "cpu", project().root))
    mean, least, largest = map(float, re.findall(r"\d+\.\d+", layers))
    assert layers == f"{mean:.2f} [{least:.2f}, {largest:.2f}]"
    assert (mean, largest) == pytest.approx((2 * least, 3 * least), abs=0.02)


def test_a_table_of_ways_to_stop_has_a_row_for_each():
    lines = publish.block("detail.md", "cpu", project().root).splitlines()
    end = lines.index("")
    assert all(line.startswith("|") and line.count("|") == 7 for line in lines[:end])
    names = [row.split(" | ")[0] for row in lines[2:end]]
    layers = PROFILES["cpu"].model.n_layers
    assert len(names) == len(set(names)) == 6 + (layers - 1) + layers  # and a model of every depth
    assert "trained alone, 4 layers | 1.00× | 1.00× |" in "".join(lines[:end])


def test_studies_stand_side_by_side():
    """Every row has a number for every study that is published, the same as its own blocks say."""
    header, _, *rows = publish.studies_block(project().root).splitlines()
    studies = re.findall(r"`([\w-]+)`", header)
    last = "10_generation.run.json"
    published = [s for s in publish.STUDIES if (project().results / s / last).is_file()]
    assert studies == published
    assert all(row.count("|") == 2 + len(studies) and "| |" not in row for row in rows)
    detail = publish.block("detail.md", "cpu", project().root)
    (gate,) = re.findall(r"learned gate[^|]*\| ([^|]*×) \|", detail)
    assert f"| **gate: layers** | **{gate}** |" in "\n".join(rows)


@pytest.mark.parametrize(("sign", "told"), [(1, "worse"), (-1, "better"), (0, "not told apart")])
def test_who_wins_is_computed(monkeypatch, sign, told):
    def given(profile, name, root):
        table = read_table(profile, name, root).query("seed == 0")
        if name != "rivals":
            return table
        apart = [sign * 0.02 + d for d in (-0.001, 0.0, 0.001)]
        ends = [{"difference": d, "low": d - 0.005, "high": d + 0.005} for d in apart]
        return pd.concat([table.assign(seed=k, **each) for k, each in enumerate(ends)])

    monkeypatch.setattr(publish, "read_table", given)
    answer = publish.block("answer.md", "cpu", project().root)
    assert re.search(rf"at equal time, [^*;]*\), {told}\*\*", answer)


def test_seeds_that_disagree_leave_a_verdict_open():
    """Each seed's documents say better; the seeds, as three units, do not."""
    apart = pd.DataFrame({"difference": [-0.01, -0.02, -0.06]})
    rows = apart.assign(low=apart["difference"] - 0.005, high=apart["difference"] + 0.005)
    assert publish._against(rows) == "-3.0% (-9.6% to +3.6%), not told apart"
    assert publish._against(rows.iloc[:1]) == "-1.0% (-1.5% to -0.5%), better"


def test_a_policy_is_called_a_cut_where_it_is_one():
    """In one seed of two all tokens leave after the first layer, as by its static exit."""
    about = {"epsilon": 0.05, "speedup_layers": 2.0}
    front = pd.DataFrame(
        [
            {"seed": 0, "criterion": "static", "perplexity": 9.0, "speedup_layers": 2.0},
            {"seed": 1, "criterion": "static", "perplexity": 8.0, "speedup_layers": 2.0},
            {"seed": 0, "criterion": "gate", "perplexity": 9.0} | about,
            {"seed": 1, "criterion": "gate", "perplexity": 7.0} | about,
        ]
    )
    assert publish._cut(front, "gate", 0.05) == " (a plain cut in 1 of 2 seeds)"
    assert publish._cut(front[front["seed"] == 1], "gate", 0.05) == ""


@pytest.mark.slow
def test_the_commands_it_shows_are_accepted(monkeypatch):
    """Those for hours of work, up to where it would begin; the others are run with the notebooks."""
    lines = re.findall(r"python -m earlyexit (run[^`#\n]*)", project().readme.read_text("utf-8"))
    long = {line.strip() for line in lines if "--set" not in line and "--seeds" not in line}
    assert len(long) >= 2
    monkeypatch.setattr(runner, "check_hub", lambda corpus: None)  # the text is not looked for
    staged = []
    monkeypatch.setattr(stages, "run", lambda settings, name, seeds: staged.append((name, seeds)))
    for line in long:
        arguments = [a for a in shlex.split(line) if a != "--dry-run"]
        arguments += [] if "--stage" in arguments else ["--dry-run"]
        assert main(arguments) == 0, line
    assert staged and {name for name, _ in staged} <= set(stages.STAGES)
