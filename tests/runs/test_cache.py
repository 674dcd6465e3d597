"""A model is trained once, its record says how long that took, and what is damaged is made again."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import wraps

import pandas as pd
import pytest
import torch

from earlyexit.cost import time_model as times
from earlyexit.cost.time_model import TimeModel
from earlyexit.models.checkpoints import CheckpointError
from earlyexit.nn.config import ModelConfig
from earlyexit.runs import cache
from earlyexit.training.config import GatesConfig, TrainingConfig
from earlyexit.training.resume import TrainingState

CPU = torch.device("cpu")


@pytest.fixture
def arguments(corpus, tmp_path) -> tuple:
    """Of :func:`earlyexit.runs.cache.trained_model`, for a training of a moment."""
    config = ModelConfig(corpus.vocab_size, 16, 1, 12, mixing="none")
    training = TrainingConfig(batch_size=8, exit_loss_weight=0.0)
    return corpus, config, training, tmp_path, CPU


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


def test_another_number_of_threads_is_another_model(arguments):
    first = cache.trained_model(*arguments)
    torch.set_num_threads(2)
    try:
        with pytest.raises(cache.NotTrained):
            cache.trained_model(*arguments, may_train=False)
    finally:
        torch.set_num_threads(1)
    assert cache.trained_model(*arguments, may_train=False).model_hash == first.model_hash


def test_what_several_want_at_once_is_made_once(arguments, monkeypatch):
    prices = TimeModel({"p": {"k": 1.0}}, {})
    monkeypatch.setattr(times, "calibrate", lambda device: (prices, pd.DataFrame()))
    made = Counter()
    for name in ("train", "train_gates", "collect_trace"):
        function = getattr(cache, name)

        @wraps(function)  # the code behind an entry is found by this name
        def counted(*given, function=function, **options):
            made[function.__name__] += 1
            time.sleep(0.05)  # the others arrive
            return function(*given, **options)

        monkeypatch.setattr(cache, name, counted)
    with ThreadPoolExecutor(3) as pool:
        several = [pool.submit(everything, arguments) for _ in range(3)]
        models = [entries.result()["models"] for entries in several]
    assert models[0] == models[1] == models[2]
    assert made == {"train": 1, "train_gates": 1, "collect_trace": 1}


# ------------------------------------------------------------------ damage


def everything(arguments) -> dict[str, object]:
    """Every kind of entry, made now or read from the cache, by the folder it lies in."""
    corpus, config, settings, folder, device = arguments
    trained = cache.trained_model(corpus, replace(config, n_layers=2), settings, folder, device)
    gates = GatesConfig(max_tokens=200, steps=3)
    gated = cache.gated_model(trained, corpus, folder, device, gates, seed=0)
    assert gated.seconds == trained.seconds > 0  # of the training, not of the gates
    trace = cache.exit_trace(gated, corpus.splits["fit"], corpus, folder)
    return {
        "models": [trained.model.fingerprint(), gated.model.fingerprint()],
        "traces": trace.to_frame().to_csv(),
        "time_model": cache.time_model(folder, device),
    }


@pytest.fixture
def kept(arguments, tmp_path, monkeypatch):
    """Arguments for :func:`everything`, what it returned first, and the files of that."""
    table = pd.DataFrame()
    monkeypatch.setattr(
        times, "calibrate", lambda device: (TimeModel({"p": {"k": 1.0}}, {}), table)
    )
    folder = tmp_path / "cache"
    arguments = (*arguments[:3], folder, CPU)
    entries = everything(arguments)
    files = [p for p in folder.rglob("*.*") if p.suffix != ".lock"]  # a lock holds nothing
    files.sort(key=lambda p: (p.suffix == ".json", p))
    return arguments, entries, files


def damaged(kind: str, content: bytes, places: random.Random) -> bytes:
    if kind == "flipped":
        changed = bytearray(content)
        changed[places.randrange(len(content))] ^= 1 << places.randrange(8)
        return bytes(changed)
    return {"truncated": content[: len(content) // 2], "empty": b"", "foreign": b'{"a": 1}'}[kind]


@pytest.mark.parametrize("kind", ["flipped", "truncated", "empty", "foreign"])
def test_a_damaged_entry_is_named_in_one_line_and_made_again(kept, caplog, kind):
    arguments, entries, files = kept
    assert {path.parent.name for path in files} == set(entries)
    places = random.Random(0)
    for path in files * (4 if kind == "flipped" else 1):
        whole = path.read_bytes()
        path.write_bytes(damaged(kind, whole, places))
        caplog.clear()
        assert everything(arguments) == entries
        said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        if said:
            assert len(said) == 1 and "\n" not in said[0]
            assert said[0].startswith(f"{path} cannot be used and counts as missing: ")
        else:  # the bit was in a place that says nothing
            assert kind == "flipped"
            path.write_bytes(whole)


def test_an_entry_of_another_kind_is_made_again(kept, caplog):
    """A whole file that was put in the place of another: of the same sizes, but another seed."""
    arguments, entries, files = kept
    corpus, config, training, folder, device = arguments
    other = (corpus, config, replace(training, seed=1), folder.with_name("other"), device)
    everything(other)
    for old in files[:-1]:  # the prices of a machine are those of every seed
        (new, *_) = sorted(other[3].glob(f"{old.parent.name}/*"))
        shutil.copyfile(new, old)
        caplog.clear()
        assert everything(arguments) == entries
        assert f"{old} cannot be used and counts as missing: it is of another" in caplog.text


def test_a_damaged_state_starts_the_training_again(arguments, tmp_path, caplog):
    first = cache.trained_model(*arguments)
    state = tmp_path / "training" / first.model_hash / "training.pt"
    (tmp_path / "models" / f"{first.model_hash}.safetensors").unlink()
    state.parent.mkdir(parents=True)
    state.write_bytes(b"PK")
    assert cache.trained_model(*arguments).model.fingerprint() == first.model.fingerprint()
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said.startswith(f"{state} is not a usable training state") and "again" in said
    assert not state.parent.exists()


def test_a_flipped_bit_of_a_training_state_is_found_wherever_it_is(tmp_path):
    model, places = torch.nn.Linear(3, 3), random.Random(0)
    optimizer, state = torch.optim.AdamW(model.parameters()), TrainingState(tmp_path, {"seed": 0})
    state.save(model, optimizer, {"step": 3})
    assert state.restore(model, optimizer) == {"step": 3}
    whole = state.path.read_bytes()
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[places.randrange(len(whole))] ^= 1 << places.randrange(8)
        state.path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="changed after it was written"):
            state.restore(model, optimizer)
