"""BK-Core against dense solves, in double precision, of the matrix it never builds."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit.nn.bk_core import (
    FLOOR,
    BKCore,
    causal_action,
    causal_features,
    causal_resolvent,
    two_sided_action,
    two_sided_features,
    two_sided_resolvent,
)

BACKENDS = ("cpu", "torch")
RESOLVENTS = (causal_resolvent, two_sided_resolvent)
ACTIONS = (causal_action, two_sided_action)
FEATURES = (causal_features, two_sided_features)


def bands(v: np.ndarray, eta: float, t: float) -> np.ndarray:
    """H − iη of one head as LAPACK's three diagonals ``(3, N)``."""
    out = np.full((3, len(v)), t, complex)
    out[1] = v.astype(float) - 2 * t - 1j * eta
    return out


def dense(v: np.ndarray, eta: float, t: float) -> np.ndarray:
    """H − iη of one head ``(N, N)``."""
    _, diagonal, off = bands(v, eta, t)[:, : len(v)]
    return np.diag(diagonal) + np.diag(off[1:], 1) + np.diag(off[1:], -1)


def solve(v, b, eta, t) -> np.ndarray:
    """(H − iη)⁻¹ b of one head, by LAPACK's pivoted banded solver, ``(N,)`` or ``(N, P)``."""
    return scipy.linalg.solve_banded((1, 1), bands(v, eta, t), b.astype(complex))


def last_entry(v: np.ndarray, eta: float, t: float) -> complex:
    """Last diagonal entry of (H − iη)⁻¹."""
    return solve(v, np.eye(len(v))[-1], eta, t)[-1]


def one_head(resolvent, v, eta, t, backend) -> np.ndarray:
    """``(N,)`` from float32 inputs."""
    args = [torch.tensor(np.reshape(a, s), dtype=torch.float32) for a, s in
            ((v, (1, -1, 1)), (eta, (1,)), (t, (1,)))]  # fmt: skip
    return resolvent(*args, backend).numpy().ravel()


def one_head_values(features, v, b, eta, t, backend) -> np.ndarray:
    """y ``(N, P)`` from float32 inputs, rounded to float32."""
    rows = torch.from_numpy(np.column_stack([v, b]).astype(np.float32))[None]
    out = features(rows, *(torch.tensor([a], dtype=torch.float32) for a in (eta, t)), backend)
    assert out.dtype == torch.float32
    re, im = out[0, :, 2:].double().numpy().reshape(len(v), 2, -1).transpose(1, 0, 2)
    return re + 1j * im


def relative_error(found, truth) -> float:
    return np.max(np.abs(found - truth) / np.abs(truth))


def assert_close(found, truth) -> None:
    """|Δy| ≤ 1e-5 ‖y‖, with the largest |y| as the norm."""
    assert np.abs(found - truth).max() <= 1e-5 * np.abs(truth).max()


float32 = {"width": 32, "allow_nan": False, "allow_subnormal": False}
potentials = st.lists(st.floats(-10, 10, **float32), min_size=1, max_size=40)
sites = st.tuples(st.floats(-10, 10, **float32), st.floats(-3, 3, **float32))
values = st.lists(sites, min_size=1, max_size=40)  # and potentials
widths = st.floats(np.float32(0.01), 2, **float32)
couplings = st.floats(-1, 1, **float32)


# ---------------------------------------------------------------------- the diagonal


@settings(max_examples=60, deadline=None)
@given(potentials, widths, couplings)
def test_small_systems_equal_the_dense_inverse(v, eta, t):
    v = np.array(v, np.float32)
    two_sided = np.diag(np.linalg.inv(dense(v, eta, t)))
    causal = [np.linalg.inv(dense(v[: i + 1], eta, t))[-1, -1] for i in range(len(v))]
    for backend in BACKENDS:
        assert relative_error(one_head(causal_resolvent, v, eta, t, backend), causal) < 1e-5
        assert relative_error(one_head(two_sided_resolvent, v, eta, t, backend), two_sided) < 1e-5


def test_a_long_random_system_equals_the_dense_inverse():
    rng, n, eta, t = np.random.default_rng(0), 2048, np.float32(0.01), np.float32(1)
    v = rng.uniform(-10, 10, n).astype(np.float32)
    sites = [0, 1, 700, 1500, n - 1]
    columns = np.zeros((n, len(sites)), complex)
    columns[sites, range(len(sites))] = 1
    inverse = np.linalg.solve(dense(v, eta, t), columns)
    for backend in BACKENDS:
        two_sided = one_head(two_sided_resolvent, v, eta, t, backend)[sites]
        causal = one_head(causal_resolvent, v, eta, t, backend)
        assert relative_error(two_sided, inverse[sites, range(len(sites))]) < 1e-5
        assert relative_error(causal[-1], inverse[-1, -1]) < 1e-5  # nothing is after the last site
        truth = [last_entry(v[: i + 1], eta, t) for i in sites]
        assert relative_error(causal[sites], truth) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", [0.0, -3.0, 2.0, 4.0, 10.0])
@pytest.mark.parametrize("eta", [0.01, 1.0])
def test_regimes_in_which_products_overflow(level, eta, backend):
    n, eta = 2048, np.float32(eta)
    v = np.full(n, level, np.float32)
    g = one_head(causal_resolvent, v, eta, 1.0, backend)
    b = np.random.default_rng(1).standard_normal((n, 1)).astype(np.float32)
    y = one_head_values(causal_features, v, b, eta, 1.0, backend)
    sites = [0, 1, 2, 50, 1000, n - 1]
    assert relative_error(g[sites], [last_entry(v[: i + 1], eta, 1.0) for i in sites]) < 1e-5
    assert np.all(np.abs(g) <= 1 / float(eta) * (1 + 1e-12))  # the bound of any resolvent
    assert_close(y[sites], [solve(v[: i + 1], b[: i + 1], eta, 1.0)[-1] for i in sites])


def test_the_product_form_does_overflow_there():
    alpha, before, now = -3.0 - 2 - 0.01j, 1.0, -3.0 - 2 - 0.01j
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(2047):
            before, now = now, np.complex128(alpha * now - before)
    assert not np.isfinite(now)


# ---------------------------------------------------------------------- the action on values


@settings(max_examples=60, deadline=None)
@given(values, widths, couplings)
def test_values_of_small_systems_equal_the_dense_solve_of_every_leading_block(rows, eta, t):
    v, b = np.array(rows, np.float32).T
    leading = range(1, len(v) + 1)
    causal = [np.linalg.solve(dense(v[:i], eta, t), b[:i])[-1:] for i in leading]
    two_sided = np.linalg.solve(dense(v, eta, t), b)[:, None]
    for backend in BACKENDS:
        found = one_head_values(causal_features, v, b, eta, t, backend)
        assert_close(found, np.array(causal))
        assert_close(one_head_values(two_sided_features, v, b, eta, t, backend), two_sided)
        norms = np.sqrt(np.cumsum(b.astype(float) ** 2))
        assert np.all(np.abs(found[:, 0]) <= norms / eta * (1 + 1e-6))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", [0.1, 1.0, 10.0])
def test_values_of_a_long_random_system_equal_the_dense_solve(level, backend):
    rng, n, eta, t = np.random.default_rng(0), 2048, np.float32(0.01), np.float32(1)
    v = (2 + rng.uniform(-level, level, n)).clip(-10, 10).astype(np.float32)  # in the band and out
    b = rng.standard_normal((n, 2)).astype(np.float32)
    sites = [0, 1, 60, 700, 1500, n - 1]
    causal = one_head_values(causal_features, v, b, eta, t, backend)
    assert_close(causal[sites], [solve(v[: i + 1], b[: i + 1], eta, t)[-1] for i in sites])
    two_sided = one_head_values(two_sided_features, v, b, eta, t, backend)
    assert_close(two_sided, solve(v, b, eta, t))


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sequences_stay_finite_and_below_the_bound(backend):
    core, n = BKCore(2, n_values=1), 65_536
    rows = torch.cat([2 + torch.randn(1, n, 2), torch.ones(1, n, 2)], dim=-1)
    with torch.no_grad():
        out = core(rows, backend)
        assert out.isfinite().all()
        size = torch.hypot(out[0, :, 4:6], out[0, :, 6:])
        assert (size <= torch.arange(1.0, n + 1).sqrt()[:, None] / core.eta).all()


def test_the_bound_is_reached_by_one_site_at_resonance():
    v, b = np.array([2.0]), np.array([3.0])
    y = one_head_values(causal_features, v, b, 0.01, 1.0, "cpu")
    assert np.abs(y).item() == pytest.approx(3.0 / 0.01)


# ---------------------------------------------------------------------- gradients


def batch(seed: int = 0, n: int = 33, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    """v ``(2, n, 3)``, η ``(3,)``, t ``(3,)``, all requiring gradients."""
    generator = torch.Generator().manual_seed(seed)
    v = 3 * torch.randn(2, n, 3, generator=generator, dtype=torch.float64)
    eta, t = torch.tensor([0.02, 0.3, 1.0]), torch.tensor([1.0, -0.5, 0.0])
    return tuple(a.to(dtype).requires_grad_() for a in (v, eta, t))


def batch_with_values(seed: int = 0, n: int = 33, dtype=torch.float64, values: int = 2):
    """v ``(2, n, 3)``, b ``(2, n, 3, P)``, η ``(3,)``, t ``(3,)``, all requiring gradients."""
    v, eta, t = batch(seed, n, dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    b = torch.randn(2, n, 3, values, generator=generator, dtype=torch.float64)
    return v, b.to(dtype).requires_grad_(), eta, t


@pytest.mark.parametrize("n", [1, 2, 7, 64, 100])
def test_backends_agree(n):
    for resolvent in RESOLVENTS:
        args = batch(n=n)
        torch.testing.assert_close(
            resolvent(*args, "cpu"), resolvent(*args, "torch"), rtol=1e-10, atol=1e-12
        )
    for action in ACTIONS:
        args = batch_with_values(n=n)
        for a, b in zip(action(*args, "cpu"), action(*args, "torch"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def slow_causal(v, eta, t):
    """The recursion of the module's first formula, one position at a time."""
    alpha, g, out = torch.complex(v - 2 * t, (-eta).expand_as(v)), torch.zeros(()), []
    for i in range(v.shape[1]):
        g = 1 / (alpha[:, i] - t**2 * g)
        out.append(g)
    return torch.stack(out, dim=1)


def slow_two_sided(v, eta, t):
    left, right = slow_causal(v, eta, t), slow_causal(v.flip(1), eta, t).flip(1)
    after = torch.cat([right[:, 1:], torch.zeros_like(right[:, :1])], dim=1)
    return 1 / (1 / left - t**2 * after)


def slow_causal_values(v, b, eta, t):
    """Forward elimination, one position at a time: g and Re y, Im y."""
    g, y, out = slow_causal(v, eta, t), torch.zeros(()), []
    for i in range(v.shape[1]):
        y = g[:, i, :, None] * (b[:, i] - t[:, None] * y)
        out.append(torch.stack([y.real, y.imag], dim=1))
    return g, torch.stack(out, dim=1)


def slow_two_sided_values(v, b, eta, t):
    """The inverse of the whole matrix, built: its diagonal and its product with b."""
    n = v.shape[1]
    next_to = torch.diag(torch.ones(n - 1), 1) + torch.diag(torch.ones(n - 1), -1)
    alpha = torch.complex(v - 2 * t, (-eta).expand_as(v)).transpose(1, 2)  # (B, H, N)
    inverse = (torch.diag_embed(alpha) + t[:, None, None] * next_to).inverse()
    y = (inverse @ b.transpose(1, 2).to(inverse.dtype)).transpose(1, 2)
    return inverse.diagonal(dim1=-2, dim2=-1).transpose(1, 2), torch.stack([y.real, y.imag], dim=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "fast, slow", [(causal_resolvent, slow_causal), (two_sided_resolvent, slow_two_sided)]
)
@pytest.mark.parametrize("n", [1, 50, 700])
def test_gradients_of_float32_equal_those_of_the_slow_recursion(fast, slow, backend, n):
    args = batch(1, n, torch.float32)
    exact = tuple(a.detach().double().requires_grad_() for a in args)
    weight = torch.randn(2, n, 3, dtype=torch.complex128, generator=torch.manual_seed(0))
    found = torch.autograd.grad((weight * fast(*args, backend)).real.sum(), args)
    truth = torch.autograd.grad((weight * slow(*exact)).real.sum(), exact)
    for a, b in zip(found, truth, strict=True):
        assert (a.double() - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "fast, slow",
    [(causal_features, slow_causal_values), (two_sided_features, slow_two_sided_values)],
)
@pytest.mark.parametrize("n", [1, 50, 300])
def test_gradients_of_float32_values_equal_those_of_the_slow_recursion(fast, slow, backend, n):
    v, b, eta, t = args = batch_with_values(1, n, torch.float32)
    exact = tuple(a.detach().double().requires_grad_() for a in args)
    weight = torch.randn(2, n, 18, generator=torch.manual_seed(0), dtype=torch.float64)
    out = fast(torch.cat([v, b.flatten(2)], dim=-1), eta, t, backend)
    assert out.dtype == torch.float32
    found = torch.autograd.grad((weight * out).sum(), args)
    g, y = slow(*exact)
    wanted = torch.cat([g.real, g.imag, y.flatten(2)], dim=-1)
    truth = torch.autograd.grad((weight * wanted).sum(), exact)
    assert (out.double() - wanted).norm() <= 1e-6 * wanted.norm()
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", [0.0, -3.0, 2.0])
def test_gradients_where_products_overflow(level, backend):
    n, generator = 2048, torch.manual_seed(0)
    exact = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in ([0.01], [1.0])]
    v = torch.full((1, n, 1), level, dtype=torch.float64, requires_grad=True)
    b = torch.randn(1, n, 1, 1, dtype=torch.float64, generator=generator).requires_grad_()
    args = (v, b, *exact)
    weight_g = torch.randn(1, n, 1, dtype=torch.complex128, generator=generator)
    weight_y = torch.randn(1, n, 2, 1, 1, dtype=torch.float64, generator=generator)

    def gradients(g, y):
        return torch.autograd.grad((weight_g * g).real.sum() + (weight_y * y).sum(), args)

    truth = gradients(*slow_causal_values(*args))
    for a, b in zip(gradients(*causal_action(*args, backend)), truth, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    for resolvent in RESOLVENTS:
        assert torch.autograd.gradcheck(lambda *a, f=resolvent: f(*a, backend), batch(2, 6))
    for action in ACTIONS:
        args = batch_with_values(2, 6)
        assert torch.autograd.gradcheck(lambda *a, f=action: f(*a, backend), args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_causal_form_never_sees_the_future_and_the_two_sided_form_does(backend):
    v, b, eta, t = (a.detach() for a in batch_with_values(3, 9))
    rows = torch.cat([v, b.flatten(2)], dim=-1)
    for features, leaks in zip(FEATURES, (False, True), strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda rows, f=features: f(rows, eta, t, backend)[0], rows
        )[:, :, 0]  # (N outputs, 18, N inputs, 9): heads of t = 1, −0.5 and 0
        future = torch.stack([jacobian[i, :, i + 1 :].abs().sum() for i in range(8)])
        assert bool((future > 0).all()) if leaks else bool((future == 0).all())
        now = torch.stack([jacobian[i, :, i] for i in range(9)])
        assert (now[:, :3].diagonal(dim1=1, dim2=2)[..., :3] != 0).all()  # Re g by v
        past = torch.stack([jacobian[i, 6:18, :i, 3:].abs().sum() for i in range(1, 9)])
        assert (past > 0).all()  # y by b


# ---------------------------------------------------------------------- the module


@pytest.mark.parametrize("causal", [True, False])
def test_without_values_the_core_gives_the_diagonal_of_the_original(causal):
    core, v = BKCore(5, causal=causal), torch.randn(2, 7, 5)
    g = (causal_resolvent if causal else two_sided_resolvent)(v, core.eta, core.t)
    torch.testing.assert_close(core(v), torch.cat([g.real, g.imag], -1).float())
    assert core(v).dtype == torch.float32
    assert (core.eta > 0).all()
    core(v).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in core.parameters())


@pytest.mark.parametrize("causal", [True, False])
def test_with_values_the_core_gives_the_diagonal_and_the_action(causal):
    core, v, b = BKCore(5, causal, n_values=3), torch.randn(2, 7, 5), torch.randn(2, 7, 5, 3)
    g, y = (causal_action if causal else two_sided_action)(v, b, core.eta, core.t)
    assert g.shape == (2, 7, 5) and y.shape == (2, 7, 2, 5, 3)
    found = core(torch.cat([v, b.flatten(2)], dim=-1))
    torch.testing.assert_close(found, torch.cat([g.real, g.imag, y.flatten(2)], -1).float())
    found.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in core.parameters())


@torch.no_grad()
def test_heads_start_with_the_widths_they_are_given_and_by_default_over_a_decade():
    widths = torch.tensor([3e-5, 1e-3, 0.3, 20.0])
    torch.testing.assert_close(BKCore(4, widths=widths).eta, widths, rtol=1e-5, atol=0)
    default = BKCore(4).eta
    assert (default.diff() > 0).all() and default[-1] / default[0] == pytest.approx(10, rel=1e-4)


@torch.no_grad()
def test_no_width_falls_below_its_floor_and_nothing_overflows_there():
    core = BKCore(4, n_values=1, widths=torch.tensor([0.0, FLOOR, 1.0, 1.0]))
    assert (core.eta >= FLOOR).all() and core.eta[0] <= 3 * FLOOR
    core.eta_raw.fill_(-200)
    assert torch.equal(core.eta, torch.full((4,), FLOOR))
    band = torch.full((1, 512, 4), 2.0)  # where one site is at resonance
    out = core(torch.cat([band, torch.randn(1, 512, 4)], dim=-1))
    assert out.isfinite().all() and (out[..., :8].abs() <= 1 / FLOOR).all()


@pytest.mark.parametrize("values", [0, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_returned_as_it_came(dtype, values):
    core = BKCore(3, n_values=values)
    given = torch.randn(2, 7, 3 + 3 * values).to(dtype).requires_grad_()
    out = core(given)
    assert out.dtype == dtype
    torch.testing.assert_close(out, core(given.float()).to(dtype))
    out.sum().backward()
    assert given.grad.dtype == dtype and given.grad.isfinite().all()


@pytest.mark.parametrize("values", [0, 2])
def test_stepping_equals_the_scan(values):
    width = 5 + 5 * values
    core, given = BKCore(5, n_values=values).double(), torch.randn(3, 20, width).double()
    state, features = None, []
    for i in range(20):
        state, feature = core.step(state, given[:, i])
        assert state.shape == (3, width)  # and that is all it remembers
        features.append(feature)
    torch.testing.assert_close(torch.stack(features, 1), core(given), rtol=1e-12, atol=1e-12)


def test_a_two_sided_core_cannot_step():
    with pytest.raises(RuntimeError, match="future"):
        BKCore(2, causal=False).step(None, torch.zeros(1, 2))


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 9), (2, 0, 9), (2, 0, 3)])
def test_nothing_gives_nothing(features, backend, shape):
    given = torch.zeros(shape, requires_grad=True)
    eta, t = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    out = features(given, eta, t, backend)
    assert out.shape == (*shape[:2], 2 * shape[2])
    out.sum().backward()
    assert given.grad.shape == shape and not eta.grad.any() and not t.grad.any()


def test_views_of_other_tensors_are_read_as_they_are():
    core, store = BKCore(3, n_values=2), torch.randn(9, 20, 4).double()
    view = store.permute(2, 1, 0)[:, ::2].requires_grad_()
    copy = view.detach().clone().requires_grad_()
    weight = torch.randn(1, 1, 18).double().expand(4, 10, 18)  # and gradients that are views
    for rows in (view, copy):
        core(rows).mul(weight).sum().backward()
    torch.testing.assert_close(core(view), core(copy), rtol=0, atol=0)
    torch.testing.assert_close(view.grad, copy.grad, rtol=0, atol=0)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(1, 4, 6), (1, 4, 3), (1, 4, 0), (4, 12), (1, 1, 4, 12)])
def test_a_core_refuses_rows_of_another_width(shape, causal):
    core = BKCore(4, causal, n_values=2)
    with pytest.raises(ValueError, match=rf"given \({', '.join(map(str, shape))}\)"):
        core(torch.zeros(shape, requires_grad=True))


def test_a_core_without_values_refuses_values_and_too_many_potentials():
    for width in (6, 8, 200_000):
        with pytest.raises(ValueError, match=r"must be H \+ H·P = 4"):
            BKCore(4)(torch.zeros(1, 4, width, requires_grad=True))


@pytest.mark.parametrize("wrong", [torch.int64, torch.int32, torch.bool, torch.complex64])
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("action", ACTIONS)
def test_whatever_is_not_real_floating_point_is_refused(action, which, wrong):
    args = [torch.ones(1, 4, 2), torch.ones(1, 4, 2, 3), torch.ones(2), torch.ones(2)]
    args[which] = args[which].to(wrong)
    with pytest.raises(TypeError, match=f"^{('v', 'b', 'eta', 't')[which]} is {wrong}.*convert"):
        action(*args)
    if which < 2:
        with pytest.raises(TypeError, match=f"{wrong}.*convert"):
            BKCore(2)(torch.ones(1, 4, 2).to(wrong))
        with pytest.raises(TypeError, match=f"{wrong}.*convert"):
            BKCore(2).step(None, torch.ones(4, 2).to(wrong))


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 4, 3), (1, 4, 2, 3), (2,), (2,)),
        ((1, 4, 2), (1, 4, 3, 3), (2,), (2,)),
        ((1, 4, 2), (1, 5, 2, 3), (2,), (2,)),
        ((1, 4, 2), (2, 4, 2, 3), (2,), (2,)),
        ((1, 4, 2), (1, 4, 6), (2,), (2,)),
        ((4, 2), (4, 2, 3), (2,), (2,)),
        ((1, 4, 2), (1, 4, 2, 3), (1,), (2,)),
        ((1, 4, 2), (1, 4, 2, 3), (2,), (3,)),
        ((1, 4, 2), (1, 4, 2, 3), (2,), ()),
        ((1, 4, 2), (1, 4, 2, 3), (2, 1), (2, 1)),
        ((1, 4, 0), (1, 4, 0, 3), (0,), (0,)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(action, shapes):
    with pytest.raises(ValueError, match="must be"):
        action(*(torch.ones(shape) for shape in shapes))


def test_a_resolvent_refuses_potentials_of_other_heads():
    for resolvent in RESOLVENTS:
        for shape in ((1, 4, 4), (1, 4, 1), (4, 2), (1, 1, 4, 2)):
            with pytest.raises(ValueError, match="with 2 heads"):
                resolvent(torch.ones(shape), torch.ones(2), torch.ones(2))


def test_devices_that_differ_are_refused_and_the_compiled_loops_run_on_the_cpu_only():
    v, eta, meta = torch.ones(1, 4, 2), torch.ones(2), torch.ones(2, device="meta")
    for resolvent in RESOLVENTS:
        with pytest.raises(ValueError, match="v is on cpu, t on meta: move"):
            resolvent(v, eta, meta)
        with pytest.raises(ValueError, match="v is on cpu, eta on meta: move"):
            resolvent(v, meta, eta)
        with pytest.raises(ValueError, match="backend='cpu' with tensors on meta"):
            resolvent(v.to("meta"), meta, meta, "cpu")
        assert resolvent(v.to("meta"), meta, meta).device.type == "meta"


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"backend='x'.*'auto', 'cpu' or 'torch'"):
        BKCore(2)(torch.ones(1, 4, 2), "x")


def test_a_step_refuses_what_does_not_fit():
    core = BKCore(2, n_values=3)
    state, _ = core.step(None, torch.ones(4, 8))
    for wrong in ((4, 2), (4, 9), (8,), (1, 4, 8)):
        with pytest.raises(ValueError, match="given"):
            core.step(None, torch.ones(wrong))
    for other in (state[:1], state[:, :2]):
        with pytest.raises(ValueError, match="state"):
            core.step(other, torch.ones(4, 8))
