"""BK-Core applies the resolvent of a tridiagonal Hamiltonian to values, in O(N).

One head is a particle on a line of N sites. With coupling t, width η and a learned potential v_i,

    H = t · tridiag(1, −2, 1) + diag(v),        z = iη,        α_i = v_i − 2t − iη.

**Causal** (default). The last diagonal entry of (H[0..i] − zI)⁻¹ is the left-connected Green's
function, a continued fraction that sees no site after i (the recursive Green's function method,
Thouless & Kirkpatrick 1981; Economou, *Green's Functions in Quantum Physics*, ch. 5):

    g_i = 1 / (α_i − t² g_{i−1}),               g_{−1} = 0.

Because Im α < 0, Im g stays positive and |g| ≤ 1/η: the ratio form neither overflows nor vanishes,
whatever N. The recursions run in double precision and are rounded to the precision of their input.

**On values**. The diagonal carries two numbers per head and no content. The resolvent itself carries
content: of real values b_i, the last component of (H[0..i] − zI)⁻¹ b[0..i] is, by forward elimination,

    y_i = g_i (b_i − t y_{i−1}),                y_{−1} = 0,                |y_i| ≤ ‖b‖/η.

The lower half of this inverse is semiseparable, so y is a state-space model whose complex decay −t g_i
depends on the token (compare Dao & Gu 2024, arXiv:2405.21060). Its state is (g, y).

**Two-sided**. With g', y' the same recursions from the other end, the whole inverse has
G_ii = 1 / (1/g_i − t² g'_{i+1}), and its action is G_ii (b_i − t y_{i−1} − t y'_{i+1}): both depend on
every site, the future included.

**Gradient**, exact. Let γ_i = ∂L/∂Re y_i − i ∂L/∂Im y_i, so that dL = Re Σ γ dy, and the same for g.
The adjoint μ = ∂L/∂b obeys the recursion of y from the other end, and p = −∂L/∂α one like that of g:

    μ_i = g_i (γ_i − t μ_{i+1}),                p_i = g_i² (γ_i + t² p_{i+1}) + Σ_channels μ_i y_i,
    dL = Re Σ_i  μ_i db_i − p_i (dv_i − i dη) + (2 p_i + 2t p_{i+1} g_i − Σ_channels μ_{i+1} y_i) dt.

Two backends give the same numbers: compiled loops on the CPU (numba), and in torch, on any device,
log-depth scans of 2×2 Möbius maps (g) and of affine maps (values and gradients). Both map ``given``, a
row of H potentials and H·P values for each position, to a row of features Re g, Im g, Re y, Im y.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

FLOOR = 1e-6  # of the widths η; it keeps |g| ≤ 1/η far from overflow

# ---------------------------------------------------------------------- compiled loops

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


def _forward_cpu(given: Tensor, eta: Tensor, t: Tensor) -> Tensor:
    out = given.new_empty(*given.shape[:2], 2 * given.shape[2])
    _forward_loop(_array(given), _array(eta), _array(t), out.numpy())
    return out


def _backward_cpu(features: Tensor, grad: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_given = features.new_empty(*features.shape[:2], features.shape[2] // 2)
    d_eta, d_t = torch.zeros_like(t), torch.zeros_like(t)
    out = d_given.numpy(), d_eta.numpy(), d_t.numpy()
    _backward_loop(_array(features), _array(grad), _array(t), *out)
    return d_given, d_eta, d_t


# ---------------------------------------------------------------------- scans in torch


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


def _forward_torch(given: Tensor, eta: Tensor, t: Tensor) -> Tensor:
    v, b = _split(given.double(), len(t))
    alpha = torch.complex(v - 2 * t, (-eta).expand_as(v))
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    # g_i = (0 · g + 1) / (−t² g + α_i): the prefix product applied to g_{−1} = 0 is b/d.
    _, above, _, below = _scan(_mobius_product, (zero, one, -(t**2) * one, alpha))
    g = above / below
    y = _affine((-t * g)[..., None], g[..., None] * b)
    return _features(g, y).to(given.dtype)


def _backward_torch(features: Tensor, grad: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (g, y), gamma = _complex(features, len(t)), _complex(grad, len(t))
    gamma_g, gamma_y = (part.conj() for part in gamma)
    mu = _affine((-t * g)[..., None], g[..., None] * gamma_y, reverse=True)
    p = _affine((t * g) ** 2, g**2 * gamma_g + (mu * y).sum(-1), reverse=True)
    d_t = 2 * p + 2 * t * _after(p) * g - (_after(mu) * y).sum(-1)
    d_given = torch.cat([-p.real, mu.real.flatten(2)], dim=-1)
    return d_given, -p.imag.sum((0, 1)), d_t.real.sum((0, 1))


def _split(given: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return v ``(B, N, H)`` and b ``(B, N, H, P)``."""
    v, b = given.tensor_split([heads], dim=-1)
    return v, b.unflatten(-1, (heads, b.shape[-1] // heads))


def _complex(features: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return g ``(B, N, H)`` and y ``(B, N, H, P)``, complex128."""
    g, y = features.double().tensor_split([2 * heads], dim=-1)
    y = y.unflatten(-1, (2, heads, y.shape[-1] // (2 * heads)))
    return torch.complex(*g.chunk(2, dim=-1)), torch.complex(*y.unbind(2))


def _features(g: Tensor, y: Tensor) -> Tensor:
    """Return Re g, Im g, Re y and Im y ``(B, N, 2H + 2H·P)``."""
    return torch.cat([g.real, g.imag, y.real.flatten(2), y.imag.flatten(2)], dim=-1)


def _after(x: Tensor) -> Tensor:
    """Return x_{i+1} at position i, and 0 at the last one."""
    return torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], dim=1)


def _before(x: Tensor) -> Tensor:
    """Return x_{i−1} at position i, and 0 at the first one."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


# ---------------------------------------------------------------------- what callers use


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, given, eta, t, backend):
        t64 = t.double()
        run = _forward_cpu if backend == "cpu" else _forward_torch
        features = run(given, eta.double(), t64)
        ctx.save_for_backward(features, t64)
        ctx.backend, ctx.dtypes = backend, (given.dtype, eta.dtype, t.dtype)
        return features

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        features, t = ctx.saved_tensors
        run = _backward_cpu if ctx.backend == "cpu" else _backward_torch
        grads = run(features, grad, t)
        return *(d.to(k) for d, k in zip(grads, ctx.dtypes, strict=True)), None


def _two_sided(given: Tensor, eta: Tensor, t: Tensor, backend: str) -> Tensor:
    """Return the features of the whole inverse, from both causal solves of ``given``, in float64."""
    heads, t64 = len(t), t.double()
    left_g, left_y = _complex(_Causal.apply(given, eta, t, backend), heads)
    right = _Causal.apply(given.flip(1), eta, t, backend).flip(1)
    right_g, right_y = _complex(right, heads)
    g = left_g / (1 - t64**2 * left_g * _after(right_g))
    _, b = _split(given, heads)
    y = g[..., None] * (b - t64[:, None] * (_before(left_y) + _after(right_y)))
    return _features(g, y)


def causal_features(given: Tensor, eta: Tensor, t: Tensor, backend: str = "auto") -> Tensor:
    """Return Re g, Im g, Re y and Im y ``(B, N, 2H + 2H·P)``, in the precision of ``given``.

    Args:
        given: potentials v and values b ``(B, N, H + H·P)``, real, P ≥ 0; half precisions are
            computed in float32.
        eta: widths ``(H,)``, > 0.
        t: couplings ``(H,)``.
        backend: ``"cpu"`` (compiled loops), ``"torch"`` (log-depth scans), or ``"auto"`` by device.

    Raises:
        TypeError: a tensor is not real floating point.
        ValueError: shapes or devices do not fit together, or there is no such backend.
    """
    backend = _check_rows(given, eta, t, backend)
    plain = given if given.dtype in (torch.float32, torch.float64) else given.float()
    return _Causal.apply(plain, eta, t, backend).to(given.dtype)


def two_sided_features(given: Tensor, eta: Tensor, t: Tensor, backend: str = "auto") -> Tensor:
    """Return what :func:`causal_features` does for the whole inverse, which sees the future."""
    backend = _check_rows(given, eta, t, backend)
    return _two_sided(given.double(), eta, t, backend).to(given.dtype)


def causal_action(
    v: Tensor, b: Tensor, eta: Tensor, t: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return g_i and the last component of (H[0..i] − iη)⁻¹ b[0..i], for every position i.

    Args:
        v: potentials ``(B, N, H)``, real.
        b: values of P channels per head ``(B, N, H, P)``, real.
        eta, t, backend: see :func:`causal_features`, also for what is raised.

    Returns:
        g, complex128 ``(B, N, H)``, and Re y, Im y ``(B, N, 2, H, P)`` in the precision of b.
    """
    return _action(_Causal.apply, v, b, eta, t, backend)


def two_sided_action(
    v: Tensor, b: Tensor, eta: Tensor, t: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return what :func:`causal_action` does for the whole (H − iη)⁻¹, which sees the future."""
    return _action(_two_sided, v, b, eta, t, backend)


def causal_resolvent(v: Tensor, eta: Tensor, t: Tensor, backend: str = "auto") -> Tensor:
    """Return the left-connected Green's function g_i of every head, complex128 ``(B, N, H)``."""
    return causal_action(v, v[..., None][..., :0], eta, t, backend)[0]


def two_sided_resolvent(v: Tensor, eta: Tensor, t: Tensor, backend: str = "auto") -> Tensor:
    """Return the diagonal of (H − iη)⁻¹, complex128 ``(B, N, H)``, which depends on the future."""
    return two_sided_action(v, v[..., None][..., :0], eta, t, backend)[0]


def _action(run, v: Tensor, b: Tensor, eta: Tensor, t: Tensor, backend: str):
    backend = _check(eta, t, backend, v=v, b=b)
    if v.dim() != 3 or v.shape[2] != len(eta) or b.dim() != 4 or b.shape[:3] != v.shape:
        raise ValueError(
            f"v {tuple(v.shape)} and b {tuple(b.shape)}: with {len(eta)} heads they must be"
            f" (B, N, {len(eta)}) and (B, N, {len(eta)}, P)"
        )
    given = torch.cat([v.double(), b.double().flatten(2)], dim=-1)
    features = run(given, eta, t, backend)
    g, _ = _complex(features, len(eta))
    return g, features[..., 2 * len(eta) :].unflatten(-1, (2, *b.shape[2:])).to(b.dtype)


def _check(eta: Tensor, t: Tensor, backend: str, **inputs: Tensor) -> str:
    """Return the backend to use, or raise: compiled loops trust all that they are given."""
    first, tensor = next(iter(inputs.items()))
    device = tensor.device
    for name, tensor in (inputs | {"eta": eta, "t": t}).items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: convert it to a real floating-point type")
        if tensor.device != device:
            raise ValueError(f"{first} is on {device}, {name} on {tensor.device}: move one of them")
    if eta.dim() != 1 or len(eta) == 0 or eta.shape != t.shape:
        raise ValueError(
            f"eta {tuple(eta.shape)} and t {tuple(t.shape)}: both must be (H,), one for each head"
        )
    if backend == "auto":
        return "cpu" if device.type == "cpu" else "torch"
    if backend not in ("cpu", "torch"):
        raise ValueError(f"backend={backend!r}: choose 'auto', 'cpu' or 'torch'")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend='cpu' with tensors on {device}: move them, or choose 'torch'")
    return backend


def _check_rows(given: Tensor, eta: Tensor, t: Tensor, backend: str) -> str:
    backend = _check(eta, t, backend, given=given)
    if given.dim() != 3 or given.shape[2] == 0 or given.shape[2] % len(eta):
        raise ValueError(
            f"given {tuple(given.shape)}: with {len(eta)} heads it must be (B, N, H + H·P), potentials"
            " and P values for each head"
        )
    return backend


class BKCore(nn.Module):
    """BK-Core has H heads, each with a learned width η > 0 and coupling t, and P values per head.

    Args:
        n_heads: number of potentials H per token.
        causal: the left-connected Green's function (default) or the two-sided resolvent.
        n_values: value channels P per head; 0 is the original's form, the diagonal alone.
        widths: η that heads start with ``(H,)``; by default spread over a decade, so that they
            remember over different lengths.
    """

    def __init__(
        self,
        n_heads: int,
        causal: bool = True,
        *,
        n_values: int = 0,
        widths: Tensor | None = None,
    ):
        super().__init__()
        self.n_heads, self.causal, self.n_values = n_heads, causal, n_values
        widths = torch.logspace(-1.3, -0.3, n_heads) if widths is None else widths
        above = (widths.double() - FLOOR).clamp_min(FLOOR)  # softplus keeps η positive
        self.eta_raw = nn.Parameter(torch.log(torch.expm1(above)).float())
        self.t = nn.Parameter(torch.ones(n_heads))

    @property
    def eta(self) -> Tensor:
        """Return the widths ``(H,)``; their floor keeps |g| ≤ 1/η far from overflow."""
        return F.softplus(self.eta_raw) + FLOOR

    def forward(self, given: Tensor, backend: str = "auto") -> Tensor:
        """Return features of potentials and values, ``(B, N, H + H·P)`` → ``(B, N, 2H + 2H·P)``.

        See :func:`causal_features`, also for what is raised.
        """
        self._check_width(given)
        features = causal_features if self.causal else two_sided_features
        return features(given, self.eta, self.t, backend)

    def step(self, state: Tensor | None, given: Tensor) -> tuple[Tensor, Tensor]:
        """Take one position of the causal recursion, in O(1) state.

        Args:
            state: g and y of the position before, complex128 ``(B, H + H·P)``; None at the first.
            given: potentials and values ``(B, H + H·P)``.

        Returns:
            The new state, and the features ``(B, 2H + 2H·P)`` in the precision of ``given``.

        Raises:
            RuntimeError: the core is two-sided, and needs the future.
            TypeError: potentials and values are not real floating point.
            ValueError: shapes do not fit together.
        """
        if not self.causal:
            raise RuntimeError("a two-sided BK-Core cannot step: it needs the future")
        self._check_width(given)
        rows, t, eta = given[:, None], self.t.double(), self.eta.double()
        _check_rows(rows, eta, t, "auto")
        if state is None:
            state = given.new_zeros(given.shape, dtype=torch.complex128)
        if state.shape != given.shape:
            raise ValueError(
                f"state {tuple(state.shape)} of given {tuple(given.shape)}: must be alike"
            )
        v, b = _split(rows.double(), self.n_heads)
        before_g, before_y = _split(state[:, None], self.n_heads)
        g = 1 / (torch.complex(v - 2 * t, (-eta).expand_as(v)) - t**2 * before_g)
        y = g[..., None] * (b - t[:, None] * before_y)
        features = _features(g, y).squeeze(1).to(given.dtype)
        return torch.cat([g, y.flatten(2)], dim=-1).squeeze(1), features

    def _check_width(self, given: Tensor) -> None:
        width = self.n_heads * (1 + self.n_values)
        if given.shape[-1] != width:
            raise ValueError(
                f"given {tuple(given.shape)}: its last dimension must be H + H·P = {width}, with"
                f" n_heads={self.n_heads} and n_values={self.n_values}"
            )
