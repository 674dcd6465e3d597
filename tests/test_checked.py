"""A configuration that makes no sense is refused when it is made, in one line that says why."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Annotated

import numpy as np
import pytest
import torch
from conftest import fuzz
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import Field

from earlyexit.checked import LARGEST_RATE, Checked, Positive, bounded, read_document, refused
from earlyexit.corpus.documents import CorpusConfig
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models.act import ACTConfig
from earlyexit.models.sparse_bk import SparseConfig
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
        (TrainingConfig, "learning_rate", 3e37, "must be ≤ 1e+06"),
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


@pytest.mark.parametrize("most", [3, 3.0])
def test_a_bound_refuses_numbers_and_leaves_the_rest_to_the_call(most):
    @bounded(x=most)
    def told(x, y=9):
        """Of x."""
        return x, y

    assert told(3) == (3, 9) and told.__name__ == "told" and told.__doc__ == "Of x."
    assert told("many") == ("many", 9) and told(None, y=10**400)[0] is None
    assert torch.equal(told(x=torch.tensor([9, 9]))[0], torch.tensor([9, 9]))
    for x in (4, np.float32(3.5), torch.tensor(1e9), 10**400, math.inf):
        with pytest.raises(ValueError, match=r"^x=.{1,60}: must be ≤ 3$"):
            told(x)
    with pytest.raises(TypeError, match=r"told\(\) missing 1 required positional argument: 'x'"):
        told(y=1)


def test_an_error_of_a_library_becomes_one_line():
    @refused(NotImplementedError, "{path} cannot be read: {error}")
    def read(path, error=None):
        if error:
            raise error
        return path

    assert read("a.txt") == "a.txt"
    with pytest.raises(ValueError, match=r"^a\.txt cannot be read: no \{such\} thing$"):
        read(path="a.txt", error=NotImplementedError("no {such} thing\nnor this"))
    with pytest.raises(OSError, match="gone"):
        read("a.txt", OSError("gone"))


def test_the_largest_learning_rate_still_makes_a_finite_step():
    weight = torch.nn.Parameter(torch.ones(3))
    for kind in (torch.optim.Adam, torch.optim.AdamW):
        optimizer = kind([weight], lr=LARGEST_RATE)
        weight.sum().backward()
        optimizer.step()
        assert weight.isfinite().all()
    with pytest.raises(RuntimeError, match="overflow"):  # why there is a bound
        optimizer = torch.optim.AdamW([weight], lr=1e38)
        optimizer.step()


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


# ------------------------------------------------------------------ what is saved reads back equal

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)
LIKELY = st.sampled_from(
    [0, 1, 2, 16, 0.0, 0.5, -1, True, False, "word", "bpe", "linear", "folder"]
)
KINDS = (ModelConfig, SparseConfig, ACTConfig, TrainingConfig, GatesConfig, CorpusConfig)


def one_line(error: ValueError) -> None:
    assert str(error) and "\n" not in str(error)


@fuzz(200)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_a_configuration_reads_back_equal_or_is_never_made(data, kind):
    names = [field.name for field in fields(kind)]
    given = data.draw(st.dictionaries(st.sampled_from(names), JSON | LIKELY, max_size=3))
    try:
        made = kind(**{"vocab_size": 100} | given if "vocab_size" in names else given)
    except ValueError as error:
        one_line(error)
        return
    assert kind(**json.loads(json.dumps(asdict(made), allow_nan=False))) == made


THRESHOLDS = st.lists(st.floats() | st.integers(-1, 2), max_size=3)
AS_GIVEN = (list, tuple, np.array, torch.tensor, lambda found: [*map(np.float64, found)])


@fuzz(200)
@given(
    criterion=st.sampled_from(sorted(CRITERIA)) | JSON,
    found=st.tuples(st.sampled_from(AS_GIVEN), THRESHOLDS).map(lambda pair: pair[0](pair[1]))
    | JSON,
    decay=st.just(0.0) | JSON,
)
def test_a_policy_reads_back_equal_or_is_refused_when_it_is_saved(
    tmp_path, criterion, found, decay
):
    path = tmp_path / "p.json"
    path.unlink(missing_ok=True)
    try:
        policy = ExitPolicy(criterion, found, decay)
        policy.save(path)
    except ValueError as error:
        one_line(error)
        assert not path.exists()
    else:
        assert ExitPolicy.load(path) == policy
        assert len(policy.thresholds) == len(found)


@fuzz(200)
@given(
    document=JSON | st.fixed_dictionaries({"criterion": JSON, "thresholds": JSON, "decay": JSON})
)
@example(document={"\n": None})
def test_a_foreign_document_is_no_policy_and_its_file_is_named(tmp_path, document):
    (tmp_path / "p.json").write_text(json.dumps(document))
    with pytest.raises(ValueError) as refused:
        ExitPolicy.load(tmp_path / "p.json")
    assert str(tmp_path / "p.json") in str(refused.value)
    one_line(refused.value)


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"{", b"[" * 10**5, b'{"a": ' * 10**5, b"9" * 9999, b"NaN", b"\0"]
)
def test_bytes_that_are_no_document_are_refused_in_a_sentence(tmp_path, content):
    (tmp_path / "p.json").write_bytes(content)
    for read in (ExitPolicy.load, lambda path: read_document(path, ExitPolicy.from_dict)):
        with pytest.raises(ValueError, match=r"p\.json: ") as refused:
            read(tmp_path / "p.json")
        one_line(refused.value)
