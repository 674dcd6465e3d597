"""Hugging Face decoders of every family, tiny and random, and the same with exits."""

from __future__ import annotations

import torch
import transformers

from earlyexit import attach

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
SPECIAL = {
    "gpt2": {"n_inner": 48}, "gpt_neox": {"rotary_pct": 0.25}, "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": None}, "olmo2": GROUPED, "phi3": GROUPED,
    "mixtral": GROUPED | {"num_local_experts": 4}, "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 12}, "smollm3": GROUPED | {"no_rope_layers": [1, 0, 1, 1]},
}  # fmt: skip


def decoder(family: str, **changes):
    """A decoder with random weights, large enough that tokens really differ."""
    torch.manual_seed(0)
    known = SIZES | SPECIAL.get(family, {}) | changes
    if family == "gpt2":
        known["n_positions"] = known["max_position_embeddings"]
    config = transformers.AutoConfig.for_model(family, **known)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def gated(model, **arguments):
    """The model with an exit after every layer and gates of noise, the same each time."""
    attached = attach(model, **{"exits": 4} | arguments)
    generator = torch.Generator().manual_seed(2)
    for gate in attached.gates.gates:
        torch.nn.init.normal_(gate.weight, std=0.3, generator=generator)
    for shortcut in attached.shortcuts:
        torch.nn.init.normal_(shortcut.weight, std=0.1, generator=generator)
    attached.gates.trained.fill_(True)
    return attached
