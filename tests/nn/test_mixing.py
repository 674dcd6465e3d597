"""Every mixing layer: some rows equal the rows of all, stepping equals the whole, the future unseen."""

from __future__ import annotations

import pytest
import torch

from earlyexit.nn.bk_core import causal_action
from earlyexit.nn.config import ModelConfig
from earlyexit.nn.mixing import HEAD_WIDTH, MIXINGS

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
    g, y = causal_action(v, b.unflatten(-1, (H, P)), layer.bk_core.eta, layer.bk_core.t)
    w_r, w_i = layer.combine.view(2, H, P)
    z = w_r * y[:, :, 0] + w_i * y[:, :, 1]
    z = (z / z.square().mean(dim=-1, keepdim=True).add(1e-6).sqrt()).flatten(2)
    gate = u @ layer.gate_proj.weight.T
    z = (z * gate * gate.sigmoid()) @ layer.values_proj.weight.T
    diagonal = torch.cat([g.real, g.imag], -1) @ layer.output_proj.weight.T
    truth = layer.bk_scale * (z + diagonal + layer.output_proj.bias)
    torch.testing.assert_close(whole(layer, u), truth, rtol=1e-5, atol=1e-5)


def test_the_diagonal_alone_reads_as_the_original_does():
    layer, u = make("diagonal"), states()
    features = layer.bk_core(layer.contribution(u))
    assert features.shape == (B, N, 8)
    assert not hasattr(layer, "values_proj")
    torch.testing.assert_close(whole(layer, u), layer.bk_scale * layer.output_proj(features))


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
