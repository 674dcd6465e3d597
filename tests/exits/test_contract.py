"""The contract is enough: two kinds of model written here go the whole way without an edit elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from earlyexit import certify, collect_trace, fit_policy, loader, train_gates
from earlyexit.cost.parts import policy_flops
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.operations import Operations
from earlyexit.exits.original import original_early_exit
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.statistics import exit_shares
from earlyexit.nn.gates import ExitGates
from earlyexit.nn.heads import ExitHead
from earlyexit.nn.unembedding import LinearUnembedding
from earlyexit.training.config import TrainingConfig
from earlyexit.training.train import train


@dataclass(frozen=True)
class ToyConfig:
    vocab_size: int
    d_model: int = 16
    n_layers: int = 3
    n_seq: int = 12


class RunningMean(EarlyExitModel):
    """Every layer reads the mean of what has been said so far."""

    config_type, given_width, can_step = ToyConfig, 1, True

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.config = c = self.config_type(*args, **kwargs)
        self.vocab_size, self.n_layers, self.n_seq = c.vocab_size, c.n_layers, c.n_seq
        d, layers = c.d_model, range(c.n_layers)
        self.words = nn.Embedding(c.vocab_size, d)
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in layers)
        self.given = nn.ModuleList(nn.Linear(d, self.given_width * d) for _ in layers)
        self.out = nn.ModuleList(nn.Linear(2 * d, d) for _ in layers)
        unembedding, last = LinearUnembedding(d, c.vocab_size), c.n_layers - 1
        self.heads = nn.ModuleList(
            ExitHead(d, unembedding, borrowed=k != last, translate=k != last) for k in layers
        )
        self.gates = ExitGates(c.n_layers, d)
        self.start_statistics()

    def embed(self, x: Tensor, start: int = 0) -> Tensor:
        return self.words(x)

    def normed(self, layer: int, h: Tensor) -> Tensor:
        return self.norms[layer](h)

    def contribution(self, layer: int, u: Tensor) -> Tensor:
        return self.given[layer](u)

    def mix(self, layer: int, u: Tensor, given: Tensor, rows: Tensor | None) -> Tensor:
        count = torch.arange(1, given.shape[1] + 1, dtype=given.dtype)[:, None]
        mean = (given.cumsum(dim=1) / count).flatten(0, 1)
        return mean if rows is None else mean[rows]

    def update(self, layer: int, h: Tensor, u: Tensor, mixed: Tensor) -> Tensor:
        return h + self.out[layer](torch.cat([u, mixed], dim=-1)).tanh()

    def step(self, layer: int, u: Tensor, given: Tensor, memory):
        total, count = (given, 1) if memory is None else (memory[0] + given, memory[1] + 1)
        return total / count, (total, count)

    def head(self, layer: int) -> ExitHead:
        return self.heads[layer]

    def operations(self) -> Operations:
        d = self.config.d_model
        return Operations.plain(
            n_layers=self.n_layers, d_model=d, vocab_size=self.vocab_size,
            block={"given": 2 * d * d * self.given_width, "out": 4 * d * d},
            propagated={"given": 2 * d * d * self.given_width}, translator=2 * d * d,
        )  # fmt: skip


class AttentionDecoder(RunningMean):
    """Causal attention; exited tokens leave their keys and values, and stepping keeps a cache."""

    given_width = 2  # a key and a value

    def _attend(self, layer: int, u: Tensor, keys: Tensor, values: Tensor, mask) -> Tensor:
        query = u @ self.given[layer].weight[: u.shape[-1]]  # tied to the keys: it is a toy
        score = (query[:, None] * keys).sum(-1) / u.shape[-1] ** 0.5
        return (score.masked_fill(mask, -torch.inf).softmax(-1)[..., None] * values).sum(1)

    def mix(self, layer: int, u: Tensor, given: Tensor, rows: Tensor | None) -> Tensor:
        length = given.shape[1]
        rows = torch.arange(given.shape[0] * length) if rows is None else rows
        keys, values = given[rows // length].chunk(2, dim=-1)  # (A, N, D) each
        return self._attend(layer, u, keys, values, torch.arange(length) > (rows % length)[:, None])

    def step(self, layer: int, u: Tensor, given: Tensor, memory):
        cache = given[:, None] if memory is None else torch.cat([memory, given[:, None]], dim=1)
        keys, values = cache.chunk(2, dim=-1)
        return self._attend(layer, u, keys, values, torch.zeros(1, dtype=torch.bool)), cache


@pytest.fixture(scope="module", params=[RunningMean, AttentionDecoder])
def trained(request, corpus):
    torch.manual_seed(0)
    model = request.param(corpus.vocab_size)
    config = TrainingConfig(epochs=3, batch_size=8, learning_rate=1e-2, exit_loss_weight=1.0)
    train(model, corpus, config, "cpu")
    train_gates(model, corpus.splits["train"], corpus.eos_id, max_tokens=600, steps=100)
    return model


@pytest.fixture(scope="module")
def batch(trained, corpus):
    return next(iter(loader(corpus.splits["test"], trained.n_seq, 6, corpus.eos_id)))


@pytest.fixture(scope="module")
def trace(trained, corpus):
    return collect_trace(trained, corpus.splits["fit"], corpus.eos_id)


@pytest.fixture(scope="module")
def halfway(trained, trace):
    """``halfway(criterion)``: a policy by which about half of the tokens leave at each exit."""

    def make(criterion: str) -> ExitPolicy:
        layers = trained.n_layers
        if criterion == "patience":
            return ExitPolicy.constant(1, layers, criterion)
        cuts = np.quantile(trace.score(criterion)[:, :-1], 0.5, axis=0)
        return ExitPolicy(criterion, (*map(float, cuts), CRITERIA[criterion].never))

    return make


@pytest.mark.parametrize(
    "criterion", ["gate", "max_probability", "entropy", "saturation", "patience"]
)
def test_compacted_is_dense(trained, batch, halfway, criterion):
    (x, y), policy = batch, halfway(criterion)
    (fast, left), (slow, right) = (trained.nll(x, y, policy, e) for e in ("compacted", "dense"))
    assert (left == right).all() and left.unique().numel() > 1
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_without_exits_it_is_the_plain_forward(trained, batch):
    x, y = batch
    never = ExitPolicy.static(trained.n_layers, trained.n_layers)
    plain = trained.nll(x, y)
    assert plain.shape == x.shape
    for execution in ("compacted", "dense"):
        torch.testing.assert_close(trained.nll(x, y, never, execution)[0], plain)
    logits = torch.nn.functional.cross_entropy(
        trained(x).flatten(0, 1), y.flatten(), reduction="none", ignore_index=-100
    )
    torch.testing.assert_close(plain.flatten(), logits.detach(), rtol=1e-4, atol=1e-5)


def test_an_exited_token_is_read_by_deeper_layers_as_it_left(trained, batch, halfway):
    """Frozen states, by hand: the contribution at each deeper layer is that of the state at the exit."""
    x = batch[0][:1]
    policy = halfway("gate")
    exits = trained.predict(x, policy)[1]
    h = trained.embed(x)
    for layer in range(trained.n_layers):
        after = trained.layer(layer, h)
        h = torch.where((exits < layer)[..., None], h, after)
    head = trained.head(trained.n_layers - 1)
    full = exits >= trained.n_layers - 1
    logits, _ = trained(x, use_early_exit=True, policy=policy)
    torch.testing.assert_close(logits[full], head(h)[full], rtol=1e-4, atol=1e-5)


def test_stepping_is_the_whole_sequence(trained, batch, halfway):
    prompt = batch[0][:3, :5]
    policy = halfway("gate")
    ids, exits = trained.generate(prompt, 4, policy)
    again, whole = trained.predict(ids[:, :-1], policy)
    assert (again[:, 4:] == ids[:, 5:]).all() and (whole == exits).all()


def test_from_trace_to_certificate(trained, trace, corpus):
    x, y = next(iter(loader(corpus.splits["fit"], trained.n_seq, 64, corpus.eos_id)))
    nll = trained.nll(x, y)[y != -100].double().mean().item()
    assert trace.full_nll == pytest.approx(nll, rel=1e-5)
    policy = fit_policy(trace, "gate", 0.2)
    assert trace.evaluate(policy)["quality_loss"] <= 0.2
    assert trace.evaluate(policy)["layers"] < trained.n_layers
    certificate = certify(
        trained, trace, corpus.splits["certify"], corpus.eos_id, epsilon=2.0, delta=0.3
    )
    assert (
        certificate.check(trained, corpus.splits["test"]) and certificate.layers < trained.n_layers
    )


def test_its_cost_is_counted(trained, batch, halfway):
    x, y = batch
    policy = halfway("gate")
    shares, layers, d = exit_shares(trained, x, y, policy), trained.n_layers, 16
    cost = policy_flops(trained, shares, policy)
    executed = shares @ np.minimum(np.arange(layers + 1) + 1, layers)
    block = 2 * d * d * trained.given_width + 4 * d * d
    assert cost["blocks"] == pytest.approx(executed * block)
    assert cost["full_depth"] > layers * block
    never = policy_flops(trained, [0.0] * layers + [1.0], ExitPolicy.static(layers, layers))
    assert never["speedup_flops"] == pytest.approx(1.0)


def test_the_original_s_procedure_runs_it_too(trained, batch):
    logits, exits = original_early_exit(trained, batch[0], 2.0)
    assert (exits == trained.n_layers).all()
    torch.testing.assert_close(logits, trained(batch[0]).detach(), rtol=1e-4, atol=1e-5)
