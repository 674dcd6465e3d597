"""What is asked for on the command line reaches its place, or is refused in one line."""

from __future__ import annotations

import logging

import pytest
from tiny_project import write_notebook, write_project

from earlyexit.runs.freshness import discover
from earlyexit.runs.paths import project
from earlyexit.runs.profiles import LONGEST_LABEL, PROFILES, get_profile, label
from earlyexit.runs.settings import Settings, UsageError, read_value, resolve


@pytest.fixture
def notebooks(tmp_path):
    return discover(project(write_project(tmp_path)))


def test_settings_reach_the_right_place(notebooks):
    resolved = resolve(Settings("smoke", (1, 2), ("epochs=2", "rows=7")), notebooks)
    assert resolved.label == "smoke~epochs=2.0~rows=7~seeds=1,2"
    assert resolved.parameters["01_build"] == {
        "profile": "smoke",
        "seeds": [1, 2],
        "data_dir": "",
        "device": "auto",
        "overrides": {"epochs": 2.0},
        "rows": 7,
    }
    assert "rows" not in resolved.parameters["02_plot"]
    assert resolved.profile == get_profile("smoke", {"epochs": 2.0})


@pytest.mark.parametrize(
    ("asked", "sets", "all_of_them", "some"),
    [
        ((), (), (0, 1, 2), (0,)),
        ((), ("side_seeds=0",), (0, 1, 2), (0, 1, 2)),
        ((5, 3), (), (5, 3), (5,)),
    ],
)
def test_some_notebooks_are_about_every_seed(notebooks, asked, sets, all_of_them, some):
    resolved = resolve(Settings("cpu", asked, sets), notebooks)
    for notebook in ("01_build", "03_threshold_sweep", "08_study"):
        assert resolved.seeds_of(notebook) == all_of_them
    assert resolved.seeds_of("02_calibration") == resolved.seeds_of("a_readers_own") == some


@pytest.mark.parametrize(
    ("pair", "key", "value"),
    [
        ("model.bk_heads=8", "bk_heads", 8),
        ("training.weight_decay=0.1", "weight_decay", 0.1),
        ("tokenizer=word", "tokenizer", "word"),
        ("corpus.name=wikitext-2", "corpus", "wikitext-2"),
        ("gates.hidden=16", "gates.hidden", 16),
        ("training.batch_size=8", "training.batch_size", 8),
        ("model.expert_hidden=None", "expert_hidden", None),
        ("bf16=True", "bf16", True),
    ],
)
def test_every_field_has_a_dotted_key_and_the_shortest_names_the_folder(
    notebooks, pair, key, value
):
    resolved = resolve(Settings("smoke", sets=(pair,)), notebooks)
    assert resolved.parameters["01_build"]["overrides"] == {key: value}
    assert resolved.label == f"smoke~{key}={value}"


@pytest.mark.parametrize(
    ("pair", "complaint"),
    [
        ("batch_size=8", "name training.batch_size"),
        ("hidden=8", "name gates.hidden"),
        ("model.vocab_size=9", "use --set corpus.vocab_size"),
        ("model.gate_hidden=9", "use --set gates.hidden"),
        ("training.seed=1", "use --seeds"),
        ("epochs=0", "epochs=0: must be > 0"),
        ("top_k=5", "top_k=5: must be ≤ num_experts=4"),
        ("d_model=2", "no adaptive output head of 500 words and width 2"),
        ("tokenizer=bpe", "with tokenizer='bpe' set output_head='linear'"),
        ("rows=true", "rows=True: must be a whole number"),
        ("=3", "expected key=value"),
    ],
)
def test_wrong_values_and_keys_are_refused(notebooks, pair, complaint):
    with pytest.raises(UsageError, match=complaint):
        resolve(Settings("smoke", sets=(pair,)), notebooks)


def test_a_parameter_that_notebooks_share_can_be_set_in_one(tmp_path):
    paths = [write_notebook(tmp_path, f"0{i}_x", [], extra="rows: int = 3  #\n") for i in (1, 2)]
    both = resolve(Settings("smoke", sets=("rows=7",)), paths).parameters
    assert [both[name]["rows"] for name in ("01_x", "02_x")] == [7, 7]
    one = resolve(Settings("smoke", sets=("02.rows=7",)), paths)
    assert [one.parameters[name]["rows"] for name in ("01_x", "02_x")] == [3, 7]
    assert one.label == "smoke~02.rows=7"


def test_a_cell_saved_with_other_values_changes_nothing(tmp_path, caplog):
    source = (project().notebooks / "01_build.ipynb").read_text()
    path = tmp_path / "01_build.ipynb"
    path.write_text(source.replace("leak_tokens: int = 120000", "leak_tokens: int = 7"))
    with caplog.at_level(logging.WARNING):
        resolved = resolve(Settings("cpu"), [path])
    assert resolved.parameters["01_build"]["leak_tokens"] == 120_000
    assert "01_build: run does not take" in caplog.text
    assert "--set=leak_tokens=7" in caplog.text


def test_a_notebook_must_take_the_common_parameters(tmp_path):
    path = write_notebook(tmp_path, "01_x", [])
    path.write_text(path.read_text().replace("device: str", "device: int"))
    with pytest.raises(UsageError, match="01_x: its parameters cell needs `device: str`"):
        resolve(Settings("smoke"), [path])


def test_results_of_a_folder_can_be_looked_at_without_it(notebooks):
    asked = Settings("smoke", sets=("corpus=folder",), data_dir=None)
    assert resolve(asked, notebooks).label == "smoke~corpus=folder"


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("1e-3", 1e-3), ("true", True), ("False", False), ("None", None), ("word", "word"),
     ("[0.5, 1]", [0.5, 1]), ('{"a": 1}', {"a": 1}), ("[1", "[1")],
)  # fmt: skip
def test_values_are_read_as_json_or_text(text, value):
    assert read_value(text) == value and type(read_value(text)) is type(value)
    assert read_value(text, str) == text


def test_a_label_of_many_settings_is_a_legal_file_name():
    many = {f"key{i}": "ä" * 9 for i in range(30)}
    long, other = label("cpu", many), label("cpu", many | {"key29": "b"})
    assert len(long.encode()) <= LONGEST_LABEL and long != other
    assert long.startswith("cpu~key0=äääääääää~") and "~and-" in long
    assert len(label("cpu", {"epsilons": [0.001] * 99}).encode()) <= LONGEST_LABEL


def test_a_label_says_the_same_whichever_way_it_was_asked():
    assert label("cpu", {"training.epochs": 2.0}) == label("cpu", {"epochs": 2.0})
    assert label("cpu", {}, PROFILES["cpu"].seeds) == "cpu"
    assert label("cpu", {}, [0]) == "cpu~seeds=0"
