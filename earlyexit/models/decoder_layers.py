"""A decoder's own layers are called with tokens that run and tokens that have left.

transformers lets a model call any function for attention. The one that is registered here does what
torch's own does, unless a call brings an :class:`Attending`, which knows which tokens are running.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ATTENTION = "earlyexit"  # its name among the attention functions of transformers


class KeysMade(Exception):
    """Keys and values of tokens that have left are made; the rest of the layer is not run for them."""


class Attending:
    """The attention of running tokens to all tokens up to themselves, of the same sequence.

    Args:
        shape: sequences B and positions N of the batch.
        rows: which of the B·N tokens are running ``(A,)``, ascending; None if all are.
        others: the rest of the tokens ``(X,)``.
        past: positions before these that the cache holds.
    """

    def __init__(self, shape: tuple[int, int], rows: Tensor | None, others: Tensor, past: int):
        self.shape, self.rows, self.others, self.past = shape, rows, others, past
        self.slots = self.mask = self.blank = None
        self.left: tuple[Tensor, Tensor] | None = None  # keys and values of ``others`` (X, H, d)
        self.cache: tuple[Tensor, Tensor] | None = None  # of the layer that runs
        if rows is None:
            return
        # Queries are padded to the longest sequence of running tokens; nothing else is.
        counts = (rows // shape[1]).bincount(minlength=shape[0])
        self.width = int(counts.max())
        rank = (
            torch.arange(len(rows), device=rows.device)
            - (counts.cumsum(0) - counts)[rows // shape[1]]
        )
        self.slots = rows // shape[1] * self.width + rank
        seen = torch.zeros(shape[0] * self.width, dtype=torch.int64, device=rows.device)
        seen[self.slots] = past + rows % shape[1]
        positions = torch.arange(past + shape[1], device=rows.device)
        self.mask = positions <= seen.view(shape[0], 1, self.width, 1)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Return what the running tokens take ``(1, A, H, d)``; arguments are ``(1, H, A, d)``."""
        groups = query.shape[1] // key.shape[1]
        self.keep(*(t.squeeze(0).transpose(0, 1) for t in (key, value)))
        key, value = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in self.cache)
        query = query.squeeze(0).transpose(0, 1)  # (A, H, d)
        if self.slots is not None:
            padded = query.new_zeros(self.shape[0] * self.width, *query.shape[1:])
            query = padded.index_copy(0, self.slots, query)
        query = query.unflatten(0, (self.shape[0], -1)).transpose(1, 2)
        causal = self.mask is None and not self.past
        out = F.scaled_dot_product_attention(
            query, key, value, self.mask, is_causal=causal, scale=scale
        )
        out = out.transpose(1, 2).flatten(0, 1)
        return (out if self.slots is None else out.index_select(0, self.slots)).unsqueeze(0)

    def keep(self, key: Tensor, value: Tensor) -> None:
        """Join keys and values of the running tokens ``(A, H, d)`` to those of all in ``cache``."""
        self.cache = self._joined(key, 0), self._joined(value, 1)

    def _joined(self, made: Tensor, index: int) -> Tensor:
        """Return keys or values of all tokens so far ``(B, H, past + N, d)`` from ``(A, H, d)``."""
        if self.left is not None:
            joined = made.new_empty(self.shape[0] * self.shape[1], *made.shape[1:])
            joined = joined.index_copy(0, self.rows, made)
            made = joined.index_copy(0, self.others, self.left[index])
        if self.blank is not None:
            made = made.masked_fill(self.blank[:, None, None], 0)
        made = made.unflatten(0, self.shape).transpose(1, 2)
        return torch.cat([self.cache[index], made], dim=2) if self.past else made


def call_layer(block: nn.Module, h: Tensor, turned, attending: Callable) -> Tensor:
    """Call a layer of the decoder with states ``(A, D)`` of tokens of any sequence."""
    out = block(h[None], attention_mask=None, position_embeddings=turned, attending=attending)
    return (out[0] if isinstance(out, tuple) else out).squeeze(0)


def keys_and_values(block: nn.Module, h: Tensor, turned) -> tuple[Tensor, Tensor]:
    """Return keys and values ``(X, H, d)`` that a layer makes of states ``(X, D)``."""
    try:
        call_layer(block, h, turned, _stop)
    except KeysMade as made:
        return tuple(t.squeeze(0).transpose(0, 1) for t in made.args)
    raise AssertionError("the layer did not call its attention")


def _stop(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    raise KeysMade(key, value)


def register() -> None:
    """Tell transformers of the attention function; a model that runs by itself gets torch's own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module, query, key, value, attention_mask, scaling=None, attending=None, **others
    ):
        if attending is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **others
            )
        unknown = [n for n in ("softcap", "s_aux", "position_bias") if others.get(n) is not None]
        if unknown:
            raise ValueError(f"attention with {', '.join(unknown)} is not known here")
        return attending(query, key, value, scaling), None

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
