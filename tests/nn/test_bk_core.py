"""BK-Core against the dense inverse, in double precision, of the matrix it never builds."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit.nn.bk_core import BKCore, causal_resolvent, two_sided_resolvent

BACKENDS = ("cpu", "torch")
RESOLVENTS = (causal_resolvent, two_sided_resolvent)


def bands(v: np.ndarray, eta: float, t: float) -> np.ndarray:
    """H − iη of one head as LAPACK's three diagonals ``(3, N)``."""
    out = np.full((3, len(v)), t, complex)
    out[1] = v.astype(float) - 2 * t - 1j * eta
    return out


def dense(v: np.ndarray, eta: float, t: float) -> np.ndarray:
    """H − iη of one head ``(N, N)``."""
    _, diagonal, off = bands(v, eta, t)[:, : len(v)]
    return np.diag(diagonal) + np.diag(off[1:], 1) + np.diag(off[1:], -1)


def last_entry(v: np.ndarray, eta: float, t: float) -> complex:
    """Last diagonal entry of (H − iη)⁻¹, by LAPACK's pivoted banded solver."""
    unit = np.zeros(len(v), complex)
    unit[-1] = 1
    return scipy.linalg.solve_banded((1, 1), bands(v, eta, t), unit)[-1]


def one_head(resolvent, v, eta, t, backend) -> np.ndarray:
    """``(N,)`` from float32 inputs."""
    args = [torch.tensor(np.reshape(a, s), dtype=torch.float32) for a, s in
            ((v, (1, -1, 1)), (eta, (1,)), (t, (1,)))]  # fmt: skip
    return resolvent(*args, backend).numpy().ravel()


def relative_error(found, truth) -> float:
    return np.max(np.abs(found - truth) / np.abs(truth))


float32 = {"width": 32, "allow_nan": False, "allow_subnormal": False}
potentials = st.lists(st.floats(-10, 10, **float32), min_size=1, max_size=40)
widths = st.floats(np.float32(0.01), 2, **float32)
couplings = st.floats(-1, 1, **float32)


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
    sites = [0, 1, 2, 50, 1000, n - 1]
    assert relative_error(g[sites], [last_entry(v[: i + 1], eta, 1.0) for i in sites]) < 1e-5
    assert np.all(np.abs(g) <= 1 / float(eta) * (1 + 1e-12))  # the bound of any resolvent


def test_the_product_form_does_overflow_there():
    alpha, before, now = -3.0 - 2 - 0.01j, 1.0, -3.0 - 2 - 0.01j
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(2047):
            before, now = now, np.complex128(alpha * now - before)
    assert not np.isfinite(now)


def batch(seed: int = 0, n: int = 33, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    """v ``(2, n, 3)``, η ``(3,)``, t ``(3,)``, all requiring gradients."""
    generator = torch.Generator().manual_seed(seed)
    v = 3 * torch.randn(2, n, 3, generator=generator, dtype=torch.float64)
    eta, t = torch.tensor([0.02, 0.3, 1.0]), torch.tensor([1.0, -0.5, 0.0])
    return tuple(a.to(dtype).requires_grad_() for a in (v, eta, t))


@pytest.mark.parametrize("resolvent", RESOLVENTS)
@pytest.mark.parametrize("n", [1, 2, 7, 64, 100])
def test_backends_agree(resolvent, n):
    args = batch(n=n)
    torch.testing.assert_close(
        resolvent(*args, "cpu"), resolvent(*args, "torch"), rtol=1e-10, atol=1e-12
    )


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
@pytest.mark.parametrize("level", [0.0, -3.0, 2.0])
def test_gradients_where_products_overflow(level, backend):
    exact = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in ([0.01], [1.0])]
    v = torch.full((1, 2048, 1), level, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 2048, 1, dtype=torch.complex128, generator=torch.manual_seed(0))
    args = (v, *exact)
    found = torch.autograd.grad((weight * causal_resolvent(*args, backend)).real.sum(), args)
    truth = torch.autograd.grad((weight * slow_causal(*args)).real.sum(), args)
    for a, b in zip(found, truth, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("resolvent", RESOLVENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(resolvent, backend):
    assert torch.autograd.gradcheck(lambda *a: resolvent(*a, backend), batch(2, 6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_causal_form_never_sees_the_future_and_the_two_sided_form_does(backend):
    v, eta, t = (a.detach() for a in batch(3, 9))
    for resolvent, leaks in ((causal_resolvent, False), (two_sided_resolvent, True)):
        jacobian = torch.autograd.functional.jacobian(
            lambda v, f=resolvent: torch.view_as_real(f(v, eta, t, backend)[0, :, 0]), v
        )[:, :, 0, :, 0]  # (N outputs, 2, N inputs)
        future = torch.stack([jacobian[i, :, i + 1 :].abs().sum() for i in range(8)])
        assert bool((future > 0).all()) if leaks else bool((future == 0).all())
        assert (torch.diagonal(jacobian[:, 0]) != 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_the_core_gives_real_and_imaginary_parts_of_its_heads(causal):
    core, v = BKCore(5, causal=causal), torch.randn(2, 7, 5)
    g = (causal_resolvent if causal else two_sided_resolvent)(v, core.eta, core.t)
    torch.testing.assert_close(core(v), torch.cat([g.real, g.imag], -1).float())
    assert core(v).dtype == torch.float32
    assert (core.eta > 0).all()
    core(v).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in core.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_potentials_are_read_as_they_are(dtype):
    core, v = BKCore(3), torch.randn(2, 7, 3).to(dtype)
    assert core(v).dtype == dtype
    torch.testing.assert_close(core(v), core(v.float()).to(dtype))


def test_stepping_equals_the_scan():
    core, v = BKCore(5).double(), torch.randn(3, 20, 5, dtype=torch.float64)
    state, features = None, []
    for i in range(20):
        state, feature = core.step(state, v[:, i])
        assert state.shape == (3, 5)  # and that is all it remembers
        features.append(feature)
    torch.testing.assert_close(torch.stack(features, 1), core(v), rtol=1e-12, atol=1e-12)


def test_a_two_sided_core_cannot_step():
    with pytest.raises(RuntimeError, match="future"):
        BKCore(2, causal=False).step(None, torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_without_a_gradient_are_those_with_one(dtype):
    core = BKCore(4).to(dtype)
    v = torch.randn(2, 37, 4, dtype=dtype, requires_grad=True)
    wanted = core(v)
    with torch.no_grad():
        found = core(v)
    assert wanted.requires_grad and found.dtype == dtype
    assert torch.allclose(found, wanted, rtol=1e-6)
