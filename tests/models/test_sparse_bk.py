"""Sparse BK-Core against a loop over positions; a full mask is the dense layer; nothing looks ahead."""

from __future__ import annotations

import pytest
import torch
from conftest import SIZES, VOCABULARY, future_jacobian

from earlyexit.calibration.collect import collect_trace
from earlyexit.evaluation.causality import future_effect, replace_future
from earlyexit.evaluation.routing import kept_shares
from earlyexit.exits.criteria import CRITERIA
from earlyexit.models.sparse_bk import SparseBKLanguageModel, sparse_layers
from earlyexit.nn.bk_core import BKCore, causal_resolvent
from earlyexit.nn.block import MoEResNetBKLayer
from earlyexit.nn.sparse_bk import SparseBKCore, SparseBKLayer
from earlyexit.training.config import TrainingConfig
from earlyexit.training.train import train

READY = [name for name in CRITERIA if name != "depth"]


@pytest.fixture(scope="module")
def make_sparse():
    """``make_sparse(seed=0, **changes)``: noise on every weight, about half of the positions kept."""

    def make(seed: int = 0, **changes) -> SparseBKLanguageModel:
        torch.manual_seed(seed)
        model = SparseBKLanguageModel(**SIZES | changes)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.15 * torch.randn_like(parameter)
            for block in model.blocks:
                block.exit_classifier.layer_norm.weight.mul_(3)
            model.gates.trained.fill_(True)
        return model.eval()

    return make


def slow_features(core: BKCore, v, mask):
    """The definition, one position at a time."""
    out = []
    for values, row in zip(v, mask, strict=True):
        g, states = torch.zeros(v.shape[-1], dtype=torch.complex128), []
        for value, keep in zip(values, row, strict=True):
            if keep:
                alpha = value - 2 * core.t - 1j * core.eta
                g = 1 / (alpha - core.t**2 * g)
            states.append(torch.cat([g.real, g.imag]))
        out.append(torch.stack(states))
    return torch.stack(out)


def some_mask(kind: str, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(shape, generator=generator) < 0.5).double()
    if kind == "one row empty":
        mask[0] = 0
    return torch.zeros(shape).double() if kind == "empty" else mask


@pytest.mark.parametrize("kind", ["half", "one row empty", "empty"])
def test_features_are_those_of_the_loop(kind):
    torch.manual_seed(0)
    core = SparseBKCore(5, torch.nn.Identity()).double()
    v, mask = torch.randn(3, 11, 5).double(), some_mask(kind, (3, 11))
    out = core(torch.cat([v, mask[..., None]], dim=-1))
    torch.testing.assert_close(out, slow_features(core, v, mask))
    for backend in ("cpu", "torch"):
        again = core(torch.cat([v, mask[..., None]], dim=-1), backend)
        torch.testing.assert_close(again, out)


def test_gradients_of_potentials_and_of_the_physics_are_those_of_the_loop():
    torch.manual_seed(0)
    core = SparseBKCore(3, torch.nn.Identity()).double()
    v, mask = torch.randn(2, 9, 3).double().requires_grad_(), some_mask("half", (2, 9))
    weight = torch.randn(2, 9, 6).double()
    inputs = (v, *core.parameters())
    out = core(torch.cat([v, mask[..., None]], dim=-1))
    found = torch.autograd.grad((weight * out).sum(), inputs)
    truth = torch.autograd.grad((weight * slow_features(core, v, mask)).sum(), inputs)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b)


def test_the_mask_gets_the_change_that_keeping_a_position_makes():
    """Up to the next kept position: the difference of the features with and without it."""
    torch.manual_seed(0)
    core = SparseBKCore(3, torch.nn.Identity()).double()
    v, weight = torch.randn(1, 8, 3).double(), torch.randn(1, 8, 6).double()
    mask = torch.tensor([[1.0, 0, 0, 1, 1, 0, 0, 0]]).double().requires_grad_()
    out = core(torch.cat([v, mask[..., None]], dim=-1))
    assert torch.equal(out, core(torch.cat([v, mask.detach()[..., None]], dim=-1)))
    (grad,) = torch.autograd.grad((weight * out).sum(), mask)
    for i, end in [(0, 3), (1, 3), (2, 3), (3, 4), (4, 8), (5, 8), (7, 8)]:
        on, off = mask.detach().clone(), mask.detach().clone()
        on[0, i], off[0, i] = 1, 0
        change = slow_features(core, v, on) - slow_features(core, v, off)
        wanted = (weight * change)[0, i:end].sum()
        torch.testing.assert_close(grad[0, i], wanted.detach())


def sparse_and_dense(mode: float):
    """A sparse layer with scores of one sign, and the dense layer with the same weights."""
    torch.manual_seed(0)
    sparse = SparseBKLayer(6, 10, bk_heads=4).eval()
    dense = MoEResNetBKLayer(6, 10, bk_heads=4).eval()
    torch.nn.init.zeros_(sparse.importance.weight)
    torch.nn.init.constant_(sparse.importance.bias, mode)
    missing = dense.load_state_dict(sparse.state_dict(), strict=False)
    assert missing.unexpected_keys == ["importance.weight", "importance.bias"]
    return sparse, dense


@torch.no_grad()
def test_a_full_mask_is_the_dense_layer_exactly():
    (sparse, dense), u = sparse_and_dense(1.0), torch.randn(3, 10, 6)
    assert torch.equal(sparse(u), dense(u))
    assert sparse.kept() == 1


@torch.no_grad()
def test_an_empty_mask_mixes_nothing():
    (sparse, _), u = sparse_and_dense(-1.0), torch.randn(3, 10, 6)
    mixed = sparse.bk_scale * sparse.output_proj.bias
    torch.testing.assert_close(sparse(u), mixed + sparse.moe(u + mixed))


@torch.no_grad()
def test_the_recursion_is_shorter_and_its_projections_are_skipped(make_sparse, make_tokens):
    model, x = make_sparse(), make_tokens(3, 12)
    layer = next(sparse_layers(model))
    rows = {"v_proj": 0, "output_proj": 0}
    for name in rows:

        def count(module, inputs, output, name=name):
            rows[name] += inputs[0].numel() // inputs[0].shape[-1]

        getattr(layer, name).register_forward_hook(count)
    kept = (layer.importance(model.blocks[0].layer_norm(model.embed(x))) > 0).squeeze(-1)
    assert 0.2 < kept.double().mean() < 0.8
    seen = []
    with pytest.MonkeyPatch.context() as patch:

        def watch(v, *rest):
            seen.append(v.shape[1])
            return causal_resolvent(v, *rest)

        patch.setattr("earlyexit.nn.sparse_bk.causal_resolvent", watch)
        model(x)
    assert seen[0] == kept.sum(1).max() < 12
    assert rows["v_proj"] == kept.sum()
    assert rows["output_proj"] == 3 * (kept.sum(1).max() + 1)  # padded, with the state before all
    assert layer.kept() == pytest.approx(kept.double().mean().item())


@torch.no_grad()
@pytest.mark.parametrize("criterion", READY)
def test_with_exits_both_executions_agree(make_sparse, make_tokens, make_policy, criterion):
    model, x = make_sparse().double(), make_tokens(5, 12)
    policy = make_policy(model, x, criterion)
    (a, one), (b, two) = (
        model(x, use_early_exit=True, policy=policy, execution=e) for e in ("compacted", "dense")
    )
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert torch.equal(one["exit_layers"], two["exit_layers"])
    for cut in (1, 5, 11):
        other = replace_future(x, cut, VOCABULARY, seed=cut)
        c, three = model(other, use_early_exit=True, policy=policy)
        assert (a[:, :cut] - c[:, :cut]).abs().max() <= 1e-10
        assert torch.equal(one["exit_layers"][:, :cut], three["exit_layers"][:, :cut])


def test_causal(make_sparse, make_tokens):
    model, x = make_sparse(top_k=2).double(), make_tokens(4, 12)
    for cut in (1, 6, 11):
        assert future_effect(model, x, cut) <= 1e-10
    future, past = future_jacobian(model, x[:1, :9], model)
    assert future == 0 and past > 0


@torch.no_grad()
def test_generation_step_by_step_is_the_whole_window(make_sparse, make_tokens):
    model, x = make_sparse(), make_tokens(2, 5)
    ids, exits = model.generate(x, 6)
    assert torch.equal(model(ids[:, :-1]).argmax(-1)[:, 4:], ids[:, 5:])
    assert (exits == model.n_layers).all()


@pytest.mark.slow
def test_training_reaches_the_target_share_and_learns(corpus):
    for keep in (0.3, 0.7):
        torch.manual_seed(0)
        sizes = SIZES | {"keep": keep, "n_layers": 2}
        model = SparseBKLanguageModel(**sizes)
        config = TrainingConfig(epochs=6, batch_size=8, learning_rate=1e-2)
        history = train(model, corpus, config, "cpu")
        assert history[-1]["train_nll"] < history[0]["train_nll"]
        trace = collect_trace(model, corpus.splits["fit"], corpus.eos_id)
        assert trace.n_layers == 2
        x = torch.as_tensor(corpus.splits["train"].ids[:120].reshape(10, 12)).long()
        shares = kept_shares(model, [(x, x)])
        assert shares == pytest.approx([keep] * 2, abs=0.15)


def test_the_importance_learns_what_matters():
    """Only some positions carry what must be remembered: the scores find them."""
    torch.manual_seed(0)
    layer = SparseBKLayer(8, 16, bk_heads=4, dropout_p=0.0).train()
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
    for _ in range(150):
        u = torch.randn(16, 16, 8)
        marked = torch.rand(16, 16) < 0.5
        u[..., 0] = torch.where(marked, 1.0, -1.0)
        u[..., 1:] = torch.where(marked[..., None], u[..., 1:], 3 * u[..., 1:])  # noise elsewhere
        position = torch.arange(16).expand(16, 16)
        last = torch.where(marked, position, -1).cummax(dim=1).values
        wanted = u[..., 1].gather(1, last.clamp_min(0)) * (last >= 0)  # the last marked value
        loss = (layer(u)[..., 2] - wanted).square().mean()
        loss = loss + 3 * (layer.kept_share - 0.5).square()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    score = layer.importance(u)[..., 0]
    assert score[marked].mean() > score[~marked].mean() + 0.5


def test_keep_one_is_the_plain_model(make_tokens):
    model = SparseBKLanguageModel(**SIZES | {"keep": 1.0})
    assert not list(sparse_layers(model))
    for wrong in ({"keep": 0.0}, {"keep": 1.5}, {"sparsity_weight": -1}, {"causal": False}):
        with pytest.raises(ValueError):
            SparseBKLanguageModel(**SIZES | wrong)
