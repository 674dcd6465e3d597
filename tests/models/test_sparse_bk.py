"""Sparse BK-Core against a loop over positions; a full mask is the dense layer; nothing looks ahead."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import SIZES, VOCABULARY, future_jacobian

from earlyexit.calibration.collect import collect_trace
from earlyexit.evaluation.causality import future_effect, replace_future
from earlyexit.evaluation.routing import kept_shares
from earlyexit.exits.criteria import CRITERIA
from earlyexit.models.sparse_bk import SparseBKLanguageModel, sparse_layers
from earlyexit.nn.block import MoEResNetBKLayer
from earlyexit.nn.config import ModelConfig
from earlyexit.nn.record import recorded
from earlyexit.nn.sparse_bk import SparseMixing
from earlyexit.training.config import TrainingConfig
from earlyexit.training.train import train

READY = [name for name in CRITERIA if name != "depth"]
VALUES = [4, 0]  # channels per head
EVERY = torch.ones(3, 10, dtype=torch.bool)  # positions count


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


def make_mixing(values: int, heads: int = 3, d: int = 6) -> SparseMixing:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=2, d_model=d, bk_heads=heads, bk_values=values)
    return SparseMixing(config).double()


def slow_features(mixing: SparseMixing, given, mask):
    """The definition, one position at a time."""
    core, out = mixing.bk_core, []
    t, heads, values = core.t, core.n_heads, core.n_values
    for rows, keeps in zip(given, mask, strict=True):
        g, states = torch.zeros(heads, dtype=torch.complex128), []
        y = torch.zeros(heads, values, dtype=torch.complex128)
        for row, keep in zip(rows, keeps, strict=True):
            if keep:
                g = 1 / (row[:heads] - 2 * t - 1j * core.eta - t**2 * g)
                y = g[:, None] * (row[heads:].view(heads, values) - t[:, None] * y)
            states.append(normalised(mixing, y) if values else torch.cat([g.real, g.imag]))
        out.append(torch.stack(states))
    return torch.stack(out)


def normalised(mixing: SparseMixing, y):
    """Each head's combined values over their root mean square."""
    z = mixing.real.view_as(y.real) * y.real + mixing.imag.view_as(y.imag) * y.imag
    return (z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten()


def features(mixing: SparseMixing, given, mask):
    out = mixing.mix(None, torch.cat([given, mask[..., None]], dim=-1), None)
    return out.view(*given.shape[:2], -1)


def some_given(values: int, batch: int, length: int, heads: int = 3):
    return torch.randn(batch, length, heads + heads * values).double()


def some_mask(kind: str, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(shape, generator=generator) < 0.5).double()
    if kind == "one row empty":
        mask[0] = 0
    return torch.zeros(shape).double() if kind == "empty" else mask


@torch.no_grad()
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("kind", ["half", "one row empty", "empty"])
def test_features_are_those_of_the_loop(kind, values):
    mixing, given = make_mixing(values), some_given(values, 3, 11)
    mask = some_mask(kind, (3, 11))
    truth = slow_features(mixing, given, mask)
    torch.testing.assert_close(features(mixing, given, mask), truth)
    with_mask, memory = torch.cat([given, mask[..., None]], dim=-1), None
    for i in range(11):
        found, memory = mixing.step(None, with_mask[:, i], memory)
        torch.testing.assert_close(found, truth[:, i])
    rows = torch.tensor([0, 7, 30])
    torch.testing.assert_close(mixing.mix(None, with_mask, rows), truth.flatten(0, 1)[rows])


@pytest.mark.parametrize("values", VALUES)
def test_gradients_of_the_contribution_and_of_the_physics_are_those_of_the_loop(values):
    mixing, given = make_mixing(values), some_given(values, 2, 9).requires_grad_()
    mask, weight = some_mask("half", (2, 9)), torch.randn(2, 9, 3 * values or 6).double()
    combined = (mixing.real, mixing.imag) if values else ()
    inputs = (given, *mixing.bk_core.parameters(), *combined)
    found = torch.autograd.grad((weight * features(mixing, given, mask)).sum(), inputs)
    truth = torch.autograd.grad((weight * slow_features(mixing, given, mask)).sum(), inputs)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("values", VALUES)
def test_the_mask_gets_the_change_that_keeping_a_position_makes(values):
    """Up to the next kept position: the difference of the features with and without it."""
    mixing, given = make_mixing(values), some_given(values, 1, 8)
    weight = torch.randn(1, 8, 3 * values or 6).double()
    mask = torch.tensor([[1.0, 0, 0, 1, 1, 0, 0, 0]]).double().requires_grad_()
    out = features(mixing, given, mask)
    assert torch.equal(out, features(mixing, given, mask.detach()))
    (grad,) = torch.autograd.grad((weight * out).sum(), mask)
    for i, end in [(0, 3), (1, 3), (2, 3), (3, 4), (4, 8), (5, 8), (7, 8)]:
        on, off = mask.detach().clone(), mask.detach().clone()
        on[0, i], off[0, i] = 1, 0
        change = slow_features(mixing, given, on) - slow_features(mixing, given, off)
        wanted = (weight * change)[0, i:end].sum()
        torch.testing.assert_close(grad[0, i], wanted.detach())


def sparse_and_dense(mode: float, values: int):
    """A sparse layer with scores of one sign, and the dense layer with the same weights."""
    torch.manual_seed(0)
    sizes = {"bk_heads": 4, "bk_values": values}
    dense = MoEResNetBKLayer(6, 10, **sizes).eval()
    sparse = copy.deepcopy(dense)
    sparse.mixing = SparseMixing(ModelConfig(vocab_size=2, d_model=6, **sizes)).eval()
    weights = {
        name.replace("contribution", "contribution.product"): weight
        for name, weight in dense.mixing.state_dict().items()
    }
    missing = sparse.mixing.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and len(missing.missing_keys) == 2
    torch.nn.init.zeros_(sparse.contribution.importance.weight)
    torch.nn.init.constant_(sparse.contribution.importance.bias, mode)
    return sparse, dense


@torch.no_grad()
@pytest.mark.parametrize("values", VALUES)
def test_a_full_mask_is_the_dense_layer_exactly(values):
    (sparse, dense), u = sparse_and_dense(1.0, values), torch.randn(3, 10, 6)
    with recorded(EVERY) as record:
        assert torch.equal(sparse(u), dense(u))
    assert record.notes["kept"][0].tolist() == [30, 30]


@torch.no_grad()
@pytest.mark.parametrize("values", VALUES)
def test_an_empty_mask_mixes_nothing(values):
    (sparse, _), u = sparse_and_dense(-1.0, values), torch.randn(3, 10, 6)
    mixed = sparse.mixing.bk_scale * sparse.mixing.output_proj.bias
    with recorded(EVERY) as record:
        torch.testing.assert_close(sparse(u), mixed + sparse.moe(u + mixed))
    assert record.notes["kept"][0].tolist() == [0, 30]


@torch.no_grad()
def test_the_recursion_is_shorter_and_its_products_are_skipped(make_sparse, make_tokens):
    model, x = make_sparse(), make_tokens(3, 12)
    chooser, core = next(sparse_layers(model)), model.blocks[0].bk_layer.mixing.bk_core
    rows, lengths = [], []
    chooser.product.register_forward_hook(lambda m, inputs, out: rows.append(len(inputs[0])))
    core.register_forward_hook(lambda m, inputs, out: lengths.append(inputs[0].shape[1]))
    kept = (chooser.importance(model.blocks[0].layer_norm(model.embed(x))) > 0).squeeze(-1)
    assert 0.2 < kept.double().mean() < 0.8
    with recorded(torch.ones_like(x, dtype=torch.bool)) as record:
        model(x)
    assert lengths == [kept.sum(1).max()] and lengths[0] < 12
    assert rows == [kept.sum()]
    assert record.notes["kept"][0].tolist() == [kept.sum(), 36]


@torch.no_grad()
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("criterion", READY)
def test_with_exits_both_executions_agree(make_sparse, make_tokens, make_policy, criterion, values):
    model, x = make_sparse(bk_values=values).double(), make_tokens(5, 12)
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


@torch.no_grad()
@pytest.mark.parametrize("way", ["recomputed", "kept", "potentials"])
def test_exited_tokens_hand_on_their_masks(make_sparse, make_tokens, make_policy, way):
    model, x = make_sparse(left_behind=way).double(), make_tokens(4, 12)
    policy = make_policy(model, x, "gate")
    a, b = (
        model(x, use_early_exit=True, policy=policy, execution=e)[0] for e in ("compacted", "dense")
    )
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    ids, exits = model.generate(x[:, :1], 11, policy)
    again, info = model(ids[:, :-1], use_early_exit=True, policy=policy)
    assert torch.equal(again.argmax(-1), ids[:, 1:]) and torch.equal(info["exit_layers"], exits)
    u = model.normed(1, torch.randn(40, 16).double())
    now, then = model.contribution(1, u), model.contribution(0, u.flip(0))
    mask = model.handed_on(now, then)[:, -1]
    assert torch.equal(mask, (then if way == "kept" else now)[:, -1]) and 0 < mask.mean() < 1


def test_causal(make_sparse, make_tokens):
    model, x = make_sparse(top_k=2).double(), make_tokens(4, 12)
    for cut in (1, 6, 11):
        assert future_effect(model, x, cut) <= 1e-10
    future, past = future_jacobian(model, x[:1, :9], model)
    assert future == 0 and past > 0


@torch.no_grad()
@pytest.mark.parametrize("values", VALUES)
def test_generation_step_by_step_is_the_whole_window(make_sparse, make_tokens, values):
    model, x = make_sparse(bk_values=values).double(), make_tokens(2, 5)
    ids, exits = model.generate(x, 6)
    assert torch.equal(model(ids[:, :-1]).argmax(-1)[:, 4:], ids[:, 5:])
    assert (exits == model.n_layers).all()


@pytest.mark.slow
def test_training_reaches_the_target_share_and_learns(corpus):
    for keep in (0.3, 0.7):
        torch.manual_seed(0)
        sizes = SIZES | {"keep": keep, "n_layers": 2, "sparsity_weight": 20.0}
        model = SparseBKLanguageModel(**sizes)
        config = TrainingConfig(epochs=10, batch_size=8, learning_rate=1e-2)
        history = train(model, corpus, config, "cpu")
        assert history[-1]["train_nll"] < history[0]["train_nll"]
        trace = collect_trace(model, corpus.splits["fit"], corpus.eos_id)
        assert trace.n_layers == 2
        x = torch.as_tensor(corpus.splits["train"].ids.reshape(-1, 12)).long()  # its mean is held
        shares = kept_shares(model, [(x, x)])
        assert shares == pytest.approx([keep] * 2, abs=0.15)


@pytest.mark.parametrize("seed", range(3))
def test_the_importance_learns_what_matters(seed):
    """Only some positions carry what must be remembered: the scores find them, from any start."""
    torch.manual_seed(seed)
    layer = MoEResNetBKLayer(8, 16, bk_heads=4, dropout_p=0.0)
    layer.mixing = SparseMixing(ModelConfig(vocab_size=2, d_model=8, bk_heads=4))
    torch.nn.init.zeros_(layer.mixing.contribution.importance.weight)  # nothing is told apart
    layer.train()
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
    for _ in range(200):
        u = torch.randn(64, 16, 8)
        marked = torch.rand(64, 16) < 0.5
        u[..., 0] = torch.where(marked, 1.0, -1.0)
        u[..., 1:] = torch.where(marked[..., None], u[..., 1:], 3 * u[..., 1:])  # noise elsewhere
        position = torch.arange(16).expand(64, 16)
        last = torch.where(marked, position, -1).cummax(dim=1).values
        wanted = u[..., 1].gather(1, last.clamp_min(0)) * (last >= 0)  # the last marked value
        with recorded(torch.ones_like(marked)) as record:
            loss = (layer(u)[..., 2] - wanted).square().mean()
        kept, of = record.notes["kept"][0]
        loss = loss + 3 * (kept / of - 0.5).square()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    score = layer.contribution.importance(u)[..., 0]
    assert score[marked].mean() > score[~marked].mean() + 3  # the noise of the mask has scale 1


def test_keep_one_is_the_plain_model(make_tokens):
    model = SparseBKLanguageModel(**SIZES | {"keep": 1.0})
    assert not list(sparse_layers(model))
    wrongs = [{"keep": 0.0}, {"keep": 1.5}, {"sparsity_weight": -1}, {"causal": False}]
    for wrong in (*wrongs, {"mixing": "attention"}, {"mixing": "none"}):
        with pytest.raises(ValueError):
            SparseBKLanguageModel(**SIZES | wrong)
