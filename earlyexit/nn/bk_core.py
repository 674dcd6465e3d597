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

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.checked import whole
from earlyexit.nn import bk_loops, bk_scans
from earlyexit.nn.bk_scans import after, before, complex_parts, join_features, split_rows

FLOOR = 1e-6  # of the widths η; it keeps |g| ≤ 1/η far from overflow


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, given, eta, t, backend):
        t64 = t.double()
        run = bk_loops.forward if backend == "cpu" else bk_scans.forward
        features = run(given, eta.double(), t64)
        ctx.save_for_backward(features, t64)
        ctx.backend, ctx.dtypes = backend, (given.dtype, eta.dtype, t.dtype)
        return features

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        features, t = ctx.saved_tensors
        run = bk_loops.backward if ctx.backend == "cpu" else bk_scans.backward
        grads = run(features, grad, t)
        return *(d.to(k) for d, k in zip(grads, ctx.dtypes, strict=True)), None


def _two_sided(given: Tensor, eta: Tensor, t: Tensor, backend: str) -> Tensor:
    """Return the features of the whole inverse, from both causal solves of ``given``, in float64."""
    heads, t64 = len(t), t.double()
    left_g, left_y = complex_parts(_Causal.apply(given, eta, t, backend), heads)
    right = _Causal.apply(given.flip(1), eta, t, backend).flip(1)
    right_g, right_y = complex_parts(right, heads)
    g = left_g / (1 - t64**2 * left_g * after(right_g))
    _, b = split_rows(given, heads)
    y = g[..., None] * (b - t64[:, None] * (before(left_y) + after(right_y)))
    return join_features(g, y)


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
    g, _ = complex_parts(features, len(eta))
    return g, features[..., 2 * len(eta) :].unflatten(-1, (2, *b.shape[2:])).to(b.dtype)


def _check(eta: Tensor, t: Tensor, backend: str, **inputs: Tensor) -> str:
    """Return the backend to use, or raise: compiled loops trust all that they are given."""
    first, device = next(iter(inputs)), None
    for name, tensor in (inputs | {"eta": eta, "t": t}).items():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} is {kind}: convert it to a real floating-point tensor")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} is {tensor.layout}: give a dense tensor, {name}.to_dense()")
        device = device or tensor.device
        if tensor.device != device:
            raise ValueError(f"{first} is on {device}, {name} on {tensor.device}: move one of them")
    if eta.dim() != 1 or len(eta) == 0 or eta.shape != t.shape:
        raise ValueError(
            f"eta {tuple(eta.shape)} and t {tuple(t.shape)}: both must be (H,), one for each head"
        )
    if backend == "auto":  # torch.compile traces torch, and would trace the compiler of the loops
        return "cpu" if device.type == "cpu" and not torch.compiler.is_compiling() else "torch"
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

    Raises:
        TypeError: a number is not whole.
        ValueError: there is no head, or not one width in [0, 700) for each.
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
        self.n_heads, self.causal = whole("n_heads", n_heads, 1), causal
        self.n_values = whole("n_values", n_values)
        widths = torch.logspace(-1.3, -0.3, n_heads) if widths is None else torch.as_tensor(widths)
        possible = (widths >= 0) & (widths < 700)  # e^710 is infinite
        if widths.shape != (n_heads,) or not (widths.is_meta or possible.all()):
            raise ValueError(
                f"widths={widths.tolist()}: give one η in [0, 700) for each of {n_heads} heads"
            )
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
        v, b = split_rows(rows.double(), self.n_heads)
        before_g, before_y = split_rows(state[:, None], self.n_heads)
        g = 1 / (torch.complex(v - 2 * t, (-eta).expand_as(v)) - t**2 * before_g)
        y = g[..., None] * (b - t[:, None] * before_y)
        features = join_features(g, y).squeeze(1).to(given.dtype)
        return torch.cat([g, y.flatten(2)], dim=-1).squeeze(1), features

    def _check_width(self, given: Tensor) -> None:
        width = self.n_heads * (1 + self.n_values)
        shape = tuple(getattr(given, "shape", ()))
        if shape[-1:] != (width,):
            raise ValueError(
                f"given {shape}: its last dimension must be H + H·P = {width}, with"
                f" n_heads={self.n_heads} and n_values={self.n_values}"
            )
