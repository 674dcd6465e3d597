"""Costly steps, computed once: trained models and exit traces.

Each is kept under a digest of its configuration, its text and the definitions that it uses, so that
neither a comment nor a new figure costs an hour. Deleting the cache costs time only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache as remember
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from earlyexit.calibration.collect import collect_trace
from earlyexit.calibration.trace import ExitTrace
from earlyexit.corpus.corpus import Corpus
from earlyexit.corpus.splits import Split
from earlyexit.exits.protocol import ExitModel
from earlyexit.models import checkpoints
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.nn.config import ModelConfig
from earlyexit.runs import digests
from earlyexit.training.config import GatesConfig, TrainingConfig
from earlyexit.training.gates import train_gates
from earlyexit.training.resume import TrainingState
from earlyexit.training.train import train


@remember
def _code(*roots: Callable) -> dict[str, str]:
    """Digests of the code that this process has loaded: read once, it cannot change."""
    return digests.of_code(*roots, contract=ExitModel)


class NotTrained(FileNotFoundError):
    """A model that has not been trained yet."""


@dataclass(frozen=True)
class Trained:
    """A trained model and how it came about.

    Attributes:
        model: in evaluation mode.
        history: one row per report of the training.
        model_hash: names the checkpoint.
        gates: one row per gate, what it explains of its target; empty without gates.
    """

    model: EarlyExitLanguageModel
    history: pd.DataFrame
    model_hash: str
    gates: pd.DataFrame

    @property
    def config(self) -> ModelConfig:
        return self.model.config


def _kept(folder: Path, suffix: str, key: dict[str, Any]) -> Path:
    """Where the result of a step is kept."""
    return folder / f"{digests.of_object(key)[:16]}{suffix}"


def _model(
    cache: Path,
    key: dict[str, Any],
    config: ModelConfig,
    device: torch.device,
    kind: type[EarlyExitLanguageModel],
    make: Callable[[Path], tuple[EarlyExitLanguageModel, dict]],
    may_train: bool = True,
) -> Trained:
    """The model kept under ``key``, or the one that ``make`` trains now, with what it says of it."""
    path = _kept(cache / "models", ".safetensors", key)
    if path.exists():
        try:
            return load_trained(path, config, device, kind)
        except checkpoints.CheckpointError:  # damaged
            if not may_train:
                raise
    if not may_train:
        raise NotTrained(f"no trained model of {config}")
    model, about = make(path)
    checkpoints.save_model(model, path, about)
    TrainingState(cache / "training" / path.stem, {}).delete()
    return load_trained(path, config, device, kind)


def trained_model(
    corpus: Corpus,
    model_config: ModelConfig,
    training: TrainingConfig,
    cache: Path,
    device: torch.device,
    *,
    max_tokens: int = 0,
    backbone: Trained | None = None,
    may_train: bool = True,
    kind: type[EarlyExitLanguageModel] = EarlyExitLanguageModel,
) -> Trained:
    """The model of this configuration: from the cache, or trained now and kept.

    Args:
        max_tokens: see :func:`earlyexit.training.train.train`.
        kind: class of the model.
        backbone: the model whose exits are trained when ``training.freeze_backbone``.
        may_train: otherwise a model that is not in the cache raises.

    Raises:
        NotTrained: not in the cache, and ``may_train`` is False.
    """
    key = {
        "model": model_config,
        "training": training,
        "max_tokens": max_tokens,
        "text": corpus.data_hash,
        "backbone": backbone.model_hash if backbone else "",
        "kind": kind.__qualname__,
        "code": _code(train, kind),
    }

    def make(path: Path) -> tuple[EarlyExitLanguageModel, dict]:
        torch.manual_seed(training.seed)
        if backbone:
            model = checkpoints.load_model(cache / "models" / f"{backbone.model_hash}.safetensors")
        else:
            model = kind.from_config(model_config)
        state = cache / "training" / path.stem
        history = train(
            model, corpus, training, device, checkpoint_dir=state, max_tokens=max_tokens
        )
        return model, {"training": asdict(training), "text": corpus.data_hash, "history": history}

    return _model(cache, key, model_config, device, kind, make, may_train)


def converted_model(
    trained: Trained,
    convert: Callable[[EarlyExitLanguageModel], EarlyExitLanguageModel],
    corpus: Corpus,
    training: TrainingConfig,
    cache: Path,
    device: torch.device,
    *,
    max_tokens: int,
) -> Trained:
    """``convert(trained.model)`` with its exits trained on the frozen backbone: cached, or now.

    Args:
        training: of the exits; it must freeze the backbone.
        max_tokens: see :func:`earlyexit.training.train.train`.
    """
    if not training.freeze_backbone:
        raise ValueError("a converted model keeps its backbone: training.freeze_backbone")
    key = {
        "model": trained.model_hash,
        "training": training,
        "max_tokens": max_tokens,
        "text": corpus.data_hash,
        "code": _code(train, convert),
    }
    model = convert(trained.model)

    def make(path: Path) -> tuple[EarlyExitLanguageModel, dict]:
        return model, {"history": train(model, corpus, training, device, max_tokens=max_tokens)}

    return _model(cache, key, trained.config, device, type(model), make)


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
    """``trained`` with learned gates: from the cache, or trained now on frozen weights and kept.

    Raises:
        NotTrained: not in the cache, and ``may_train`` is False.
    """
    kind, config = type(trained.model), replace(trained.config, gate_hidden=gates.hidden)
    key = {
        "model": trained.model_hash,
        "gates": gates,
        "seed": seed,
        "text": corpus.data_hash,
        "code": _code(train_gates),
    }

    def make(path: Path) -> tuple[EarlyExitLanguageModel, dict]:
        model = kind.from_config(config).to(device)
        model.load_state_dict(trained.model.state_dict(), strict=False)  # all but the gates
        split, limits = corpus.splits["train"], (gates.max_tokens, gates.steps)
        report = train_gates(model, split, corpus.eos_id, *limits, seed=seed)
        return model, {"history": trained.history.to_dict("records"), "gates": report}

    return _model(cache, key, config, device, kind, make, may_train)


def load_trained(
    path: Path,
    config: ModelConfig,
    device: torch.device,
    kind: type[EarlyExitLanguageModel] = EarlyExitLanguageModel,
) -> Trained:
    """A stored model with its history.

    Raises:
        CheckpointError: see :func:`earlyexit.models.checkpoints.load_model`.
    """
    model = checkpoints.load_model(path, config, device, kind)
    about = checkpoints.checkpoint_about(path)
    history, gates = pd.DataFrame(about["history"]), pd.DataFrame(about.get("gates", []))
    return Trained(model, history, path.stem, gates)


def exit_trace(
    trained: Trained,
    split: Split,
    corpus: Corpus,
    cache: Path,
    temperatures: Sequence[float] | None = None,
) -> ExitTrace:
    """The trace of a trained model over a split: from the cache, or collected now and kept."""
    key = {
        "model": trained.model_hash,
        "text": corpus.data_hash,
        "split": split.name,
        "tokens": split.n_tokens,
        "temperatures": list(temperatures or ()),
        "code": _code(collect_trace, ExitTrace),
    }
    path = _kept(cache / "traces", ".parquet", key)
    if not path.exists():
        collect_trace(trained.model, split, corpus.eos_id, temperatures=temperatures).save(path)
    return ExitTrace.load(path)
