"""nn/heads."""

from __future__ import annotations

from torch import Tensor, nn

from earlyexit.nn.unembedding import Unembedding


class ExitHead(nn.Module):
    """An exit classifier: features ``(…, D)`` cheap, logits ``(…, V)`` dear.

    ``exit_head="full"``: LayerNorm and its own Linear(D, V), as in the original.
    ``exit_head="translator"``: a residual affine map (Belrose et al. 2023, tuned lens, eq. 4), the
    LayerNorm, and an unembedding borrowed from the model. The last layer's head has no translator.

    Args:
        d_model: width D.
        unembedding: features to logits, owned (``borrowed=False``) or borrowed from the model.
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
        """What the unembedding reads, ``(…, D)``."""
        if self.translator is not None:
            h = h + self.translator(h)
        return self.layer_norm(h)

    def forward(self, h: Tensor) -> Tensor:
        """Hidden state ``(…, D)`` → logits ``(…, V)``."""
        return self.unembedding(self.features(h))
