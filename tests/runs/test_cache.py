"""A model is trained once, and its record says how long that took."""

from __future__ import annotations

import math

import pytest
import torch

from earlyexit.nn.config import ModelConfig
from earlyexit.runs import cache
from earlyexit.training.config import TrainingConfig


@pytest.fixture
def arguments(corpus, tmp_path) -> tuple:
    """Of :func:`earlyexit.runs.cache.trained_model`, for a training of a moment."""
    config = ModelConfig(corpus.vocab_size, 16, 1, 12, mixing="none")
    training = TrainingConfig(batch_size=8, exit_loss_weight=0.0)
    return corpus, config, training, tmp_path, torch.device("cpu")


def test_a_cached_model_keeps_the_seconds_of_its_training(arguments):
    first = cache.trained_model(*arguments)
    again = cache.trained_model(*arguments, may_train=False)
    assert 0 < first.seconds < 60
    assert (again.seconds, again.model_hash) == (first.seconds, first.model_hash)


def test_a_resumed_training_does_not_claim_to_be_short(arguments, tmp_path):
    name = cache.trained_model(*arguments).model_hash
    (tmp_path / "models" / f"{name}.safetensors").unlink()
    (tmp_path / "training" / name).mkdir(parents=True, exist_ok=True)
    assert math.isnan(cache.trained_model(*arguments).seconds)
