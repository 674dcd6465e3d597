"""A checkpoint holds weights as safetensors and a configuration as JSON, both checked when read.

Its metadata has one entry, a JSON document with the model's kind and configuration, what was said about
it, and a digest of these and of all weights: equal models give equal bytes, and a flipped bit is found.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from earlyexit.atomic import atomic_path
from earlyexit.checked import parse
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.nn.config import ModelConfig

ENTRY = "earlyexit"  # the key of the document in a file's metadata


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says why."""


def save_model(model: EarlyExitLanguageModel, path: Path, about: dict | None = None) -> None:
    """Write weights and configuration to one ``.safetensors`` file.

    Args:
        model: a model of the package, or what ``torch.compile`` made of one.
        about: describes the weights in values that JSON knows; "text" is the hash of the text that
            they were trained on.

    Raises:
        CheckpointError: the model could not be read back: it is of another kind, holds NaN or infinity,
            or was changed so that it no longer fits its configuration.
        TypeError, ValueError: ``about`` holds values that JSON does not give back.
        OSError: writing failed.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, EarlyExitLanguageModel):
        raise CheckpointError(
            f"a {type(model).__name__} cannot be saved: only models of earlyexit can be read back"
        )
    shared = set()  # a tied matrix is stored once
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in shared or tensor.numel() == 0:
            shared.add(tensor.data_ptr())
            tensors[name] = tensor.detach().cpu().contiguous()
    config = asdict(model.config) | {"confidence_threshold": model.confidence_threshold}
    text = {"text": model.trained_on} if model.trained_on else {}
    document = {"kind": type(model).__name__, "config": config, "about": text | (about or {})}
    if json.loads(json.dumps(document, allow_nan=False)) != document:
        raise ValueError("about: give lists, and dictionaries with keys of text, as JSON has them")
    if wrong := _unfit(type(model), type(model.config)(**config), tensors):
        raise CheckpointError(f"the model cannot be saved: it {wrong}")
    document["digest"] = _digest(document, tensors)
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, {ENTRY: json.dumps(document)}))


def load_model(
    path: Path,
    config: ModelConfig | None = None,
    device: str | torch.device = "cpu",
    kind: type[EarlyExitLanguageModel] = EarlyExitLanguageModel,
) -> EarlyExitLanguageModel:
    """Load the model that :func:`save_model` stored, in its precision, in evaluation mode.

    Args:
        config: configuration that the checkpoint must hold; None accepts any.
        kind: class of the model.

    Raises:
        CheckpointError: the file is missing, truncated, changed, not safetensors (a pickle, say), of
            another kind, configuration or shape, or holds weights that are not finite.
    """
    path = Path(path)
    document, tensors = _read(path)
    if (held := document.get("kind", kind.__name__)) != kind.__name__:
        raise CheckpointError(f"{path} holds a model of another kind: load it with kind={held}")
    try:
        stored = kind.config_type(**document["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no model configuration that works: {error}") from error
    if config is not None and config != stored:
        changed = [k for k, v in asdict(config).items() if v != getattr(stored, k)]
        raise CheckpointError(f"{path} was made with another {', '.join(changed)}")
    if wrong := _unfit(kind, stored, tensors):
        raise CheckpointError(f"{path} {wrong}: train the model again")
    model = kind.from_config(stored)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in tensors:
            tensor.data = tensor.data.to(tensors[name].dtype)
    model.load_state_dict(tensors, strict=False)
    model.trained_on = str((document.get("about") or {}).get("text", ""))
    return model.to(device).eval()


def checkpoint_about(path: Path) -> dict:
    """Return the description ``about`` that :func:`save_model` stored.

    Raises:
        CheckpointError: the file cannot be read, or holds no description.
    """
    about = _read(Path(path))[0].get("about")
    if not isinstance(about, dict):
        raise CheckpointError(f"{path} does not say how it was made")
    return about


def _unfit(
    kind: type[EarlyExitLanguageModel], config: ModelConfig, tensors: dict[str, Tensor]
) -> str:
    """Say in words why these weights make no model of this configuration; "" if they do.

    Nothing large is built before sizes are known to fit.
    """
    numbers = sum(tensor.numel() for tensor in tensors.values())
    limits = {"n_layers": len(tensors)}  # every layer has a tensor, every other size an axis of one
    for name, value in asdict(config).items():
        if isinstance(value, int) and value > limits.get(name, numbers):
            return f"does not fit its own configuration: {name}={value}"
    try:
        with torch.device("meta"):
            model = kind.from_config(config)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        return f"holds no model configuration that works: {str(error).splitlines()[0]}"
    expected = model.state_dict()
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    tied = {"token_embedding.weight", f"blocks.{config.n_layers - 1}.exit_classifier.linear.weight"}
    if config.tie_embeddings and len(missing & tied) == 1:  # one matrix, stored once
        missing -= tied
    if missing or unexpected:
        return (
            f"was made by another version: {len(missing)} weights are missing"
            f" ({', '.join(sorted(missing)[:3])} …), {len(unexpected)} unexpected"
        )
    for name, tensor in tensors.items():
        kinds = {expected[name].is_floating_point(), tensor.is_floating_point()}
        if expected[name].shape != tensor.shape or len(kinds) > 1:
            return (
                f"does not fit its own configuration: {name} is {tensor.dtype}"
                f" {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            )
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    return f"holds NaN or infinity in {', '.join(broken[:3])}" if broken else ""


def _digest(document: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of a document without its digest, and of the weights it describes."""
    content = {key: value for key, value in document.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the document and the tensors of a file, if they are what was written."""
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = file.keys(), file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, struct.error) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); pickles are never loaded:"
            " delete it and train again"
        ) from error
    try:
        if ENTRY in metadata:
            document = parse(metadata[ENTRY], dict)
        else:  # a file of an earlier version, without a digest
            document = {key: parse(metadata[key]) for key in ("config", "about")}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no model configuration: {error}") from error
    if ENTRY in metadata and document.get("digest") != _digest(document, tensors):
        raise CheckpointError(f"{path} was changed after it was written: its digest does not fit")
    return document, tensors
