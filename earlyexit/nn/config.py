"""The configuration of a ResNet-BK language model, handed down to its layers."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """Constructor arguments of :class:`earlyexit.models.resnet_bk.EarlyExitLanguageModel`.

    Attributes:
        vocab_size: words V.
        d_model: width D.
        n_layers: blocks L.
        n_seq: longest sequence; shorter ones work.
        num_experts, top_k, dropout_p, expert_hidden: see :class:`earlyexit.nn.moe.SparseMoELayer`.
        confidence_threshold: maximum probability at which a token exits when no policy is given.
        bk_heads, causal: see :class:`earlyexit.nn.bk_core.BKCore`.
        exit_head: ``"translator"`` (a d×d map before one shared unembedding) or ``"full"`` (each
            exit owns LayerNorm + Linear(V)).
        tie_embeddings: the final unembedding is the token embedding; None: where it can be.
        gate_hidden: hidden units of learned gates, 0 for linear ones, None for none.
        output_head: ``"linear"`` or ``"adaptive"``; see
            :class:`earlyexit.nn.unembedding.AdaptiveUnembedding`. Exits share it.

    Raises:
        ValueError: unknown ``exit_head`` or ``output_head``, an adaptive head that is tied or not
            shared, n_layers < 1.
    """

    vocab_size: int
    d_model: int = 64
    n_layers: int = 4
    n_seq: int = 128
    num_experts: int = 4
    top_k: int = 1
    dropout_p: float = 0.1
    confidence_threshold: float = 0.9
    _: KW_ONLY
    bk_heads: int = 16
    causal: bool = True
    exit_head: Literal["translator", "full"] = "translator"
    tie_embeddings: bool | None = None
    expert_hidden: int | None = None
    gate_hidden: int | None = None
    output_head: Literal["linear", "adaptive"] = "linear"

    def __post_init__(self):
        if self.exit_head not in ("translator", "full"):
            raise ValueError(f"exit_head={self.exit_head!r} must be 'translator' or 'full'")
        if self.output_head not in ("linear", "adaptive"):
            raise ValueError(f"output_head={self.output_head!r} must be 'linear' or 'adaptive'")
        adaptive = self.output_head == "adaptive"
        if adaptive and (self.tie_embeddings or self.exit_head == "full"):
            raise ValueError("an adaptive output head is shared by the exits, and not tied")
        if self.tie_embeddings is None:
            object.__setattr__(self, "tie_embeddings", not adaptive)
        if self.n_layers < 1:
            raise ValueError(f"n_layers={self.n_layers} must be at least 1")

    def base(self) -> dict:
        """The fields that every kind of model has, without those that a subclass adds."""
        return {field.name: getattr(self, field.name) for field in fields(ModelConfig)}
