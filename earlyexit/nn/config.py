"""One configuration describes a ResNet-BK language model, and is handed down to its layers."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields
from typing import Annotated, Literal

from pydantic import Field

from earlyexit.checked import Checked, Count, Dropout, Limit, Share


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Its fields are the arguments of :class:`earlyexit.models.resnet_bk.EarlyExitLanguageModel`.

    Attributes:
        vocab_size: words V.
        d_model: width D.
        n_layers: blocks L.
        n_seq: longest sequence; shorter ones work.
        num_experts, top_k, dropout_p, expert_hidden: see :class:`earlyexit.nn.moe.SparseMoELayer`.
        confidence_threshold: maximum probability at which a token exits when no policy is given.
        mixing: what carries the past to a token: BK-Core, or one of two controls, causal attention and
            nothing; see :mod:`earlyexit.nn.mixing`.
        bk_heads, bk_values, causal: see :class:`earlyexit.nn.bk_core.BKCore`.
        bk_starts: where potentials start, in or below the band; see :func:`earlyexit.nn.mixing.starts`.
        left_behind: what exited tokens hand to layers that they do not run: potentials and values made
            of their frozen states (``"recomputed"``), those of the last layer that they ran
            (``"kept"``), or recomputed ``"potentials"`` with values 0.
        exit_head: ``"translator"`` (a d×d map before one shared unembedding), ``"own"`` (a d×d map
            before an unembedding of its own, which costs parameters, but no FLOPs) or ``"full"`` (each
            exit owns LayerNorm + Linear(V)).
        tie_embeddings: the final unembedding is the token embedding; None: where it can be.
        gate_hidden: hidden units of learned gates, 0 for linear ones, None for none.
        output_head: ``"linear"`` or ``"adaptive"``; see
            :class:`earlyexit.nn.unembedding.AdaptiveUnembedding`.

    Raises:
        ValueError: a value outside its range, more experts per token than there are, or an adaptive
            head that is tied or that exits should own as Linear(V).
    """

    vocab_size: Annotated[int, Field(ge=2)]
    d_model: Count = 64
    n_layers: Count = 4
    n_seq: Count = 128
    num_experts: Count = 4
    top_k: Count = 1
    dropout_p: Dropout = 0.1
    confidence_threshold: Share = 0.9
    _: KW_ONLY
    mixing: Literal["resolvent", "attention", "none"] = "resolvent"
    bk_heads: Count = 16
    bk_values: Limit = 4
    bk_starts: Literal["below", "both", "band"] = "below"
    left_behind: Literal["recomputed", "kept", "potentials"] = "recomputed"
    causal: bool = True
    exit_head: Literal["translator", "own", "full"] = "translator"
    tie_embeddings: bool | None = None
    expert_hidden: Count | None = None
    gate_hidden: Limit | None = None
    output_head: Literal["linear", "adaptive"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k}: must be ≤ num_experts={self.num_experts}")
        if self.left_behind == "potentials" and self.mixing != "resolvent":
            raise ValueError(f"mixing={self.mixing!r} has no potentials: left_behind='recomputed'")
        adaptive = self.output_head == "adaptive"
        if adaptive and (self.tie_embeddings or self.exit_head == "full"):
            raise ValueError(
                "an adaptive output head is not tied, and exits have it too: exit_head='translator' or"
                " 'own'"
            )
        if self.tie_embeddings is None:
            object.__setattr__(self, "tie_embeddings", not adaptive)

    def base(self) -> dict:
        """Return the fields that every kind of model has, without those that a subclass adds."""
        return {field.name: getattr(self, field.name) for field in fields(ModelConfig)}

    def check_trainable(self) -> None:
        """Refuse sizes that can be counted, but not built.

        Raises:
            ValueError: an adaptive head without enough words or width for its clusters.
        """
        if self.output_head == "adaptive" and (self.vocab_size < 10 or self.d_model < 4):
            raise ValueError(
                f"no adaptive output head of {self.vocab_size} words and width {self.d_model}: it"
                " needs vocab_size ≥ 10 and d_model ≥ 4, or output_head='linear'"
            )
