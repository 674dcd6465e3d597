"""A Hugging Face decoder is given exits, or refused with a sentence that says what to do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from earlyexit.checked import brief, whole
from earlyexit.models.decoder_layers import ATTENTION, register
from earlyexit.models.pretrained import PretrainedConfig, PretrainedModel, Way, end_id

# Model types whose layers are known to be called as they are here; the tests make one of each.
FAMILIES = (
    *("gpt2", "gpt_neox", "llama", "mistral", "mixtral"),
    *("olmo2", "phi3", "qwen2", "qwen3", "smollm3"),
)
MOST_EXITS, USUAL_LENGTH = 12, 512
CHECKED_SHAPE = (2, 48)  # sequences and tokens on which full depth is compared with the model's own
TOLERANCE = 1e-3  # of logits, relative to the largest; families that are known differ by about 1e-6


def attach(
    model: nn.Module,
    tokenizer: Any = None,
    exits: int | None = None,
    *,
    n_seq: int | None = None,
    left_behind: Way = "mapped",
) -> PretrainedModel:
    """Give exits to a Hugging Face decoder, whose weights stay as they are.

    The translators of its exits and its shortcuts start as the identity, and its gates untrained: see
    :func:`earlyexit.training.translators.fit_translators` and
    :func:`earlyexit.training.gates.train_gates`. The decoder remains usable by itself; where it attends
    by another function than torch's own, it does by that from now on.

    Args:
        model: a model for causal language modelling of one of ``FAMILIES``.
        tokenizer: what made its ids; None, if ids are given by hand.
        exits: number of exits, the last layer's included; it divides the number of layers. None: the
            largest such number up to ``MOST_EXITS``.
        n_seq: longest sequence; None: 512, or fewer if the model has fewer positions.
        left_behind: see :class:`PretrainedConfig`.

    Raises:
        TypeError: it is no such model.
        ValueError: it is an encoder, of a family that is not known, or of half precision on a CPU; its
            attention slides over less than n_seq or is of another kind, or it has fewer positions;
            ``exits`` does not divide its layers; the tokenizer has no end; or full depth does not give
            the model's own logits.
    """
    config = _check_family(model)
    layers, positions = config.num_hidden_layers, config.max_position_embeddings
    n_seq = min(USUAL_LENGTH, positions) if n_seq is None else whole("n_seq", n_seq, 1)
    if n_seq > positions:
        raise ValueError(f"n_seq={n_seq}: the model has {positions} positions; give at most those")
    _check_attention(config, n_seq)
    if tokenizer is not None:
        end_id(tokenizer)
    divisors = [n for n in range(1, layers + 1) if layers % n == 0]
    exits = max(n for n in divisors if n <= MOST_EXITS) if exits is None else exits
    if whole("exits", exits, 1) not in divisors:
        raise ValueError(
            f"exits={exits} does not divide the model's {layers} layers: choose one of"
            f" {', '.join(map(str, divisors))}"
        )
    sizes = (config.hidden_size, config.vocab_size, n_seq)
    ours = PretrainedConfig(
        config.model_type, exits, layers // exits, *sizes, left_behind=left_behind
    )
    x = torch.randint(
        config.vocab_size, (CHECKED_SHAPE[0], min(n_seq, CHECKED_SHAPE[1])),
        generator=torch.Generator().manual_seed(0),
    ).to(next(model.parameters()).device)  # fmt: skip
    usual = config._attn_implementation
    model.eval()
    try:
        with torch.no_grad():
            own = model(x).logits
            register()
            config._attn_implementation = ATTENTION
            attached = PretrainedModel(model, ours, tokenizer).eval()
            gap = (attached(x) - own).abs().max().item()
        if not gap <= TOLERANCE * max(1.0, own.abs().max().item()):
            raise ValueError(
                f"full depth differs from the model's own logits by {gap:.2g}: this {config.model_type}"
                " scales, caps or mixes something that is not known here, and cannot be given exits"
            )
    except BaseException:
        config._attn_implementation = usual
        raise
    return attached


def _check_family(model: object) -> Any:
    """Return the configuration of a decoder of a family that is known."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if not isinstance(model, nn.Module) or kind is None:
        raise TypeError(
            f"{brief(model)} is no Hugging Face model: give AutoModelForCausalLM.from_pretrained(…);"
            " pip install 'earlyexit[hf]' brings transformers"
        )
    if model.get_output_embeddings() is None or not model.can_generate():
        raise ValueError(
            f"a {type(model).__name__} predicts no next word: give a decoder with its output layer, of"
            f" {', '.join(FAMILIES)}"
        )
    check_kind(config)
    weight = next(model.parameters())
    if weight.itemsize < 4 and weight.device.type == "cpu":
        raise ValueError(
            f"weights in {weight.dtype} are slow and coarse on a CPU: give model.float()"
        )
    return config


def check_kind(config: Any) -> None:
    """Raise ValueError unless a configuration of transformers is a decoder's of a known family."""
    kind, known = config.model_type, ", ".join(FAMILIES)
    if config.is_encoder_decoder:
        raise ValueError(f"{kind!r} reads with an encoder: give a decoder alone, of {known}")
    if kind not in FAMILIES:
        raise ValueError(f"{kind!r} is a family whose layers are not known here: known are {known}")


def _check_attention(config: Any, n_seq: int) -> None:
    """Raise ValueError where a token would not attend to all tokens before it."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention", "sliding_attention"
    }  # fmt: skip
    if kinds:
        raise ValueError(f"attention of the kind {', '.join(sorted(kinds))} is not known here")
    types = getattr(config, "layer_types", None)
    slides = types is None or "sliding_attention" in types
    window = getattr(config, "sliding_window", None) if slides else None
    if window is not None and window < n_seq:
        raise ValueError(
            f"the model's attention slides over {window} tokens, and n_seq={n_seq}: give n_seq={window},"
            " up to which it sees everything"
        )
