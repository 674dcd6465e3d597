"""The cross-entropy of a linear layer is computed in chunks that stay in a cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from earlyexit.corpus.windows import IGNORE, checked_targets

CHUNK_ELEMENTS = 320_000  # 1.3 MB of float32: stays in a second-level cache


def precise(tensor: Tensor) -> Tensor:
    """Return a tensor of half precision in float32, others as they are.

    Logits of a model of half precision are made in float32: in bfloat16 all that follows from them would
    be rounded to three digits.
    """
    return tensor.float() if tensor.itemsize < 4 else tensor


def logit_chunks(
    features: Tensor, weight: Tensor, bias: Tensor | None = None, reuse: bool = False
) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of ``features @ weight.T + bias``, chunk by chunk.

    Args:
        features: ``(T, D)``; weight: ``(V, D)``; bias: ``(V,)`` or None.
        reuse: write every chunk over the one before, which a cache likes; without gradients.

    Yields:
        The slice of rows and their logits ``(rows, V)``, which the caller may overwrite; one empty
        chunk where there are no rows.
    """
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    memory = features.new_empty(min(rows, len(features)), len(weight)) if reuse else None
    for start in range(0, max(1, len(features)), rows):
        part = slice(start, min(start + rows, len(features)))
        if memory is None:
            yield part, torch.nn.functional.linear(features[part], weight, bias)
        else:
            logits = torch.mm(features[part], weight.T, out=memory[: part.stop - start])
            yield part, logits if bias is None else logits.add_(bias)


def softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replace logits ``(T, V)`` by probabilities; return them and the log-normalisers ``(T,)``."""
    top = logits.amax(dim=-1)
    p = torch.softmax(logits, dim=-1, out=logits)
    return p, top - p.amax(dim=-1).log()  # the largest probability is exp(top − log-normaliser)


class Teacher(NamedTuple):
    """A teacher is another head on the same tokens; its prediction is part of the target.

    Attributes:
        features: what its unembedding reads ``(T, D)``; it gets no gradient.
        unembedding: turns the features into logits.
        share: the share of the target that it supplies, between 0 and 1.
    """

    features: Tensor
    unembedding: nn.Module
    share: float


class _LinearCrossEntropy(torch.autograd.Function):
    """The mean cross-entropy of a linear layer makes its gradient in the forward pass.

    The softmax of a chunk becomes its own gradient in place (Wijmans et al. 2024, Cut Your Losses;
    Hsu et al. 2024, Liger Kernel), so that no logits outlive their chunk.
    """

    @staticmethod
    def forward(ctx, features, weight, bias, targets, bf16, teacher):
        scored = targets != IGNORE
        count = scored.sum().clamp_min(1)
        d_features = torch.zeros_like(features)
        d_weight = torch.zeros_like(weight)
        d_bias = torch.zeros_like(bias) if bias is not None else None
        inputs, matrix = (features.bfloat16(), weight.bfloat16()) if bf16 else (features, weight)
        offset = bias.to(matrix.dtype) if bias is not None else None
        loss = features.new_zeros(())
        for part, logits in logit_chunks(inputs, matrix, offset, reuse=True):
            logits = precise(logits)
            target, valid = targets[part].clamp_min(0)[:, None], scored[part]
            share = 1.0  # of the target that is the word itself
            wanted = logits.gather(1, target).squeeze(1)
            if teacher is not None:
                share = 1.0 - teacher.share
                soft = teacher.unembedding(teacher.features[part])
                soft = softmax_(soft)[0].mul_(teacher.share)
                wanted = share * wanted + (soft * logits).sum(dim=-1)
            grad, log_total = softmax_(logits)
            loss += ((log_total - wanted) * valid).sum()
            grad.scatter_add_(1, target, torch.full_like(target, -share, dtype=grad.dtype))
            if teacher is not None:
                grad.sub_(soft)
            grad.mul_((valid / count)[:, None])
            if d_bias is not None:
                d_bias += grad.sum(dim=0)
            grad = grad.to(matrix.dtype)
            d_features[part] = grad @ matrix
            if bf16:
                d_weight += grad.T @ inputs[part]
            else:
                d_weight.addmm_(grad.T, inputs[part])
        ctx.save_for_backward(d_features, d_weight, d_bias)
        return loss / count

    @staticmethod
    def backward(ctx, scale):
        return *(None if g is None else g * scale for g in ctx.saved_tensors), None, None, None


def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    bf16: bool = False,
    teacher: Teacher | None = None,
) -> Tensor:
    """Return the mean cross-entropy in nats over the targets that are not ``IGNORE``.

    Args:
        features: ``(T, D)``; weight: ``(V, D)``; bias: ``(V,)`` or None; targets: ``(T,)``.
        bf16: matrix products in bfloat16, sums and exponentials in float32.
        teacher: supplies part of each target (self-distillation); the rest is the word.

    Raises:
        TypeError, ValueError: see :func:`earlyexit.corpus.windows.checked_targets`.
    """
    targets = checked_targets(targets, len(weight))
    return _LinearCrossEntropy.apply(features, weight, bias, targets, bf16, teacher)
