"""A configuration that makes no sense is refused when it is made, in one line that says why."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import pytest
from pydantic import Field

from earlyexit.checked import Checked, Positive
from earlyexit.corpus.documents import CorpusConfig
from earlyexit.nn.config import ModelConfig
from earlyexit.training.config import GatesConfig, TrainingConfig


@dataclass(frozen=True)
class Settings(Checked):
    factors: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] = (1.0,)


@pytest.mark.parametrize(
    ("kind", "field", "value", "rule"),
    [
        (ModelConfig, "d_model", 0, "must be ≥ 1"),
        (ModelConfig, "bk_heads", 0, "must be ≥ 1"),
        (ModelConfig, "expert_hidden", 0, "must be ≥ 1"),
        (ModelConfig, "gate_hidden", -1, "must be ≥ 0"),
        (ModelConfig, "dropout_p", 1.0, "must be < 1"),
        (ModelConfig, "n_layers", 2.0, "must be a whole number"),
        (ModelConfig, "n_layers", True, "must be a whole number"),
        (ModelConfig, "causal", 1, "must be true or false"),
        (ModelConfig, "top_k", 5, "must be ≤ num_experts=4"),
        (ModelConfig, "exit_head", "other", "must be 'translator', 'own' or 'full'"),
        (TrainingConfig, "learning_rate", math.nan, "must be a finite number"),
        (TrainingConfig, "exit_ramp", 1.5, "must be ≤ 1"),
        (TrainingConfig, "weight_decay", "0.1", "must be a number"),
        (GatesConfig, "steps", 0, "must be ≥ 1"),
        (CorpusConfig, "name", "nope", "must be 'sotu', 'wikitext-2', 'wikitext-103' or 'folder'"),
        (CorpusConfig, "vocab_size", 2, "must be ≥ 3 with tokenizer='word', for <unk>, <eos>"),
        (Settings, "factors", "[1]", "must be a list"),
        (Settings, "factors", [], "must have at least 1 values"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_must_be(kind, field, value, rule):
    required = {"vocab_size": 100} if kind is ModelConfig else {}
    with pytest.raises(ValueError) as refused:
        kind(**required | {field: value})
    told = str(refused.value)
    assert told.startswith(f"{field}={value!r}: {rule}")
    assert "\n" not in told


def test_all_wrong_values_are_named_and_an_element_by_its_place():
    with pytest.raises(ValueError, match=r"^d_model=0: must be ≥ 1; top_k=0: must be ≥ 1$"):
        ModelConfig(100, d_model=0, top_k=0)
    with pytest.raises(ValueError, match=r"^factors\[1\]=-1: must be > 0$"):
        Settings([1, -1])
    with pytest.raises(ValueError, match=r"^factors\[0\]=-1: must be > 0$"):  # said once
        Settings([-1])


def test_a_value_has_the_type_of_its_field():
    assert Settings([1, 2.5]) == Settings((1.0, 2.5))
    assert isinstance(TrainingConfig(epochs=3).epochs, float)
