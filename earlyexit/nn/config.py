"""nn/config."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelConfig:
    """Constructor arguments of :class:`EarlyExitLanguageModel`."""

    vocab_size: int
    d_model: int = 64
    n_layers: int = 4
    n_seq: int = 128
    num_experts: int = 4
    top_k: int = 1
    dropout_p: float = 0.1
    confidence_threshold: float = 0.9
    bk_heads: int = 16
    causal: bool = True
    exit_head: str = "translator"
    tie_embeddings: bool = True
    expert_hidden: int | None = None
    gate_hidden: int | None = None
    output_head: str = "linear"
