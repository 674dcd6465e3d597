"""Two processes that share every batch learn what one process learns from all of it."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys

import pytest
import torch
import two_processes
from torch import distributed

from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.runs.paths import PACKAGE
from earlyexit.training import parallel
from earlyexit.training.config import TrainingConfig
from earlyexit.training.losses import training_loss
from earlyexit.training.train import train

CPU = torch.device("cpu")
TRAINING = TrainingConfig(
    epochs=1.0, batch_size=9, exit_sampling="all", optimizer="muon", learning_rate=1e-2
)


def new_model(corpus) -> EarlyExitLanguageModel:
    torch.manual_seed(1)
    return EarlyExitLanguageModel(**two_processes.SIZES | {"vocab_size": corpus.vocab_size})


class Killed(Exception):
    """Takes the place of a signal."""


@pytest.fixture(scope="module")
def shared(corpus, tmp_path_factory):
    """Gradients, and trainings: one to the end, one that is killed and taken up again."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "corpus").write_bytes(pickle.dumps(corpus))
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        for name, value in {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": 2,
        }.items():
            patch.setenv(name, str(value))
        free.close()
        patch.setenv("RANK", "0")
        tests = os.path.dirname(two_processes.__file__)
        second = subprocess.Popen(
            [sys.executable, two_processes.__file__, folder / "corpus"],
            env=os.environ | {"RANK": "1", "PYTHONPATH": f"{PACKAGE.parent}:{tests}"},
        )
        done = {}
        with parallel.joined("cpu") as leads:
            assert leads
            done["gradients"] = two_processes.shared_gradients()
            model = new_model(corpus)
            history = parallel.train(model, corpus, TRAINING, CPU, max_tokens=600)
            done["trained"] = model, history
            (state := folder / "state").mkdir()
            (state / "training.pt").write_bytes(b"damaged")
            with pytest.raises(parallel.CheckpointError):
                parallel.train(new_model(corpus), corpus, TRAINING, CPU, state, max_tokens=600)
            (state / "training.pt").unlink()
            model = new_model(corpus)
            parallel.train(model, corpus, TRAINING, CPU, state, checkpoint_every=3, max_tokens=600)
            assert (state / "training.pt").is_file()  # of a step before the last
            again = new_model(corpus)
            parallel.train(again, corpus, TRAINING, CPU, state, max_tokens=600)
            done["resumed"] = model, again
            with pytest.raises(ValueError, match="train it on one process"):
                config = TrainingConfig(exit_sampling="tokens")
                parallel.train(new_model(corpus), corpus, config, CPU)
        assert second.wait(timeout=120) == 0
        assert not distributed.is_initialized()
    return done


@pytest.mark.parametrize("windows", two_processes.BATCHES)
@pytest.mark.parametrize("case", two_processes.CASES)
def test_gradients_are_those_of_one_process_on_the_whole_batch(shared, case, windows):
    nll, found = shared["gradients"][case, windows]
    alone, expected = two_processes.gradients(case, windows, training_loss)
    assert nll == pytest.approx(alone, rel=1e-5)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=2e-6, msg=name)


def test_means_of_the_shares_would_not_be_these_gradients():
    """The control: what averaging over processes gives, if nobody counts tokens."""
    (x, y), (model, _, config) = two_processes.batch(7), two_processes.CASES["every exit"]
    _, expected = two_processes.gradients("every exit", 7, training_loss)
    model = two_processes.model_of("every exit")
    for part_x, part_y in zip(x.tensor_split(2), y.tensor_split(2), strict=True):
        (training_loss(model, part_x, part_y, config, 3, progress=0.5)[0] / 2).backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    errors = [(found[n] - g).abs().max() / g.abs().max() for n, g in expected.items()]
    assert max(errors) > 0.05


def test_a_shared_training_ends_where_one_process_ends(shared, corpus):
    model, history = shared["trained"]
    alone = new_model(corpus)
    expected = train(alone, corpus, TRAINING, CPU, max_tokens=600)
    assert [row.pop("processes") for row in history] == [2] * len(expected)
    for row, other in zip(history, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-3)
    for (name, weight), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=2e-3, msg=name)
    assert not model.training and model.trained_on == corpus.data_hash


def test_a_killed_shared_training_goes_on_to_the_same_weights(shared):
    model, again = shared["resumed"]
    for weight, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other)
