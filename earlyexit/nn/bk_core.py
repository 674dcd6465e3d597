"""BK-Core applies the resolvent of a tridiagonal Hamiltonian to values, in O(N).

One head is a particle on a line of N sites. With coupling t, width η and a learned potential v_i,

    H = t · tridiag(1, −2, 1) + diag(v),        z = iη,        α_i = v_i − 2t − iη.

**Causal** (default). The last diagonal entry of (H[0..i] − zI)⁻¹ is the left-connected Green's
function, a continued fraction that sees no site after i (the recursive Green's function method,
Thouless & Kirkpatrick 1981; Economou, *Green's Functions in Quantum Physics*, ch. 5):

    g_i = 1 / (α_i − t² g_{i−1}),               g_{−1} = 0.

**Two-sided**. With the right-connected g'_i (the same recursion from the other end),
[(H − zI)⁻¹]_ii = 1 / (1/g_i − t² g'_{i+1}): it depends on every v_j, the future included.

Because Im α < 0, Im g stays positive and |g| ≤ 1/η: the ratio form neither overflows nor vanishes,
whatever N. It is computed in double precision and returned in the precision of v.

**On values**. The diagonal carries two numbers per head and no content. The resolvent itself carries
content: of real values b_i, the last component of (H[0..i] − zI)⁻¹ b[0..i] is, by forward elimination,

    y_i = g_i (b_i − t y_{i−1}),                y_{−1} = 0,                |y_i| ≤ ‖b‖/η.

The lower half of this inverse is semiseparable, so y is a state-space model whose complex decay −t g_i
depends on the token (compare Dao & Gu 2024, arXiv:2405.21060). Its state is (g, y).

**Gradient**, exact. dg_i = −g_i² (dα_i − t² dg_{i−1} − g_{i−1} dt²), so with γ_i = ∂L/∂g_i the
adjoint obeys the linear recursion λ_i = γ_i + t² g_{i+1}² λ_{i+1}, and
dL = Re Σ_i −λ_i g_i² (dv_i − i dη − (2 + 2t g_{i−1}) dt). For values, with γ_i = ∂L/∂y_i,
λ_i = γ_i − t g_{i+1} λ_{i+1} and dL = Re Σ_i λ_i ((b_i − t y_{i−1}) dg_i + g_i db_i − g_i y_{i−1} dt).

Two backends give the same numbers: compiled loops on the CPU (numba), and in torch, on any device,
log-depth scans of 2×2 Möbius maps (g) and of affine maps (values and gradients).
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Rounding may differ, but NaN and infinity stay what they are.
FAST = {"contract", "arcp", "nsz", "reassoc"}


@numba.njit(cache=True, fastmath=FAST, error_model="numpy", nogil=True)
def _forward_loop(v, eta, t, out):
    B, N, H = v.shape
    re, im = np.zeros(H), np.zeros(H)
    for b in range(B):
        re[:] = 0.0
        im[:] = 0.0
        for i in range(N):
            for h in range(H):
                t2 = t[h] * t[h]
                x = v[b, i, h] - 2.0 * t[h] - t2 * re[h]
                y = -eta[h] - t2 * im[h]
                s = 1.0 / (x * x + y * y)
                re[h] = x * s
                im[h] = -y * s
                out[b, i, 0, h] = re[h]
                out[b, i, 1, h] = im[h]


@numba.njit(cache=True, fastmath=FAST, error_model="numpy", nogil=True)
def _backward_loop(g, grad, t, dv, deta, dt):
    # grad holds ∂L/∂Re g and ∂L/∂Im g, that is γ = ∂L/∂Re g − i ∂L/∂Im g with dL = Re(γ dg).
    B, N, H, _ = g.shape
    re, im = np.zeros(H), np.zeros(H)
    for b in range(B):
        re[:] = 0.0
        im[:] = 0.0
        for i in range(N - 1, -1, -1):
            for h in range(H):
                x = re[h] + grad[b, i, h, 0]  # λ_i
                y = im[h] - grad[b, i, h, 1]
                gr, gi = g[b, i, h, 0], g[b, i, h, 1]
                sr, si = gr * gr - gi * gi, 2.0 * gr * gi  # g²
                pr, pi = sr * x - si * y, sr * y + si * x  # λ g²
                left_r, left_i = 0.0, 0.0
                if i > 0:
                    left_r, left_i = g[b, i - 1, h, 0], g[b, i - 1, h, 1]
                dv[b, i, h] = -pr
                deta[h] -= pi
                dt[h] += 2.0 * pr + 2.0 * t[h] * (pr * left_r - pi * left_i)
                t2 = t[h] * t[h]
                re[h] = t2 * pr
                im[h] = t2 * pi


@numba.njit(cache=True, fastmath=FAST, error_model="numpy", nogil=True)
def _values_loop(g, b, t, out):
    B, N, H, P = b.shape
    re, im = np.zeros((H, P)), np.zeros((H, P))
    for i in range(B):
        re[:] = 0.0
        im[:] = 0.0
        for n in range(N):
            for h in range(H):
                gr, gi = g[i, n, 0, h], g[i, n, 1, h]
                for p in range(P):
                    x = b[i, n, h, p] - t[h] * re[h, p]
                    y = -t[h] * im[h, p]
                    re[h, p] = gr * x - gi * y
                    im[h, p] = gr * y + gi * x
                    out[i, n, 0, h, p] = re[h, p]
                    out[i, n, 1, h, p] = im[h, p]


@numba.njit(cache=True, fastmath=FAST, error_model="numpy", nogil=True)
def _values_backward_loop(g, b, t, y, grad, dg, db, dt):
    # λ = lr + i li; dg holds ∂L/∂Re g and ∂L/∂Im g, of Re(γ dg) with γ = ∂L/∂Re g − i ∂L/∂Im g.
    B, N, H, P = b.shape
    carry_r, carry_i = np.zeros((H, P)), np.zeros((H, P))
    zero = np.zeros((2, H, P), y.dtype)
    for i in range(B):
        carry_r[:] = 0.0
        carry_i[:] = 0.0
        for n in range(N - 1, -1, -1):
            before = y[i, n - 1] if n > 0 else zero
            for h in range(H):
                gr, gi, th = g[i, n, 0, h], g[i, n, 1, h], t[h]
                sum_r, sum_i, sum_t = 0.0, 0.0, 0.0
                for p in range(P):
                    lr = carry_r[h, p] + grad[i, n, 0, h, p]
                    li = carry_i[h, p] - grad[i, n, 1, h, p]
                    pr, pi = lr * gr - li * gi, lr * gi + li * gr  # λ g
                    yr, yi = before[0, h, p], before[1, h, p]
                    x, z = b[i, n, h, p] - th * yr, -th * yi
                    sum_r += lr * x - li * z
                    sum_i += lr * z + li * x
                    sum_t -= pr * yr - pi * yi
                    db[i, n, h, p] = pr
                    carry_r[h, p], carry_i[h, p] = -th * pr, -th * pi
                dg[i, n, 0, h], dg[i, n, 1, h] = sum_r, -sum_i
                dt[h] += sum_t


def _forward_cpu(v: Tensor, eta: Tensor, t: Tensor) -> Tensor:
    return torch.complex(*_parts_cpu(v, eta, t, torch.float64).unbind(2))


def _parts_cpu(v: Tensor, eta: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Re g and Im g ``(B, N, 2, H)``, rounded to ``dtype`` as they are written."""
    v = v if v.dtype in (torch.float32, torch.float64) else v.float()  # half precisions
    batch, length, heads = v.shape
    out = torch.empty(batch, length, 2, heads, dtype=dtype)
    _forward_loop(v.contiguous().numpy(), eta.numpy(), t.numpy(), out.numpy())
    return out


def _backward_cpu(g: Tensor, gamma: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dv = torch.empty(g.shape, dtype=torch.float64)
    deta, dt = torch.zeros_like(t), torch.zeros_like(t)
    grad = torch.view_as_real(gamma.resolve_conj().contiguous())
    _backward_loop(
        torch.view_as_real(g).numpy(), grad.numpy(), t.numpy(), dv.numpy(), deta.numpy(), dt.numpy()
    )
    return dv, deta, dt


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


def _forward_torch(v: Tensor, eta: Tensor, t: Tensor) -> Tensor:
    alpha = torch.complex(v.double() - 2 * t, (-eta).expand_as(v))
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    # g_i = (0 · g + 1) / (−t² g + α_i): the prefix product applied to g_{−1} = 0 is b/d.
    _, b, _, d = _scan(_mobius_product, (zero, one, -(t**2) * one, alpha))
    return b / d


def _backward_torch(g: Tensor, gamma: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gain = (t**2 * g**2).flip(1).roll(1, dims=1)  # t² g_{i+1}², in reversed order
    gain[:, 0] = 0
    _, adjoint = _scan(_affine_product, (gain, gamma.conj().flip(1)))
    p = adjoint.flip(1) * g**2  # λ g²
    left = F.pad(g, (0, 0, 1, 0))[:, :-1]
    dt = (p * (2 + 2 * t * left)).real.sum((0, 1))
    return -p.real, -p.imag.sum((0, 1)), dt


class _CausalResolvent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, eta, t, backend):
        eta64, t64 = eta.double(), t.double()
        g = (_forward_cpu if backend == "cpu" else _forward_torch)(v, eta64, t64)
        ctx.save_for_backward(g, t64)
        ctx.backend, ctx.dtypes = backend, (v.dtype, eta.dtype, t.dtype)
        return g

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gamma):
        g, t = ctx.saved_tensors
        grads = (_backward_cpu if ctx.backend == "cpu" else _backward_torch)(g, gamma, t)
        return *(d.to(k) for d, k in zip(grads, ctx.dtypes, strict=True)), None


def causal_resolvent(v: Tensor, eta: Tensor, t: Tensor, backend: str = "auto") -> Tensor:
    """Return the left-connected Green's function g_i of every head, complex128 ``(B, N, H)``.

    Args:
        v: potentials ``(B, N, H)``, real.
        eta: widths ``(H,)``, > 0.
        t: couplings ``(H,)``.
        backend: ``"cpu"`` (compiled loops), ``"torch"`` (log-depth scan), or ``"auto"`` by device.
    """
    if backend == "auto":
        backend = "cpu" if v.device.type == "cpu" else "torch"
    return _CausalResolvent.apply(v, eta, t, backend)


def two_sided_resolvent(v: Tensor, eta: Tensor, t: Tensor, backend: str = "auto") -> Tensor:
    """Return the diagonal of (H − iη)⁻¹, complex128 ``(B, N, H)``, which depends on the future."""
    left = causal_resolvent(v, eta, t, backend)
    right = causal_resolvent(v.flip(1), eta, t, backend).flip(1)
    after = F.pad(right, (0, 0, 0, 1))[:, 1:]
    return left / (1 - t.double() ** 2 * left * after)


class _CausalValues(torch.autograd.Function):
    """Maps g ``(B, N, H)``, b ``(B, N, H, P)`` and t ``(H,)`` to Re y and Im y ``(B, N, 2, H, P)``."""

    @staticmethod
    def forward(ctx, g, b, t, backend):
        y = (_values_cpu if backend == "cpu" else _values_torch)(g, b, t.double())
        ctx.save_for_backward(g, b, t, y)
        ctx.backend = backend
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        g, b, t, y = ctx.saved_tensors
        backward = _values_backward_cpu if ctx.backend == "cpu" else _values_backward_torch
        dg, db, dt = backward(g, b, t.double(), y, grad)
        return dg, db.to(b.dtype), dt.to(t.dtype), None


def _values_cpu(g: Tensor, b: Tensor, t: Tensor) -> Tensor:
    y = b.new_empty(*b.shape[:2], 2, *b.shape[2:])
    parts = torch.stack([g.real, g.imag], dim=2)
    _values_loop(parts.numpy(), b.contiguous().numpy(), t.numpy(), y.numpy())
    return y


def _values_backward_cpu(g, b, t, y, grad) -> tuple[Tensor, Tensor, Tensor]:
    parts = torch.stack([g.real, g.imag], dim=2)
    dg, db, dt = torch.empty_like(parts), torch.empty_like(b.contiguous()), torch.zeros_like(t)
    arrays = parts, b.contiguous(), t, y, grad.contiguous(), dg, db, dt
    _values_backward_loop(*(a.numpy() for a in arrays))
    return torch.complex(dg[:, :, 0], dg[:, :, 1]), db, dt


def _values_torch(g: Tensor, b: Tensor, t: Tensor) -> Tensor:
    g = g[..., None]
    _, y = _scan(_affine_product, (-t[:, None] * g, g * b))
    return torch.stack([y.real, y.imag], dim=2).to(b.dtype)


def _values_backward_torch(g, b, t, y, grad) -> tuple[Tensor, Tensor, Tensor]:
    g, t = g[..., None], t[:, None]
    before = F.pad(torch.complex(*y.double().unbind(2)), (0, 0, 0, 0, 1, 0))[:, :-1]
    gain = (-t * g).flip(1).roll(1, dims=1)  # −t g_{i+1}, in reversed order
    gain[:, 0] = 0
    gamma = torch.complex(*grad.double().unbind(2)).conj()
    _, adjoint = _scan(_affine_product, (gain, gamma.flip(1)))
    adjoint = adjoint.flip(1)
    dg = (adjoint * (b - t * before)).sum(-1).conj().resolve_conj()
    product = adjoint * g
    return dg, product.real, -(product * before).real.sum((0, 1, 3))


def _backend(backend: str, tensor: Tensor) -> str:
    """Return which backend to use for a tensor."""
    if backend == "auto":
        return "cpu" if tensor.device.type == "cpu" else "torch"
    return backend


def causal_action(
    v: Tensor, b: Tensor, eta: Tensor, t: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return g_i and the last component of (H[0..i] − iη)⁻¹ b[0..i], for every position i.

    Args:
        v, eta, t, backend: see :func:`causal_resolvent`.
        b: values of P channels per head ``(B, N, H, P)``, real.

    Returns:
        g, complex128 ``(B, N, H)``, and Re y, Im y ``(B, N, 2, H, P)`` in the precision of b.
    """
    g = causal_resolvent(v, eta, t, backend)
    return g, _CausalValues.apply(g, b, t, _backend(backend, v))


def two_sided_action(
    v: Tensor, b: Tensor, eta: Tensor, t: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return what :func:`causal_action` does for the whole (H − iη)⁻¹, which sees the future.

    With y the left and y' the right solve, its component i is G_ii (b_i − t y_{i−1} − t y'_{i+1}).
    """
    diagonal = two_sided_resolvent(v, eta, t, backend)
    _, left = causal_action(v, b, eta, t, backend)
    _, right = causal_action(v.flip(1), b.flip(1), eta, t, backend)
    left = F.pad(left, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
    right = F.pad(right.flip(1), (0, 0, 0, 0, 0, 0, 0, 1))[:, 1:]
    sides = torch.complex(*(left + right).double().unbind(2))
    y = diagonal[..., None] * (b - t.double()[:, None] * sides)
    return diagonal, torch.stack([y.real, y.imag], dim=2).to(b.dtype)


class BKCore(nn.Module):
    """BK-Core has H heads, each with a learned width η > 0 and coupling t, and P values per head.

    Heads start with widths spread over a decade, so that they remember over different lengths.

    Args:
        n_heads: number of potentials H per token.
        causal: the left-connected Green's function (default) or the two-sided resolvent.
        n_values: value channels P per head; 0 is the original's form, the diagonal alone.
    """

    def __init__(self, n_heads: int, causal: bool = True, *, n_values: int = 0):
        super().__init__()
        self.n_heads, self.causal, self.n_values = n_heads, causal, n_values
        widths = torch.logspace(math.log10(0.05), math.log10(0.5), n_heads)
        self.eta_raw = nn.Parameter(torch.log(torch.expm1(widths)))  # softplus keeps η positive
        self.t = nn.Parameter(torch.ones(n_heads))

    @property
    def eta(self) -> Tensor:
        """Return the widths ``(H,)``; their floor keeps |g| ≤ 1/η far from overflow."""
        return F.softplus(self.eta_raw) + 1e-3

    def forward(self, given: Tensor, backend: str = "auto") -> Tensor:
        """Return features of potentials and values.

        Args:
            given: potentials v and values b ``(B, N, H + H·P)``.

        Returns:
            Re g, Im g, Re y and Im y ``(B, N, 2H + 2H·P)``, in the precision of ``given``.
        """
        v, b = given[..., : self.n_heads], given[..., self.n_heads :]
        if not self.n_values:
            return self._diagonal(v, backend)
        b = b.unflatten(-1, (self.n_heads, self.n_values))
        action = causal_action if self.causal else two_sided_action
        g, y = action(v, b, self.eta, self.t, backend)
        return torch.cat([g.real.to(y.dtype), g.imag.to(y.dtype), y.flatten(2)], dim=-1)

    def _diagonal(self, v: Tensor, backend: str) -> Tensor:
        if self._may_skip_complex(v, backend):
            eta, t = self.eta.detach().double(), self.t.detach().double()
            return _parts_cpu(v.detach(), eta, t, v.dtype).flatten(2)
        resolvent = causal_resolvent if self.causal else two_sided_resolvent
        g = resolvent(v, self.eta, self.t, backend)
        return torch.cat([g.real, g.imag], dim=-1).to(v.dtype)

    def _may_skip_complex(self, v: Tensor, backend: str) -> bool:
        """Tell whether the compiled loop may write the features itself, as no gradient is needed."""
        compiled = backend == "cpu" or (backend == "auto" and v.device.type == "cpu")
        plain = v.dtype in (torch.float32, torch.float64)
        return compiled and plain and self.causal and not torch.is_grad_enabled()

    def step(self, state: Tensor | None, given: Tensor) -> tuple[Tensor, Tensor]:
        """Take one position of the causal recursion, in O(1) state.

        Args:
            state: g and y of the position before, complex128 ``(B, H + H·P)``; None at the first.
            given: potentials and values ``(B, H + H·P)``.

        Returns:
            The new state, and the features ``(B, 2H + 2H·P)``.

        Raises:
            RuntimeError: the core is two-sided, and needs the future.
        """
        if not self.causal:
            raise RuntimeError("a two-sided BK-Core cannot step: it needs the future")
        heads, t, eta = self.n_heads, self.t.double(), self.eta.double()
        if state is None:
            state = given.new_zeros(given.shape, dtype=torch.complex128)
        v, b = given.double().tensor_split([heads], dim=-1)
        before_g, before_y = state.tensor_split([heads], dim=-1)
        alpha = torch.complex(v - 2 * t, (-eta).expand_as(v))
        g = 1 / (alpha - t**2 * before_g)
        per_value = (g, t)
        if self.n_values:
            per_value = tuple(a.repeat_interleave(self.n_values, dim=-1) for a in (g, t))
            y = per_value[0] * (b - per_value[1] * before_y)
        else:
            y = before_y
        features = torch.cat([g.real, g.imag, y.real, y.imag], dim=-1)
        return torch.cat([g, y], dim=-1), features.to(given.dtype)
