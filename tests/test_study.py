"""A study refuses what cannot be trained, before any text is read; every profile makes a plan."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.runs import runner
from earlyexit.runs.profiles import PROFILES
from earlyexit.runs.settings import Settings
from earlyexit.study import Study
from earlyexit.training.config import RECIPES


@pytest.mark.parametrize(
    "overrides, remedy",
    [
        ({"tokenizer": "bpe"}, "output_head='linear'"),
        ({"bf16": True}, "bf16=false"),
    ],
)
def test_an_adaptive_head_is_refused_where_it_cannot_train(overrides, remedy):
    study = Study("01_build", "smoke", device="cpu", overrides=overrides)
    with pytest.raises(ValueError, match=remedy):
        study.model_config()


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_has_a_plan_a_model_and_a_training(name):
    """Also those that this machine is too small for: the model is built without storage."""
    profile, plan = PROFILES[name], runner.plan(Settings(name))
    assert len(plan.steps) == 8 and all(step.minutes for step in plan.steps)
    study = Study("01_build", name, device="cpu")
    study.corpus = SimpleNamespace(vocab_size=profile.vocab_size)
    study.device = torch.device("cuda" if profile.bf16 else "cpu")
    with torch.device("meta"):
        model = EarlyExitLanguageModel.from_config(study.model_config())
    assert model.n_layers == profile.n_layers
    for recipe in profile.recipes:
        assert study.training_config(0, **RECIPES[recipe]).bf16 == profile.bf16
