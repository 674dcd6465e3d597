"""Checkpoints come back bit for bit, or say what is wrong with them."""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from earlyexit.exits.policy import ExitPolicy
from earlyexit.models import checkpoints
from earlyexit.models.act import ACTLanguageModel, convert_act_to_early_exit
from earlyexit.models.checkpoints import (
    ENTRY,
    CheckpointError,
    checkpoint_about,
    load_model,
    save_model,
)
from earlyexit.models.multi_scale import MultiScaleLanguageModel
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.models.sparse_bk import SparseBKLanguageModel


def rewrite(path, change) -> None:
    """Apply ``change(tensors, document)`` to a stored checkpoint, with a digest that fits."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        document = json.loads(file.metadata()[ENTRY])
    change(tensors, document)
    document["digest"] = checkpoints._digest(document, tensors)
    save_file(tensors, path, metadata={ENTRY: json.dumps(document)})


@pytest.fixture
def stored(make_model, tmp_path):
    """A model and the file it was saved to."""
    model = make_model(confidence_threshold=0.4)
    path = tmp_path / "model.safetensors"
    save_model(model, path, {"seed": 3})
    return model, path


@pytest.mark.parametrize("gates", [None, 0, 5])
@pytest.mark.parametrize("exit_head", ["translator", "full"])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(make_model, make_tokens, make_policy, tmp_path, tied, exit_head, gates):
    model = make_model(tie_embeddings=tied, exit_head=exit_head, gate_hidden=gates, top_k=2)
    x, path = make_tokens(3, 8), tmp_path / "folder" / "model.safetensors"
    save_model(model, path)
    back = load_model(path, model.config)
    assert back.config == model.config
    assert not back.training
    before, after = model.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    last = back.blocks[-1].exit_classifier
    assert (last.unembedding.weight is back.token_embedding.weight) == tied
    assert torch.equal(model(x), back(x))
    policy = make_policy(model, x, "max_probability" if gates is None else "gate")
    for a, b in zip(model.predict(x, policy), back.predict(x, policy), strict=True):
        assert torch.equal(a, b)


def test_a_tied_matrix_is_stored_once(make_model, tmp_path):
    sizes = {}
    for tied in (True, False):
        model = make_model(tie_embeddings=tied)
        save_model(model, tmp_path / f"{tied}.safetensors")
        sizes[tied] = (tmp_path / f"{tied}.safetensors").stat().st_size
    assert sizes[False] - sizes[True] >= 4 * 53 * 16


def test_what_was_said_about_the_weights_is_kept(stored):
    assert checkpoint_about(stored[1]) == {"seed": 3}


def test_the_threshold_in_force_is_kept(make_model, tmp_path):
    model = make_model()
    model.confidence_threshold = 0.55
    save_model(model, tmp_path / "m.safetensors")
    assert load_model(tmp_path / "m.safetensors").confidence_threshold == 0.55


def test_a_checkpoint_of_another_configuration_is_refused(stored, make_model):
    _, path = stored
    for change in ({"d_model": 8}, {"n_layers": 2}, {"tie_embeddings": False}, {"top_k": 2}):
        with pytest.raises(CheckpointError, match=next(iter(change))):
            load_model(path, make_model(confidence_threshold=0.4, **change).config)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_refused(stored, keep):
    _, path = stored
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="complete"):
        load_model(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_model(tmp_path / "nothing.safetensors")


def test_nothing_is_said_about_weights_that_cannot_be_read(stored, tmp_path):
    _, path = stored
    path.write_bytes(path.read_bytes()[:100])
    for unreadable in (path, tmp_path / "nothing.safetensors"):
        with pytest.raises(CheckpointError):
            checkpoint_about(unreadable)


class Trap:
    """Would leave a mark if anything unpickled it."""

    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_pickle_is_never_loaded(tmp_path, write):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        write({"weights": Trap()}, file)
    with pytest.raises(CheckpointError, match="pickle"):
        load_model(path)


def test_weights_that_are_not_finite_are_refused(stored):
    name = "blocks.1.layer_norm.weight"
    for bad in (math.nan, math.inf):
        model, path = stored
        save_model(model, path)
        rewrite(path, lambda tensors, _, bad=bad: tensors[name].fill_(bad))
        with pytest.raises(
            CheckpointError, match=re.escape(f"{path} holds NaN or infinity in {name}")
        ):
            load_model(path)
        before = path.read_bytes()
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.blocks[1].layer_norm.weight[0] = bad
        with pytest.raises(CheckpointError, match="cannot be saved: it holds NaN"):
            save_model(broken, path)
        assert path.read_bytes() == before


def test_tensors_that_do_not_fit_their_configuration_are_refused(stored):
    model, path = stored
    name = "blocks.0.layer_norm.weight"
    for change in (
        lambda tensors, _: tensors.update({name: torch.ones(7)}),
        lambda tensors, _: tensors.pop(name),
        lambda tensors, _: tensors.update(surplus=torch.ones(1)),
        lambda tensors, _: tensors.pop("token_embedding.weight"),  # tied, and the only copy
    ):
        save_model(model, path)
        rewrite(path, change)
        with pytest.raises(CheckpointError):
            load_model(path)


@pytest.mark.parametrize(
    "config",
    [
        [],
        "{",
        {"d_model": 16},
        {"vocab_size": 53, "colour": 1},
        {"vocab_size": 5, "top_k": 9},
        {"vocab_size": 53, "causal": "false"},
        {"vocab_size": 53, "d_model": 0},
        {"vocab_size": 53, "n_seq": 10**12},
        {"vocab_size": 53, "n_layers": 10**9},
        {"vocab_size": 53, "num_experts": 10**30},
        {"vocab_size": 53, "expert_hidden": 10**15},
        {"vocab_size": 53, "dropout_p": math.nan},
    ],
)
def test_a_configuration_that_makes_no_model_is_refused_at_once(stored, config):
    _, path = stored
    rewrite(path, lambda _, document: document.update(config=config))
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as refused:
        load_model(path)
    assert "\n" not in str(refused.value)


def test_a_document_nested_too_deeply_is_refused(stored):
    _, path = stored
    save_file({"x": torch.ones(1)}, path, metadata={ENTRY: "[" * 100_000})
    with pytest.raises(CheckpointError, match="nested too deeply"):
        load_model(path)


def test_a_safetensors_file_of_something_else_is_refused(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="configuration"):
        load_model(tmp_path / "x.safetensors")


def test_a_failed_save_leaves_the_old_file(stored, make_model, make_tokens):
    model, path = stored
    with pytest.raises(TypeError):
        save_model(make_model(seed=1), path, {"policy": ExitPolicy.static(0, 3)})  # no JSON
    x = make_tokens(1, 4)
    assert torch.equal(load_model(path)(x), model(x))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert json.dumps(checkpoint_about(path))


# ------------------------------------------------------------------ what is saved reads back equal

KINDS = {
    "plain": lambda config: EarlyExitLanguageModel(**config, gate_hidden=0),
    "two precisions": lambda config: EarlyExitLanguageModel(**config).bfloat16().float().half(),
    "ACT": lambda config: ACTLanguageModel(**config),
    "converted": lambda config: convert_act_to_early_exit(ACTLanguageModel(**config)),
    "sparse": lambda config: SparseBKLanguageModel(**config, keep=0.25),
    "scales": lambda config: MultiScaleLanguageModel(**config | {"n_layers": 3, "n_seq": 16}),
    "adaptive": lambda config: EarlyExitLanguageModel(**config, output_head="adaptive"),
    "full heads": lambda config: EarlyExitLanguageModel(**config, exit_head="full"),
    "attention": lambda config: EarlyExitLanguageModel(**config, mixing="attention"),
}
SMALL = {"vocab_size": 53, "d_model": 16, "n_layers": 2, "n_seq": 12, "bk_heads": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_comes_back_in_its_precision_from_equal_bytes(tmp_path, name, dtype):
    model, paths = KINDS[name](SMALL).to(dtype), [tmp_path / f"{i}" for i in range(2)]
    state = torch.get_rng_state()
    for path in paths:
        save_model(model, path, {"history": [{"step": 1}]})
    assert torch.equal(torch.get_rng_state(), state)
    back = load_model(paths[0], model.config, kind=type(model))
    before, after = model.state_dict(), back.state_dict()
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_compiled_model_is_saved_as_the_model_itself(stored):
    model, path = stored
    save_model(torch.compile(model, backend="eager"), path)
    assert load_model(path).fingerprint() == model.fingerprint()


def test_what_could_not_be_read_back_is_not_written(make_model, tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(CheckpointError, match="Linear cannot be saved"):
        save_model(torch.nn.Linear(2, 2), path)
    model = make_model(gate_hidden=0)
    model.gates = None
    with pytest.raises(CheckpointError, match="weights are missing"):
        save_model(model, path)
    for about in ({1: 2}, {"x": (1, 2)}, {"x": math.nan}):
        with pytest.raises(ValueError):
            save_model(make_model(), path, about)
    assert not path.exists()


def test_a_model_of_another_kind_is_refused(tmp_path):
    save_model(MultiScaleLanguageModel(**SMALL | {"n_layers": 3, "n_seq": 16}), tmp_path / "m")
    with pytest.raises(CheckpointError, match="load it with kind=MultiScaleLanguageModel"):
        load_model(tmp_path / "m")


def test_a_flipped_bit_is_found_wherever_it_is(stored):
    """Or changes nothing: the header's padding, say."""
    model, path = stored
    whole, places = path.read_bytes(), random.Random(0)
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[places.randrange(len(whole))] ^= 1 << places.randrange(8)
        path.write_bytes(flipped)
        try:
            back = load_model(path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            assert back.fingerprint() == model.fingerprint()
            assert checkpoint_about(path) == {"seed": 3}
