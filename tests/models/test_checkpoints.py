"""Checkpoints come back bit for bit, or say what is wrong with them."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from earlyexit.exits.policy import ExitPolicy
from earlyexit.models.checkpoints import CheckpointError, checkpoint_about, load_model, save_model


def rewrite(path, change) -> None:
    """Apply ``change(tensors, metadata)`` to a stored checkpoint."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


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
    for bad in (math.nan, math.inf):
        model, path = stored
        with torch.no_grad():
            model.blocks[1].layer_norm.weight[0] = bad
        save_model(model, path)
        with pytest.raises(CheckpointError, match=r"blocks\.1\.layer_norm\.weight"):
            load_model(path)


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
        "{",
        "[]",
        '{"d_model": 16}',
        '{"vocab_size": 53, "colour": 1}',
        '{"vocab_size": 5, "top_k": 9}',
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(stored, config):
    _, path = stored
    rewrite(path, lambda _, metadata: metadata.update(config=config))
    with pytest.raises(CheckpointError):
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
