"""Trained models, exit traces and the prices of work on this machine are computed once and cached.

Each is kept under a digest of its configuration, its text, the number of threads (two sum in another
order than one) and the definitions that it uses, so that a new comment or figure retrains nothing. What
is damaged or foreign is made again. Deleting the cache costs time only.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache as remember
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from filelock import FileLock

from earlyexit.calibration.collect import collect_trace
from earlyexit.calibration.trace import ExitTrace
from earlyexit.corpus.corpus import Corpus
from earlyexit.corpus.splits import Split
from earlyexit.cost import time_model as times
from earlyexit.cost.time_model import TimeModel
from earlyexit.exits.protocol import ExitModel
from earlyexit.models import checkpoints
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.nn.config import ModelConfig
from earlyexit.runs import digests, provenance
from earlyexit.training.config import GatesConfig, TrainingConfig
from earlyexit.training.gates import train_gates
from earlyexit.training.train import train

log = logging.getLogger(__name__)
Kind = type[EarlyExitLanguageModel]
T = TypeVar("T")


class NotTrained(FileNotFoundError):
    """A model has not been trained yet."""


@dataclass(frozen=True)
class Trained:
    """A trained model with the history of its training.

    Attributes:
        model: the model, in evaluation mode.
        history: one row per report of the training.
        model_hash: hash that names the checkpoint.
        gates: one row per gate: how much of its target it explains; empty without gates.
        seconds: how long the training took, without that of gates; NaN if it was resumed.
    """

    model: EarlyExitLanguageModel
    history: pd.DataFrame
    model_hash: str
    gates: pd.DataFrame
    seconds: float = math.nan

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def reports(self) -> dict[str, list[dict]]:
        """Return the rows of history and gates, without what was not measured in them."""
        tables = {"history": self.history, "gates": self.gates}
        return {
            name: [
                {k: v for k, v in row.items() if pd.notna(v)} for row in table.to_dict("records")
            ]
            for name, table in tables.items()
        }


def trained_model(
    corpus: Corpus,
    model_config: ModelConfig,
    training: TrainingConfig,
    cache: Path,
    device: torch.device,
    *,
    max_tokens: int = 0,
    backbone: Trained | None = None,
    convert: Callable[[EarlyExitLanguageModel], EarlyExitLanguageModel] | None = None,
    may_train: bool = True,
    kind: Kind = EarlyExitLanguageModel,
) -> Trained:
    """Return the model of this configuration, from the cache, or trained now and kept.

    Args:
        max_tokens: see :func:`earlyexit.training.train.train`.
        kind: class of the model.
        backbone: the model whose exits are trained when ``training.freeze_backbone``.
        convert: function from the backbone to the model whose exits are trained, of the same
            configuration.
        may_train: whether a model that is not in the cache is trained.

    Raises:
        NotTrained: the model is not in the cache, and ``may_train`` is False.
    """
    if convert:
        kind = type(convert(backbone.model))
    name = model_name(
        corpus,
        model_config,
        training,
        max_tokens=max_tokens,
        backbone=backbone,
        made=convert or kind,
    )
    path = cache / "models" / f"{name}.safetensors"
    state = cache / "training" / path.stem

    def begin() -> EarlyExitLanguageModel:
        torch.manual_seed(training.seed)
        if convert:
            return convert(backbone.model)
        if backbone:
            return checkpoints.load_model(path.with_stem(backbone.model_hash), kind=kind)
        return kind.from_config(model_config)

    def make() -> tuple[EarlyExitLanguageModel, dict]:
        resumed, started = state.exists(), time.perf_counter()
        arguments = (corpus, training, device, state)
        try:
            history = train(model := begin(), *arguments, max_tokens=max_tokens)
        except checkpoints.CheckpointError as error:
            log.warning("%s; it is started again", error)
            shutil.rmtree(state)
            history = train(model := begin(), *arguments, max_tokens=max_tokens)
        about = {"training": asdict(training), "text": corpus.data_hash, "history": history}
        return model, about | {"seconds": None if resumed else time.perf_counter() - started}

    trained = _cached_model(path, model_config, device, kind, make if may_train else None)
    shutil.rmtree(state, ignore_errors=True)
    return trained


def model_name(
    corpus: Corpus,
    model_config: ModelConfig,
    training: TrainingConfig,
    *,
    max_tokens: int = 0,
    backbone: Trained | None = None,
    made: Callable = EarlyExitLanguageModel,
) -> str:
    """Return the name of a trained model, a digest of all that decides its weights.

    Args:
        made: the class of the model, or the function that converts the backbone to it.
    """
    key = {
        "model": model_config,
        "training": training,
        "max_tokens": max_tokens,
        "text": corpus.data_hash,
        "backbone": backbone.model_hash if backbone else "",
        "kind": made.__qualname__,
        "threads": torch.get_num_threads(),
        "code": _code(train, made),
    }
    return _name(key)


def gated_model(
    trained: Trained,
    corpus: Corpus,
    cache: Path,
    device: torch.device,
    gates: GatesConfig,
    *,
    seed: int,
    may_train: bool = True,
) -> Trained:
    """Return ``trained`` with gates, from the cache, or trained now on frozen weights and kept.

    Raises:
        NotTrained: see :func:`trained_model`.
    """
    config, kind = replace(trained.config, gate_hidden=gates.hidden), type(trained.model)
    key = {
        "model": trained.model_hash,
        "gates": gates,
        "seed": seed,
        "text": corpus.data_hash,
        "threads": torch.get_num_threads(),
        "code": _code(train_gates),
    }

    def make() -> tuple[EarlyExitLanguageModel, dict]:
        model = kind.from_config(config).to(device)
        model.load_state_dict(trained.model.state_dict(), strict=False)  # all but the gates
        split, limits = corpus.splits["train"], (gates.max_tokens, gates.steps)
        report = train_gates(model, split, corpus.eos_id, *limits, seed=seed)
        return model, trained.reports() | {"gates": report}

    path = _path(cache / "models", ".safetensors", key)
    gated = _cached_model(path, config, device, kind, make if may_train else None)
    return replace(gated, seconds=trained.seconds)


def exit_trace(
    trained: Trained,
    split: Split,
    corpus: Corpus,
    cache: Path,
    temperatures: Sequence[float] | None = None,
) -> ExitTrace:
    """Return a model's trace over a split, from the cache, or collected now and kept."""
    key = {
        "model": trained.model_hash,
        "text": corpus.data_hash,
        "split": split.name,
        "tokens": split.n_tokens,
        "temperatures": list(temperatures or ()),
        "threads": torch.get_num_threads(),
        "code": _code(collect_trace, ExitTrace),
    }

    def make(path: Path) -> None:
        collect_trace(trained.model, split, corpus.eos_id, temperatures=temperatures).save(path)

    def load(path: Path) -> ExitTrace:
        trace, about = ExitTrace.load(path), (split.name, corpus.data_hash)
        if (trace.split, trace.data_hash, trace.model_hash) != (
            *about,
            trained.model.fingerprint(),
        ):
            raise ValueError("it is of another model or text")
        return trace

    return _kept(_path(cache / "traces", ".parquet", key), load, make)


def with_short_fit(corpus: Corpus, tokens: int) -> Corpus:
    """Return the corpus with about ``tokens`` in its fit part, for a short training; 0: all."""
    fit = corpus.splits["fit"].limit(tokens)
    return replace(corpus, splits=corpus.splits | {"fit": fit})


def time_model(cache: Path, device: torch.device, refit: bool = False) -> TimeModel:
    """Return this machine's prices, from the cache, or measured now and kept."""

    def make(path: Path) -> None:
        log.info(
            "measuring the prices of work on this machine, once: some minutes, as the bar says"
        )
        model, _ = times.calibrate(device)
        replace(model, machine=_machine()).save(path)

    def load(path: Path) -> TimeModel:
        if (model := TimeModel.load(path)).machine != _machine():
            raise ValueError("it is of another machine")
        return model

    path = time_model_path(cache, device)
    if refit:
        make(path)
    return _kept(path, load, make)


def time_model_path(cache: Path, device: torch.device) -> Path:
    """Return the path of the prices; it depends on the machine, the device and the code."""
    code = digests.of_code(f"{times.__name__}.calibrate", TimeModel)
    key = {"machine": _machine(), "device": str(device), "code": code}
    return _path(cache / "time_model", ".json", key)


def load_trained(
    path: Path, config: ModelConfig, device: torch.device, kind: Kind = EarlyExitLanguageModel
) -> Trained:
    """Read a stored model with its history.

    Raises:
        CheckpointError: see :func:`earlyexit.models.checkpoints.load_model`.
    """
    model = checkpoints.load_model(path, config, device, kind)
    about = checkpoints.checkpoint_about(path)
    try:
        history, gates = pd.DataFrame(about["history"]), pd.DataFrame(about.get("gates", []))
        return Trained(model, history, path.stem, gates, about.get("seconds") or math.nan)
    except (KeyError, ValueError) as error:
        raise checkpoints.CheckpointError(f"{path} holds no history ({error})") from error


def _cached_model(
    path: Path,
    config: ModelConfig,
    device: torch.device,
    kind: Kind,
    make: Callable[[], tuple[EarlyExitLanguageModel, dict]] | None,
) -> Trained:
    """Return the model at ``path``; if it is missing or damaged, store what ``make`` returns.

    Raises:
        NotTrained: the model is missing, or damaged, and ``make`` is None.
    """

    def store(path: Path) -> None:
        if make is None:
            raise NotTrained(f"no trained model of {config}")
        model, about = make()
        checkpoints.save_model(model, path, about | {"entry": path.stem})

    def load(path: Path) -> Trained:
        if checkpoints.checkpoint_about(path).get("entry") != path.stem:
            raise ValueError("it is of another training")
        return load_trained(path, config, device, kind)

    return _kept(path, load, store)


def _kept(path: Path, load: Callable[[Path], T], make: Callable[[Path], None]) -> T:
    """Return what ``load`` reads of an entry; if it is missing, or refused, ``make`` writes it anew.

    Every kind of entry carries a digest, which ``load`` compares. Another process that wants the same
    entry waits, and reads it.
    """
    locks = path.parents[1] / "training"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{path.stem}.lock"):
        if path.exists():
            try:
                return load(path)
            except (ValueError, OSError) as error:
                why = " ".join(str(error).split()).removeprefix(f"{path}").lstrip(": ")
                log.warning("%s cannot be used and counts as missing: %.200s", path, why)
        make(path)
        return load(path)


def _path(folder: Path, suffix: str, key: dict[str, Any]) -> Path:
    """Return the path of a step's result."""
    return folder / f"{_name(key)}{suffix}"


def _name(key: dict[str, Any]) -> str:
    return digests.of_object(key)[:16]


@remember
def _code(*roots: Callable) -> dict[str, str]:
    """Return digests of the loaded code; they are computed once, since it cannot change."""
    return digests.of_code(*roots, contract=ExitModel)


def _machine() -> dict:
    """Return what prices depend on besides the configuration."""
    return {"torch": torch.__version__, "hardware": provenance.hardware()}
