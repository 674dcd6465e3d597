"""A checkpoint holds weights as safetensors and a configuration as JSON, both checked when read."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from earlyexit.atomic import atomic_path
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.nn.config import ModelConfig


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why."""


def save_model(model: EarlyExitLanguageModel, path: Path, about: dict | None = None) -> None:
    """Write weights and configuration to one ``.safetensors`` file.

    Args:
        about: describes the weights (training, text hash) in values that JSON knows.
    """
    shared = {}  # a tied matrix is stored once
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in shared or tensor.numel() == 0:
            shared[tensor.data_ptr()] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    config = asdict(model.config) | {"confidence_threshold": model.confidence_threshold}
    metadata = {"config": json.dumps(config), "about": json.dumps(about or {})}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_model(
    path: Path,
    config: ModelConfig | None = None,
    device: str | torch.device = "cpu",
    kind: type[EarlyExitLanguageModel] = EarlyExitLanguageModel,
) -> EarlyExitLanguageModel:
    """Load the model that :func:`save_model` stored, in evaluation mode.

    Args:
        config: configuration that the checkpoint must hold; None accepts any.
        kind: class of the model.

    Raises:
        CheckpointError: the file is missing, truncated, not safetensors (a pickle, say), of another
            configuration or shape, or holds weights that are not finite.
    """
    path = Path(path)
    metadata, tensors = _read(path)
    try:
        stored = kind.config_type(**json.loads(metadata["config"]))
        model = kind.from_config(stored)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no model configuration that works: {error}") from error
    if config is not None and config != stored:
        changed = [k for k, v in asdict(config).items() if v != getattr(stored, k)]
        raise CheckpointError(f"{path} was made with another {', '.join(changed)}")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(f"{path} holds NaN or infinity in {', '.join(broken[:3])}")
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit its own configuration: {error}") from error
    tied = {"token_embedding.weight", f"blocks.{stored.n_layers - 1}.exit_classifier.linear.weight"}
    absent = set(missing)
    if stored.tie_embeddings and len(absent & tied) == 1:  # one matrix, stored once
        absent -= tied
    if unexpected or absent:
        raise CheckpointError(
            f"{path} was made by another version: {len(missing)} weights are missing"
            f" ({', '.join(missing[:3])} …), {len(unexpected)} unexpected: train the model again"
        )
    return model.to(device).eval()


def checkpoint_about(path: Path) -> dict:
    """Return the description ``about`` that :func:`save_model` stored.

    Raises:
        CheckpointError: the file cannot be read, or holds no description.
    """
    try:
        return json.loads(_read(Path(path))[0]["about"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} does not say how it was made: {error}") from error


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); pickles are never loaded:"
            " delete it and train again"
        ) from error
