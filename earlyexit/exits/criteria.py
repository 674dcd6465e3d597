"""Criteria: how a token is scored at an exit, and what a score costs.

A criterion reads either the exit's logits, which costs a vocabulary projection at every check, or the
hidden state alone, which costs O(d). Where the most probable word says all that a criterion wants of the
logits, an adaptive output head finds it without most of them. To add a criterion, write its score and
put it into ``CRITERIA``, with what it costs and needs: nothing else knows criteria by name.
CALM is Schuster et al. 2022, Confident Adaptive Language Modeling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from earlyexit.exits.operations import Operations
from earlyexit.nn.gates import AGREE, KL, ExitGates
from earlyexit.nn.unembedding import Unembedding


@dataclass(frozen=True)
class ExitState:
    """The states that a criterion may look at when it reads no logits, of T tokens at one exit.

    Attributes:
        layer: 0-based exit.
        hidden: residual stream after the layer ``(T, D)``.
        previous: residual stream before the layer ``(T, D)``; None where nothing keeps it.
        normalised: what the next block reads, LN(hidden) ``(T, D)``; None after the last layer.
        gates: the model's learned gates, if it has any.
    """

    layer: int
    hidden: Tensor
    previous: Tensor | None
    normalised: Tensor | None = None
    gates: ExitGates | None = None


def inner_product(model: Operations) -> float:
    """Count the FLOPs of one inner product with a state."""
    return 2 * model.width


@dataclass(frozen=True)
class Criterion:
    """A criterion is one way of judging whether a token's prediction is good enough.

    Attributes:
        name: key in policies, columns and on the command line.
        label: axis label, with the unit.
        reads: ``"logits"`` (score takes logits ``(T, V)``) or ``"state"`` (an :class:`ExitState`).
        score: returns one number per token ``(T,)``, NaN where the criterion has none.
        exit_above: a token exits when its score is ≥ the threshold; otherwise when it is ≤.
        bounds: where a threshold makes sense.
        streak: the score counts exits in a row whose reading stayed the same.
        looks_back: whether a score of the state reads ``previous``; where tokens are decided in groups,
            earlier states are kept only then.
        of_top: the score from the most probable word alone, its log-probability and index ``(T,)`` each,
            where that is enough.
        flops: of a check of the state per token, given the model's operations. A check of logits costs
            what the head costs.
        states_moved: tensors ``(T, D)`` that a check of the state reads or writes.
        needs_gates: whether it is defined for models with trained gates only.
        derived: whether an exit trace has it without a column of its own.
    """

    name: str
    label: str
    reads: Literal["logits", "state"]
    score: Callable[..., Tensor]
    exit_above: bool
    bounds: tuple[float, float]
    streak: bool = False
    of_top: Callable[[Tensor, Tensor], Tensor] | None = None
    looks_back: bool = True
    flops: Callable[[Operations], float] = inner_product
    states_moved: int = 1
    needs_gates: bool = False
    derived: bool = False

    @property
    def history(self) -> bool:
        """Tell whether a check needs what earlier exits saw."""
        return self.streak or (self.reads == "state" and self.looks_back)

    @property
    def never(self) -> float:
        """The threshold that no score reaches."""
        return math.inf if self.exit_above else -math.inf

    @property
    def may_decay(self) -> bool:
        """Tell whether thresholds that fall with the position are defined (CALM, eq. 5)."""
        return self.exit_above and self.bounds == (0, 1)

    @property
    def wants(self) -> Literal["top", "all"]:
        """What a check of logits wants of them: the most probable word, or all probabilities."""
        return "all" if self.of_top is None else "top"

    def read_by_check(self, model: Operations) -> bool:
        """Tell whether a check makes all logits, so that an exit's prediction is read from them."""
        return self.reads == "logits" and not (self.wants == "top" and model.cheap_top)

    def passes(self, score, threshold):
        """Tell whether ``score`` (array or tensor) reaches ``threshold``."""
        return score >= threshold if self.exit_above else score <= threshold

    def cheap(self, unembedding: Unembedding) -> bool:
        """Tell whether a check by logits needs only some of what ``unembedding`` can give."""
        return self.of_top is not None and unembedding.cheap_top

    def of_features(self, unembedding: Unembedding, features: Tensor) -> Tensor:
        """Score an exit's features ``(T, D)`` by a criterion that reads logits: ``(T,)``."""
        if self.cheap(unembedding):
            return self.of_top(*unembedding.top(features))
        return torch.cat([self.score(logits) for _, logits in unembedding.chunks(features)])


def max_probability(logits: Tensor) -> Tensor:
    """Return the largest softmax probability, the "softmax response" (CALM, §3.4)."""
    return logits.log_softmax(dim=-1).amax(dim=-1).exp()


def margin(logits: Tensor) -> Tensor:
    """Return the difference of the two largest softmax probabilities."""
    top = logits.log_softmax(dim=-1).topk(2, dim=-1).values.exp()
    return top[..., 0] - top[..., 1]


def entropy(logits: Tensor) -> Tensor:
    """Return the prediction's entropy over log V, so 1 is uniform (Teerapittayanon et al. 2016)."""
    log_p = logits.log_softmax(dim=-1)
    nats = -(log_p.exp() * log_p).sum(dim=-1)
    return (nats / math.log(logits.shape[-1])).clamp(0, 1)  # rounding may step over


def saturation(state: ExitState) -> Tensor:
    """Return the cosine of the states before and after the layer (CALM, §3.4)."""
    return F.cosine_similarity(state.hidden, state.previous, dim=-1).clamp(-1, 1)


def depth(state: ExitState) -> Tensor:
    """Return the layer's index, so that a threshold k means: every token leaves at layer k."""
    return torch.full_like(state.hidden[..., 0], state.layer)


def gate(state: ExitState) -> Tensor:
    """Return the KL to the last layer that the learned gate predicts, in nats."""
    return _gate(state)[:, KL].exp()


def agreement(state: ExitState) -> Tensor:
    """Return the gate's probability that the last layer predicts the same word (CALM, §3.4)."""
    return _gate(state)[:, AGREE].sigmoid()


def _gate(state: ExitState) -> Tensor:
    if state.gates is None or not state.gates.trained:
        raise ValueError(
            "this criterion needs trained gates: see earlyexit.training.gates.train_gates"
        )
    if state.normalised is None:  # nothing is left to gate after the last layer
        return state.hidden.new_full((len(state.hidden), 2), torch.nan)
    return state.gates(state.layer, state.normalised)


def prediction(logits: Tensor) -> Tensor:
    """Return the most probable token; patience counts how long it stays (Zhou et al. 2020, PABEE)."""
    return _word(*logits.max(dim=-1))


def _word(value: Tensor, word: Tensor) -> Tensor:
    return torch.where(torch.isfinite(value), word, torch.nan).to(value.dtype)


CRITERIA = {
    c.name: c
    for c in (
        Criterion(
            "max_probability", "maximum probability", "logits", max_probability, True, (0, 1),
            of_top=lambda log_p, word: log_p.exp(),
        ),
        Criterion("margin", "top-1 minus top-2 probability", "logits", margin, True, (0, 1)),
        Criterion("entropy", "entropy / log V", "logits", entropy, False, (0, 1)),
        Criterion(
            "saturation", "cosine to the layer before", "state", saturation, True, (-1, 1),
            flops=lambda model: 3 * inner_product(model), states_moved=3,
        ),
        Criterion(
            "gate", "KL predicted by the gate (nats)", "state", gate, False, (0, math.inf),
            looks_back=False, flops=lambda model: model.gate, needs_gates=True,
        ),
        Criterion(
            "agreement", "agreement predicted by the gate", "state", agreement, True, (0, 1),
            looks_back=False, flops=lambda model: model.gate, needs_gates=True,
        ),
        Criterion(
            "patience", "exits in a row that agree", "logits", prediction, True, (0, math.inf),
            streak=True, of_top=_word, derived=True,
        ),
        Criterion(
            "depth", "layer", "state", depth, True, (0, math.inf),
            looks_back=False, flops=lambda model: 0, states_moved=0, derived=True,
        ),
    )
}  # fmt: skip
