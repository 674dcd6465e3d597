"""BK-Core's recursions are loops on the CPU, compiled by numba.

They trust the shapes and types that they are given: :mod:`earlyexit.nn.bk_core`, which has the formulas,
checks all of them first, and is the only caller.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

# Rounding may differ, but NaN and infinity stay what they are.
FAST = {"contract", "arcp", "nsz", "reassoc"}
compiled = numba.njit(cache=True, fastmath=FAST, error_model="numpy", nogil=True)


@compiled
def _forward_loop(given, eta, t, out):
    B, N, K = given.shape
    H, C = len(t), K - len(t)
    P = C // H
    g, y = np.zeros((2, H)), np.zeros((2, C))
    for s in range(B):
        g[:], y[:] = 0.0, 0.0
        for i in range(N):
            for h in range(H):
                re = given[s, i, h] - 2.0 * t[h] - t[h] * t[h] * g[0, h]
                im = -eta[h] - t[h] * t[h] * g[1, h]
                scale = 1.0 / (re * re + im * im)
                g[0, h], g[1, h] = re * scale, -im * scale
            for h in range(H):  # apart, so that the loop above becomes vector instructions
                gr, gi, th = g[0, h], g[1, h], t[h]
                out[s, i, h], out[s, i, H + h] = gr, gi
                for p in range(P):
                    c = h * P + p
                    re, im = given[s, i, H + c] - th * y[0, c], -th * y[1, c]
                    re, im = gr * re - gi * im, gr * im + gi * re
                    y[0, c], y[1, c] = re, im
                    out[s, i, 2 * H + c], out[s, i, 2 * H + C + c] = re, im


@compiled
def _backward_loop(features, grad, t, d_given, d_eta, d_t):
    B, N, K = d_given.shape
    H, C = len(t), K - len(t)
    P = C // H
    p, mu = np.zeros((2, H)), np.zeros((2, C))
    for s in range(B):
        p[:], mu[:] = 0.0, 0.0
        for i in range(N - 1, -1, -1):
            for h in range(H):
                gr, gi, th = float(features[s, i, h]), float(features[s, i, H + h]), t[h]
                now_r, now_i, next_r = 0.0, 0.0, 0.0  # Σ μ_i y_i and Re Σ μ_{i+1} y_i
                for k in range(P):
                    c = h * P + k
                    yr, yi = features[s, i, 2 * H + c], features[s, i, 2 * H + C + c]
                    re, im = mu[0, c], mu[1, c]
                    next_r += re * yr - im * yi
                    re, im = grad[s, i, 2 * H + c] - th * re, -grad[s, i, 2 * H + C + c] - th * im
                    re, im = gr * re - gi * im, gr * im + gi * re
                    now_r += re * yr - im * yi
                    now_i += re * yi + im * yr
                    mu[0, c], mu[1, c], d_given[s, i, H + c] = re, im, re
                next_r -= 2.0 * th * (p[0, h] * gr - p[1, h] * gi)
                re, im = grad[s, i, h] + th * th * p[0, h], -grad[s, i, H + h] + th * th * p[1, h]
                sr, si = gr * gr - gi * gi, 2.0 * gr * gi  # g²
                re, im = sr * re - si * im + now_r, sr * im + si * re + now_i
                p[0, h], p[1, h], d_given[s, i, h] = re, im, -re
                d_eta[h] -= im
                d_t[h] += 2.0 * re - next_r


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().resolve_neg().contiguous().numpy()


def forward(given: Tensor, eta: Tensor, t: Tensor) -> Tensor:
    """Return features ``(B, N, 2H + 2H·P)``; eta and t ``(H,)`` are float64."""
    out = given.new_empty(*given.shape[:2], 2 * given.shape[2])
    _forward_loop(_array(given), _array(eta), _array(t), out.numpy())
    return out


def backward(features: Tensor, grad: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by given, eta and t, of those by the features."""
    d_given = features.new_empty(*features.shape[:2], features.shape[2] // 2)
    d_eta, d_t = torch.zeros_like(t), torch.zeros_like(t)
    out = d_given.numpy(), d_eta.numpy(), d_t.numpy()
    _backward_loop(_array(features), _array(grad), _array(t), *out)
    return d_given, d_eta, d_t
