"""An exit head turns a layer's states into logits."""

from __future__ import annotations

from torch import Tensor, nn

from earlyexit.nn.unembedding import Unembedding


class ExitHead(nn.Module):
    """An exit head makes features ``(…, D)``, which are cheap, and logits ``(…, V)``, which are dear.

    With ``exit_head="full"`` it is LayerNorm and its own Linear(D, V), as in the original. With
    ``exit_head="translator"`` it is a residual affine map (Belrose et al. 2023, tuned lens, eq. 4),
    LayerNorm, and an unembedding borrowed from the model; the last layer's head has no translator.
    With ``exit_head="own"`` it is the same before an unembedding of its own.

    Args:
        d_model: width D.
        unembedding: turns features into logits.
        borrowed: whether the unembedding belongs to the model rather than to the head.
        translate: put a translator before the LayerNorm.
    """

    def __init__(self, d_model: int, unembedding: Unembedding, *, borrowed: bool, translate: bool):
        super().__init__()
        self.translator = nn.Linear(d_model, d_model) if translate else None
        if self.translator is not None:  # starts as the identity: h + 0
            nn.init.zeros_(self.translator.weight)
            nn.init.zeros_(self.translator.bias)
        self.layer_norm = nn.LayerNorm(d_model)
        self.linear = None if borrowed else unembedding
        self._borrowed = (unembedding,) if borrowed else ()  # a tuple hides it from state_dict

    @property
    def unembedding(self) -> Unembedding:
        return self._borrowed[0] if self._borrowed else self.linear

    def features(self, h: Tensor) -> Tensor:
        """Return what the unembedding reads of states: ``(…, D)`` → ``(…, D)``."""
        if self.translator is not None:
            h = h + self.translator(h)
        return self.layer_norm(h)

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits ``(…, V)`` of states ``(…, D)``."""
        return self.unembedding(self.features(h))
