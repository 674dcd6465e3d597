"""A study refuses what cannot be trained, before any text is read; every profile makes a plan."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from earlyexit.evaluation.exit_heads import ExitBlockModel
from earlyexit.evaluation.recipes import RECIPES, WITHOUT_EXITS
from earlyexit.models.checkpoints import checkpoint_about, load_model
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.runs import runner
from earlyexit.runs.cache import Trained
from earlyexit.runs.parameters import NOTEBOOKS, as_dict
from earlyexit.runs.paths import project
from earlyexit.runs.profiles import PROFILES
from earlyexit.runs.provenance import read_record
from earlyexit.runs.settings import Settings
from earlyexit.study import Study


@pytest.mark.parametrize(
    ("parameters", "remedy"),
    [
        ({"overrides": {"tokenizer": "bpe"}}, "output_head='linear'"),
        ({"overrides": {"corpus": "folder"}}, "needs data_dir"),
        ({"overrides": {"model.d_model": 0}}, "d_model=0: must be ≥ 1"),
        ({"overrides": {"gate_hidden": 16}}, "profile has no field 'gate_hidden'"),
        ({"seeds": "[0]"}, r"^seeds='\[0\]': must be a list$"),
        ({"seeds": [0, 0]}, "seed twice"),
        ({"leak_epochs": "3"}, r"^leak_epochs='3': must be a number$"),
        ({"leak_tokens": 0}, "leak_tokens=0: must be ≥ 1"),
    ],
)
def test_a_study_refuses_what_it_cannot_mean(parameters, remedy):
    with pytest.raises(ValueError, match=remedy):
        Study("01_build", {"profile": "smoke", "device": "cpu"} | parameters)


def test_a_study_records_all_parameters_of_its_notebook_and_nothing_else():
    variables = {"profile": "smoke", "device": "cpu", "leak_tokens": 9, "__name__": "__main__"}
    recorded = Study("01_build", variables).outputs.record.parameters
    defaults = as_dict(NOTEBOOKS["01_build"]())
    assert recorded == defaults | {
        "profile": "smoke", "device": "cpu", "leak_tokens": 9, "seeds": [0]
    }  # fmt: skip


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_has_a_plan_a_model_and_a_training(name, monkeypatch):
    """Also those that this machine is too small for: the model is built without storage."""
    monkeypatch.setattr(runner, "check_hub", lambda corpus: None)  # the text is not looked for
    profile, plan = PROFILES[name], runner.plan(Settings(name))
    assert len(plan.steps) == len(NOTEBOOKS) and all(step.minutes for step in plan.steps)
    study = Study("01_build", {"profile": name, "device": "cpu"})
    study.corpus = SimpleNamespace(vocab_size=profile.corpus.vocab_size)
    with torch.device("meta"):
        model = EarlyExitLanguageModel.from_config(study.model_config())
    assert model.config == profile.model
    for name in profile.parameters("03_threshold_sweep").recipes:
        recipe = RECIPES[name]
        assert study.training_config(1, **recipe.training).epochs == profile.training.epochs
        assert study.model_config(**recipe.model).d_model == profile.model.d_model


def test_a_recipe_changes_model_and_training_and_adds_up_its_stages(monkeypatch):
    study, calls = Study("03_threshold_sweep", {"profile": "smoke", "device": "cpu"}), []
    made = Trained(None, None, "", None, seconds=7.0)
    monkeypatch.setattr(study, "train", lambda *args, **more: calls.append((*args, more)) or made)
    monkeypatch.setattr(study, "with_gates", lambda seed, trained: trained)
    whole, plain = {"epochs": study.profile.training.epochs}, EarlyExitLanguageModel
    made_of = {"max_tokens": 1000, "kind": plain, "backbone": None}
    assert study.recipe(0, "tokens, values kept", 1000).seconds == 7
    kept = {"left_behind": "kept"}
    assert calls.pop() == (0, kept, {"exit_sampling": "tokens"} | whole, made_of)
    study.recipe(0, "exit blocks", 1000)
    assert calls.pop() == (0, {}, whole, made_of | {"kind": ExitBlockModel})
    assert study.recipe(0, "exits first", 1000).seconds == 14
    half = {"epochs": whole["epochs"] / 2}
    assert calls[0] == (0, {}, half, {"max_tokens": 1000, "kind": plain})
    assert calls[1] == (0, {}, WITHOUT_EXITS | half, made_of | {"backbone": made})


PUBLISHED = [  # by this version
    path
    for path in sorted(project().results.glob("*/model_seed*.safetensors"))
    if not read_record(path.parent, "01_build").is_old
]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_published_models_are_those_of_their_profile(path):
    """Otherwise a study would train again what is there to be read."""
    profile, seed = PROFILES[path.parent.name], int(path.stem.removeprefix("model_seed"))
    assert checkpoint_about(path)["training"] == asdict(replace(profile.training, seed=seed))
    config = replace(profile.model, gate_hidden=profile.gates.hidden)
    assert load_model(path, config).n_layers == profile.model.n_layers
