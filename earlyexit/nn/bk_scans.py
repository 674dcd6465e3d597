"""BK-Core's recursions are log-depth scans in torch, on any device.

:mod:`earlyexit.nn.bk_core` has the formulas: g is a scan of 2×2 Möbius maps, values and gradients are
scans of affine maps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _scan(combine, elements: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return inclusive prefix products along dimension 1, by doubling (Hillis & Steele 1986)."""
    length, step = elements[0].shape[1], 1
    while step < length:
        left = tuple(e[:, :-step] for e in elements)
        right = tuple(e[:, step:] for e in elements)
        done = tuple(e[:, :step] for e in elements)
        elements = tuple(
            torch.cat(pair, dim=1) for pair in zip(done, combine(left, right), strict=True)
        )
        step *= 2
    return elements


def _mobius_product(left, right):
    """Multiply matrices, first ``left`` then ``right``, and rescale: a Möbius map has no scale."""
    a, b, c, d = left
    p, q, r, s = right
    product = torch.stack([p * a + q * c, p * b + q * d, r * a + s * c, r * b + s * d])
    return tuple(product / product.abs().amax(dim=0))


def _affine_product(left, right):
    """Compose maps x → c x + d, first ``left`` then ``right``."""
    return left[0] * right[0], right[0] * left[1] + right[1]


def _affine(gain: Tensor, offset: Tensor, reverse: bool = False) -> Tensor:
    """Return x_i = gain_i x_{i−1} + offset_i, or from the other end x_i = gain_i x_{i+1} + offset_i."""
    if reverse:
        return _affine(gain.flip(1), offset.flip(1)).flip(1)
    return _scan(_affine_product, (gain, offset))[1]


def forward(given: Tensor, eta: Tensor, t: Tensor) -> Tensor:
    """Return features ``(B, N, 2H + 2H·P)``; eta and t ``(H,)`` are float64."""
    v, b = split_rows(given.double(), len(t))
    alpha = torch.complex(v - 2 * t, (-eta).expand_as(v))
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    # g_i = (0 · g + 1) / (−t² g + α_i): the prefix product applied to g_{−1} = 0 is b/d.
    _, above, _, below = _scan(_mobius_product, (zero, one, -(t**2) * one, alpha))
    g = above / below
    y = _affine((-t * g)[..., None], g[..., None] * b)
    return join_features(g, y).to(given.dtype)


def backward(features: Tensor, grad: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by given, eta and t, of those by the features."""
    (g, y), gamma = complex_parts(features, len(t)), complex_parts(grad, len(t))
    gamma_g, gamma_y = (part.conj() for part in gamma)
    mu = _affine((-t * g)[..., None], g[..., None] * gamma_y, reverse=True)
    p = _affine((t * g) ** 2, g**2 * gamma_g + (mu * y).sum(-1), reverse=True)
    d_t = 2 * p + 2 * t * after(p) * g - (after(mu) * y).sum(-1)
    d_given = torch.cat([-p.real, mu.real.flatten(2)], dim=-1)
    return d_given, -p.imag.sum((0, 1)), d_t.real.sum((0, 1))


def split_rows(given: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return v ``(B, N, H)`` and b ``(B, N, H, P)``."""
    v, b = given.tensor_split([heads], dim=-1)
    return v, b.unflatten(-1, (heads, b.shape[-1] // heads))


def complex_parts(features: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return g ``(B, N, H)`` and y ``(B, N, H, P)``, complex128."""
    g, y = features.double().tensor_split([2 * heads], dim=-1)
    y = y.unflatten(-1, (2, heads, y.shape[-1] // (2 * heads)))
    return torch.complex(*g.chunk(2, dim=-1)), torch.complex(*y.unbind(2))


def join_features(g: Tensor, y: Tensor) -> Tensor:
    """Return Re g, Im g, Re y and Im y ``(B, N, 2H + 2H·P)``."""
    return torch.cat([g.real, g.imag, y.real.flatten(2), y.imag.flatten(2)], dim=-1)


def after(x: Tensor) -> Tensor:
    """Return x_{i+1} at position i, and 0 at the last one."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


def before(x: Tensor) -> Tensor:
    """Return x_{i−1} at position i, and 0 at the first one."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
