"""Shared by the tests: a small model whose tokens really exit, and a corpus made without a text."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, models
from torch import Tensor

from earlyexit.corpus.corpus import Corpus
from earlyexit.corpus.documents import CorpusConfig
from earlyexit.corpus.splits import Split
from earlyexit.exits.criteria import CRITERIA, ExitState
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.runs.workers import JOBS

os.environ.setdefault(JOBS, "1")  # the tests themselves run side by side
torch.set_num_threads(1)  # on tensors this small a second thread only gets in the way

settings.register_profile("fuzz", max_examples=2_000)  # `make fuzz`; the usual number is 100

DATA_HASH = "0" * 64
VOCABULARY = 53  # a width that no other matrix has, so that projections to it can be counted
SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "n_layers": 3,
    "n_seq": 12,
    "num_experts": 4,
    "bk_heads": 4,
    "gate_hidden": 0,
}
# Seconds of a unit of each amount of work, of a machine that does not exist.
PRICES = {
    "blocks": {"launches": 2e-5, "expert_flops": 2e-11, "bytes": 1e-10, "steps": 1e-8},
    "head": {"flops": 2e-11, "logits": 3e-9},
    "check": {"launches": 9e-5, "bytes": 2e-10},
    "projected check": {"flops": 3e-11, "logits": 4e-9},
    "top check": {"flops": 5e-11, "logits": 2e-9},
    "propagation": {"launches": 1e-4, "flops": 4e-11},
    "gather/scatter": {"launches": 4e-5, "bytes": 2e-10},
    "rest": {"run": 1e-4},
}


# Files in the order of their time. Each worker begins with one of the first two and holds one more,
# which waits behind the longest: a short one.
SLOWEST = [
    *("test_notebooks.py", "test_readme_commands.py", "test_tables.py", "test_runner.py"),
    *("test_workflow.py", "test_reference_numbers.py", "test_workers.py", "test_study.py"),
    *("test_stages.py", "test_command_line.py", "test_parallel.py", "test_probe.py"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that both workers end together."""
    rank = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def fuzz(examples: int) -> settings:
    """Try so many examples, the same ones each time; with the profile "fuzz" 20 times as many others."""
    times = settings.default.max_examples // settings.get_profile("default").max_examples
    return settings(
        max_examples=examples * times,
        deadline=None,
        derandomize=times == 1,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


@pytest.fixture(scope="session")
def make_model() -> Callable[..., EarlyExitLanguageModel]:
    """``make_model(seed=0, **changes)``: noise on every weight, predictions of every confidence."""

    def make(seed: int = 0, **changes) -> EarlyExitLanguageModel:
        torch.manual_seed(seed)
        model = EarlyExitLanguageModel(**SIZES | changes)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.15 * torch.randn_like(parameter)
            for block in model.blocks:
                block.exit_classifier.layer_norm.weight.mul_(3)
            if model.gates is not None:  # their weights are noise, but noise of the hidden state
                model.gates.trained.fill_(True)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_tokens() -> Callable[..., Tensor]:
    """``make_tokens(B, N, seed=0)``: token ids."""

    def make(batch: int, length: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + seed)
        return torch.randint(VOCABULARY, (batch, length), generator=generator)

    return make


def exit_state(model: EarlyExitLanguageModel, layer: int, hidden, previous) -> ExitState:
    """What a criterion may look at after ``layer``, states ``(T, D)``."""
    last = layer == model.n_layers - 1
    normalised = None if last else model.blocks[layer + 1].layer_norm(hidden)
    return ExitState(layer, hidden, previous, normalised, model.gates)


@torch.no_grad()
def full_depth_scores(model: EarlyExitLanguageModel, x: Tensor, criterion: str) -> Tensor:
    """A criterion that counts no streak, at every exit of full-depth states ``(T, L)``."""
    states, rule = [h.flatten(0, 1) for h in model.hidden_states(x)], CRITERIA[criterion]
    columns = []
    for layer, block in enumerate(model.blocks):
        state = exit_state(model, layer, states[layer + 1], states[layer])
        logits = rule.reads == "logits"
        columns.append(rule.score(block.exit_classifier(state.hidden) if logits else state))
    return torch.stack(columns, dim=1)


def future_jacobian(model, x, outputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest |∂ output_i / ∂ embedding_j| over j > i, and over j ≤ i, of one window."""
    embedded = model.embed(x).detach()
    model.embed = lambda _: embedding  # the network behind the embedding, as a function
    future, past = torch.zeros(()), torch.zeros(())
    for i in range(x.shape[1]):
        embedding = embedded.clone().requires_grad_()
        (grad,) = torch.autograd.grad(outputs(x)[0, i].square().sum(), embedding)
        future = max(future, grad[0, i + 1 :].abs().sum())
        past = max(past, grad[0, : i + 1].abs().sum())
    del model.embed
    return future, past


@pytest.fixture(scope="session")
def make_policy() -> Callable[..., ExitPolicy]:
    """``make_policy(model, x, criterion, share)``: at each exit about ``share`` of all tokens pass."""

    def make(model, x, criterion: str = "max_probability", share: float = 0.4) -> ExitPolicy:
        rule = CRITERIA[criterion]
        if rule.streak:
            return ExitPolicy.constant(1, model.n_layers, criterion)
        scores = full_depth_scores(model, x, criterion).double().numpy()
        tail = 1 - share if rule.exit_above else share
        # Beside every score rather than on one, so that rounding decides nothing.
        thresholds = np.quantile(scores, tail, axis=0, method="midpoint") - 1e-7
        thresholds = np.where(np.isnan(thresholds), rule.never, np.clip(thresholds, *rule.bounds))
        return ExitPolicy(criterion, tuple(thresholds))

    return make


def make_split(name: str, documents: int, length: int, seed: int, vocabulary: int) -> Split:
    """Documents that count up in steps of 1 … 3, which a model can learn."""
    rng = np.random.default_rng(seed)
    words = vocabulary - 2  # 0 and 1 are <unk> and <eos>
    start, step = rng.integers(words, size=documents), rng.integers(1, 4, size=documents)
    ids = 2 + (start[:, None] + step[:, None] * np.arange(length)) % words
    document = np.repeat(np.arange(documents), length) + 1000 * seed
    return Split(
        name,
        ids.ravel().astype(np.int32),
        document.astype(np.int32),
        np.full(ids.size, 3, np.int32),
        DATA_HASH,
    )


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """Arithmetic progressions: 40 training documents of 30 tokens, 7 of 29 in the other splits."""
    words = {w: i for i, w in enumerate(["<unk>", "<eos>", *map(str, range(VOCABULARY - 2))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    splits = {
        name: make_split(name, 40 if name == "train" else 7, 30 - (name != "train"), i, VOCABULARY)
        for i, name in enumerate(("train", "fit", "certify", "valid", "test"))
    }
    return Corpus(CorpusConfig(), tokenizer, splits, DATA_HASH)
