"""Every mixing layer: some rows equal the rows of all, stepping equals the whole, the future unseen."""

from __future__ import annotations

import pytest
import torch

from earlyexit.nn.bk_core import causal_action, causal_resolvent
from earlyexit.nn.config import ModelConfig
from earlyexit.nn.mixing import HEAD_WIDTH, MIXINGS, starts

D, B, N = 2 * HEAD_WIDTH, 3, 11
KINDS = {
    "resolvent": {"bk_heads": 4, "bk_values": 3},
    "diagonal": {"bk_heads": 4, "bk_values": 0},
    "attention": {"mixing": "attention"},
    "none": {"mixing": "none"},
}
SEEING = ("resolvent", "diagonal", "attention")


def make(kind: str, **changes) -> torch.nn.Module:
    """A layer in float64, with noise on every weight."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=2, d_model=D, **KINDS[kind] | changes)
    layer = MIXINGS[config.mixing](config).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


def states(seed: int = 0) -> torch.Tensor:
    """u ``(B, N, D)``."""
    return torch.randn(B, N, D, generator=torch.manual_seed(seed), dtype=torch.float64)


def whole(layer, u: torch.Tensor) -> torch.Tensor:
    """What the layer adds to the stream ``(B, N, D)``."""
    flat = u.flatten(0, 1)
    return layer.read(flat, layer.mix(flat, layer.contribution(u), None)).view_as(u)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [[0], [0, 1, 10, 11, 20, 32], list(range(B * N)), []])
def test_mixing_of_some_rows_is_the_rows_of_mixing_all(kind, kept):
    layer, u, rows = make(kind), states(), torch.tensor(kept, dtype=torch.long)
    flat, given = u.flatten(0, 1), layer.contribution(u)
    every = layer.mix(flat, given, None)
    some = layer.mix(flat[rows], given, rows)
    torch.testing.assert_close(some, every[rows], rtol=1e-12, atol=1e-12)
    read = layer.read(flat[rows], some)
    assert read.shape == (len(kept), D)
    torch.testing.assert_close(read, whole(layer, u).flatten(0, 1)[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_stepping_is_the_whole_sequence(kind):
    layer, u = make(kind), states()
    given, memory, read = layer.contribution(u), None, []
    for i in range(N):
        mixed, memory = layer.step(u[:, i], given[:, i], memory)
        read.append(layer.read(u[:, i], mixed))
    torch.testing.assert_close(torch.stack(read, 1), whole(layer, u), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_no_mixing_sees_the_future_and_what_mixes_sees_the_past(kind):
    layer = make(kind)
    jacobian = torch.autograd.functional.jacobian(lambda u: whole(layer, u)[0], states())[:, :, 0]
    size = jacobian.abs().sum(dim=(1, 3))  # (N outputs, N inputs)
    assert (size.triu(1) == 0).all()
    past = torch.ones(N, N).tril(-1).bool()
    assert bool((size[past] > 0).all()) == (kind in SEEING) == bool((size[past] > 0).any())


@pytest.mark.parametrize("values", [0, 3])
def test_a_two_sided_resolvent_leaks(values):
    layer = make("resolvent", causal=False, bk_values=values)
    jacobian = torch.autograd.functional.jacobian(lambda u: whole(layer, u)[0], states())[:, :, 0]
    assert (jacobian.abs().sum(dim=(1, 3)) > 0).all()
    with pytest.raises(RuntimeError, match="future"):
        layer.step(states()[:, 0], layer.contribution(states())[:, 0], None)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_do_not_see_each_other(kind):
    layer, u = make(kind), states()
    alone = torch.cat([whole(layer, u[i : i + 1]) for i in range(B)])
    torch.testing.assert_close(alone, whole(layer, u), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", SEEING)
def test_all_parameters_learn(kind):
    layer = make(kind)
    (whole(layer, states()) * states(1)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


def test_no_mixing_has_nothing_to_learn_and_adds_nothing():
    layer = make("none")
    assert not list(layer.parameters())
    assert layer.contribution(states()).shape == (B, N, 0) and not whole(layer, states()).any()


def test_the_resolvent_reads_what_its_docstring_says():
    layer, u, (H, P) = make("resolvent"), states(), (4, 3)
    v, b = layer.contribution(u).split([H, H * P], dim=-1)
    _, y = causal_action(v, b.unflatten(-1, (H, P)), layer.bk_core.eta, layer.bk_core.t)
    w_r, w_i = layer.real.view(H, P), layer.imag.view(H, P)
    z = w_r * y[:, :, 0] + w_i * y[:, :, 1]
    z = (z / z.square().mean(dim=-1, keepdim=True).add(1e-6).sqrt()).flatten(2)
    gate = u @ layer.gate_proj.weight.T
    z = (z * gate * gate.sigmoid()) @ layer.output_proj.weight.T
    truth = layer.bk_scale * (z + layer.output_proj.bias)
    torch.testing.assert_close(whole(layer, u), truth, rtol=1e-10, atol=1e-10)


def test_the_diagonal_alone_reads_as_the_original_does():
    layer, u = make("diagonal"), states()
    features = layer.bk_core(layer.contribution(u))
    assert features.shape == (B, N, 8)
    torch.testing.assert_close(whole(layer, u), layer.bk_scale * layer.output_proj(features))


# ---------------------------------------------------------------------- where heads start


def factor(potential: torch.Tensor, width: torch.Tensor, t: float = 1.0) -> torch.Tensor:
    """−t g of every head ``(H,)``, by which a state is multiplied per token of one potential."""
    t = torch.full_like(potential, t)
    medium = potential.expand(1, 8192, -1)  # so long that it does not matter how it begins
    return (-t * causal_resolvent(medium, width, t))[0, -1]


def decay_rates(potential: torch.Tensor) -> torch.Tensor:
    """κ of potentials below the band's edge, 2 cosh κ = 2 − v."""
    return torch.acosh(1 - potential.double() / 2)


def test_heads_below_the_edge_sum_over_one_to_hundreds_of_tokens_without_a_phase():
    potential, _, width = starts(8, "below")
    assert (potential < 0).all()
    kappa, damping = decay_rates(potential), width.double() / -potential
    assert kappa[[0, -1]].tolist() == pytest.approx([0.003, 2], rel=1e-4)
    found = factor(potential, width)
    assert ((-found.abs().log() - kappa).abs() <= damping**2 * kappa).all()
    assert (found.angle().abs() <= damping * kappa).all()  # over 1/κ tokens, less than a third


def test_heads_in_the_band_oscillate_with_a_phase_of_their_own():
    potential, _, width = starts(8, "band")
    assert ((potential > 0) & (potential < 4)).all()
    found, wave_number = factor(potential, width), torch.acos(1 - potential / 2)
    assert ((found.angle().abs() - wave_number).abs() <= width**2).all()
    assert (found.angle().abs().diff() > 0.1).all() and (found.abs() < 1).all()
    below, _, below_width = starts(8, "below")
    turns = [(f.angle().abs() / -f.abs().log()).max() for f in (factor(below, below_width), found)]
    assert turns[0] < 0.3 < 1 < turns[1]  # radians while a state decays


@pytest.mark.parametrize("heads", [1, 2, 5, 16])
def test_half_of_the_heads_may_start_on_either_side_of_the_edge(heads):
    both, below, band = (starts(heads, where) for where in ("both", "below", "band"))
    assert all(part.shape == (heads,) for parts in (both, below, band) for part in parts)
    assert all((width > 0).all() and (unit > 0).all() for _, unit, width in (both, below, band))
    assert [int((v < 0).sum()) for v, *_ in (both, below, band)] == [heads // 2, heads, 0]


def test_a_step_moves_every_decay_by_the_same_share():
    potential, unit, _ = starts(8, "below")
    kappa, step = decay_rates(potential), 0.1
    moved = decay_rates(potential + step * unit) / kappa - 1
    assert ((-0.6 * step < moved) & (moved < -0.3 * step)).all()  # κ ∝ √|v| where it is small
    same = potential + step * unit.mean()  # control: in one unit for all, the slow cross the edge
    assert (same > 0).any()


@pytest.mark.parametrize("where", ["below", "both", "band"])
def test_a_layer_starts_where_it_is_told(where):
    config = ModelConfig(2, d_model=D, bk_heads=8, bk_values=2, bk_starts=where)
    layer, (potential, unit, width) = MIXINGS["resolvent"](config), starts(8, where)
    given = layer.contribution(torch.zeros(D))
    assert torch.equal(given[:8], potential)
    torch.testing.assert_close(layer.bk_core.eta, width, rtol=1e-5, atol=0)  # above the floor
    layer.contribution(torch.ones(D))[:8].sum().backward()
    torch.testing.assert_close(layer.contribution.bias.grad[:8], unit)


@pytest.mark.parametrize("where", ["below", "both"])
def test_without_values_heads_start_in_the_band(where):
    config = ModelConfig(2, d_model=D, bk_heads=8, bk_values=0, bk_starts=where)
    given = MIXINGS["resolvent"](config).contribution(torch.zeros(D))
    assert torch.equal(given, starts(8, "band")[0])


@pytest.mark.parametrize("kind", SEEING)
def test_a_contribution_is_its_affine_map_of_potentials_in_units_of_their_head(kind):
    layer, u = make(kind), states()
    product, heads = layer.contribution, 0 if kind == "attention" else 4
    weight, offset = product.affine()
    torch.testing.assert_close(product(u), u @ weight.T + offset)
    plain = u @ product.weight.T + product.bias
    start, unit, _ = starts(4, "band" if kind == "diagonal" else "below")
    potentials = (start + unit * plain[..., :4])[..., :heads]
    torch.testing.assert_close(product(u)[..., :heads], potentials)
    torch.testing.assert_close(product(u)[..., heads:], plain[..., heads:])


def test_attention_equals_the_formula():
    layer, u = make("attention"), states()
    query = u @ layer.query.weight.T
    key, value = layer.contribution(u).chunk(2, dim=-1)
    out = torch.zeros_like(u)
    for h in range(D // HEAD_WIDTH):
        part = slice(h * HEAD_WIDTH, (h + 1) * HEAD_WIDTH)
        for i in range(N):
            scores = key[:, : i + 1, part] @ query[:, i, part, None] / HEAD_WIDTH**0.5
            weights = scores.softmax(dim=1)
            out[:, i, part] = (weights * value[:, : i + 1, part]).sum(dim=1)
    truth = out @ layer.output_proj.weight.T + layer.output_proj.bias
    torch.testing.assert_close(whole(layer, u), truth)


def test_attention_remembers_all_and_the_resolvent_a_state():
    sizes = {}
    for kind in KINDS:
        layer, u, memory, sizes[kind] = make(kind), states(), None, []
        given = layer.contribution(u)
        for i in range(N):
            _, memory = layer.step(u[:, i], given[:, i], memory)
            sizes[kind].append(0 if memory is None else memory[0].numel())
    assert sizes["attention"] == [2 * D * (i + 1) for i in range(N)]
    assert sizes["resolvent"] == [4 + 4 * 3] * N
    assert sizes["diagonal"] == [4] * N
    assert sizes["none"] == [0] * N


@pytest.mark.parametrize("changes", [{"d_model": 24}, {"causal": False}])
def test_attention_refuses_what_it_cannot_be(changes):
    config = ModelConfig(2, **{"d_model": D, "mixing": "attention"} | changes)
    with pytest.raises(ValueError, match="attention"):
        MIXINGS["attention"](config)


def test_a_mixing_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="mixing"):
        ModelConfig(2, mixing="vibes")
    with pytest.raises(ValueError, match="bk_values"):
        ModelConfig(2, bk_values=-1)
