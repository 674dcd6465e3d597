"""The original's procedure is the baseline to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit.exits.clock import marker
from earlyexit.exits.protocol import ExitModel
from earlyexit.nn.borrowed import own_precision
from earlyexit.nn.cross_entropy import precise


@torch.no_grad()
def original_early_exit(model: ExitModel, x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Run the original's procedure faithfully: nothing leaves the computation.

    After each layer every token pays the vocabulary head and a softmax, newly confident rows are
    copied under a mask, and the loop ends early only when all tokens have exited.

    Returns:
        Logits ``(B, N, V)`` and exit layers ``(B, N)``.

    Raises:
        TypeError, ValueError: ``embed`` refuses the ids.
    """
    with own_precision(model):
        return _run(model, x, threshold)


def _run(model: ExitModel, x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    mark, h = marker(), model.embed(x)
    x = x.long()
    logits = precise(h.new_zeros(*x.shape, model.vocab_size))
    exit_layers = torch.full_like(x, model.n_layers, dtype=torch.int64)
    exited = torch.zeros_like(x, dtype=torch.bool)
    mark("rest")
    for layer in range(model.n_layers):
        h = model.layer(layer, h)
        mark("blocks")
        exit_logits = model.head(layer)(h)
        mark("head")
        confidence = exit_logits.softmax(dim=-1).max(dim=-1).values
        leaving = (confidence >= threshold) & ~exited
        mark("check")
        logits = torch.where(leaving[..., None], exit_logits, logits)
        exit_layers = torch.where(leaving, layer, exit_layers)
        mark("gather/scatter")
        exited |= leaving
        if exited.all():
            return logits, exit_layers
    return torch.where(exited[..., None], logits, exit_logits), exit_layers
