"""When to exit: criteria that score a token at an exit, and policies that compare scores to thresholds.

A criterion reads either the exit's logits, which costs a vocabulary projection at every check, or the
hidden state alone, which costs O(d). Where the most probable word says all that a criterion wants of the
logits, an adaptive output head finds it without most of them. To add a criterion, write its score and
put it into ``CRITERIA``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from earlyexit.atomic import atomic_path
from earlyexit.gates import AGREE, KL, ExitGates
from earlyexit.vocabulary import Unembedding


@dataclass(frozen=True)
class ExitState:
    """What a criterion that reads no logits may look at, for T tokens at one exit.

    Attributes:
        layer: 0-based exit.
        hidden: residual stream after the layer ``(T, D)``.
        previous: residual stream before the layer ``(T, D)``.
        normalised: what the next block reads, LN(hidden) ``(T, D)``; None after the last layer.
        gates: the model's learned gates, if it has any.
    """

    layer: int
    hidden: Tensor
    previous: Tensor
    normalised: Tensor | None = None
    gates: ExitGates | None = None


@dataclass(frozen=True)
class Criterion:
    """One way of judging whether a token's prediction is good enough.

    Attributes:
        name: key in policies, columns and on the command line.
        label: axis label, with the unit.
        reads: ``"logits"`` (score takes logits ``(T, V)``) or ``"state"`` (an :class:`ExitState`).
        score: returns one number per token ``(T,)``, NaN where the criterion has none.
        exit_above: a token exits when its score is ≥ the threshold; otherwise when it is ≤.
        bounds: where a threshold makes sense.
        streak: the score counts exits in a row whose reading stayed the same.
        of_top: the score from the most probable word alone, its log-probability and index ``(T,)`` each,
            where that is enough.
    """

    name: str
    label: str
    reads: Literal["logits", "state"]
    score: Callable[..., Tensor]
    exit_above: bool
    bounds: tuple[float, float]
    streak: bool = False
    of_top: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def never(self) -> float:
        """The threshold that no score reaches."""
        return math.inf if self.exit_above else -math.inf

    @property
    def may_decay(self) -> bool:
        """Whether thresholds that fall with the position are defined (CALM, eq. 5)."""
        return self.exit_above and self.bounds == (0, 1)

    def passes(self, score, threshold):
        """Whether ``score`` (array or tensor) reaches ``threshold``."""
        return score >= threshold if self.exit_above else score <= threshold

    def cheap(self, unembedding: Unembedding) -> bool:
        """Whether a check by logits needs only some of what ``unembedding`` can give."""
        return self.of_top is not None and unembedding.cheap_top

    def of_features(self, unembedding: Unembedding, features: Tensor) -> Tensor:
        """The score ``(T,)`` of a criterion that reads logits, from an exit's features ``(T, D)``."""
        if self.cheap(unembedding):
            return self.of_top(*unembedding.top(features))
        return torch.cat([self.score(logits) for _, logits in unembedding.chunks(features)])


def max_probability(logits: Tensor) -> Tensor:
    """Largest softmax probability, the "softmax response" (Schuster et al. 2022, CALM, §3.4)."""
    return logits.log_softmax(dim=-1).amax(dim=-1).exp()


def margin(logits: Tensor) -> Tensor:
    """Difference of the two largest softmax probabilities."""
    top = logits.log_softmax(dim=-1).topk(2, dim=-1).values.exp()
    return top[..., 0] - top[..., 1]


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the prediction over log V, so 1 is uniform (Teerapittayanon et al. 2016)."""
    log_p = logits.log_softmax(dim=-1)
    nats = -(log_p.exp() * log_p).sum(dim=-1)
    return (nats / math.log(logits.shape[-1])).clamp(0, 1)  # rounding may step over


def saturation(state: ExitState) -> Tensor:
    """Cosine of the hidden states before and after the layer (CALM, §3.4)."""
    return F.cosine_similarity(state.hidden, state.previous, dim=-1).clamp(-1, 1)


def depth(state: ExitState) -> Tensor:
    """The layer's index, so that a threshold k means: every token leaves at layer k."""
    return torch.full_like(state.hidden[..., 0], state.layer)


def gate(state: ExitState) -> Tensor:
    """KL to the last layer that the learned gate predicts, nats."""
    return _gate(state)[:, KL].exp()


def agreement(state: ExitState) -> Tensor:
    """Probability, by the learned gate, that the last layer predicts the same word (CALM, §3.4)."""
    return _gate(state)[:, AGREE].sigmoid()


def _gate(state: ExitState) -> Tensor:
    if state.gates is None or not state.gates.trained:
        raise ValueError("this criterion needs trained gates: see earlyexit.gates.train_gates")
    if state.normalised is None:  # nothing is left to gate after the last layer
        return state.hidden.new_full((len(state.hidden), 2), torch.nan)
    return state.gates(state.layer, state.normalised)


def prediction(logits: Tensor) -> Tensor:
    """Most probable token; patience counts how long it stays (Zhou et al. 2020, PABEE)."""
    return _word(*logits.max(dim=-1))


def _word(value: Tensor, word: Tensor) -> Tensor:
    return torch.where(torch.isfinite(value), word, torch.nan).to(value.dtype)


CRITERIA = {
    c.name: c
    for c in (
        Criterion(
            "max_probability",
            "maximum probability",
            "logits",
            max_probability,
            True,
            (0, 1),
            of_top=lambda log_p, word: log_p.exp(),
        ),
        Criterion("margin", "top-1 minus top-2 probability", "logits", margin, True, (0, 1)),
        Criterion("entropy", "entropy / log V", "logits", entropy, False, (0, 1)),
        Criterion("saturation", "cosine to the layer before", "state", saturation, True, (-1, 1)),
        Criterion("gate", "KL predicted by the gate (nats)", "state", gate, False, (0, math.inf)),
        Criterion("agreement", "agreement predicted by the gate", "state", agreement, True, (0, 1)),
        Criterion(
            "patience",
            "exits in a row that agree",
            "logits",
            prediction,
            True,
            (0, math.inf),
            streak=True,
            of_top=_word,
        ),
        Criterion("depth", "layer", "state", depth, True, (0, math.inf)),
    )
}


@dataclass(frozen=True)
class ExitPolicy:
    """A criterion and a threshold per layer, in the criterion's own units.

    The last layer's threshold saves nothing: it only decides whether a token that ran to the end
    counts as exited there (its index) or as not exited (``n_layers``).

    Attributes:
        criterion: a key of ``CRITERIA``.
        thresholds: one per layer; ``criterion.never`` where no token may exit.
        decay: τ ≥ 0; where it is positive, thresholds fall with the position t in a window of N as
            0.9 λ + 0.1 exp(−τ t / N) (CALM, eq. 5), for criteria that lie in [0, 1] and exit above.

    Raises:
        ValueError: unknown criterion, no threshold, a threshold that is NaN or out of bounds, or a
            decay that is negative or that the criterion does not allow.
    """

    criterion: str
    thresholds: tuple[float, ...]
    decay: float = 0.0

    def __post_init__(self):
        if self.criterion not in CRITERIA:
            raise ValueError(f"unknown criterion {self.criterion!r}; known: {', '.join(CRITERIA)}")
        if not self.thresholds:
            raise ValueError("a policy needs one threshold per layer")
        object.__setattr__(self, "thresholds", tuple(float(t) for t in self.thresholds))
        for threshold in self.thresholds:
            if threshold != self.rule.never:
                check_threshold(threshold, self.rule)
        if not self.decay >= 0 or (self.decay and not self.rule.may_decay):
            raise ValueError(f"decay={self.decay} must be ≥ 0, and 0 for {self.criterion!r}")

    @classmethod
    def constant(cls, threshold: float, n_layers: int, criterion: str = "max_probability"):
        """The same threshold at every layer."""
        return cls(criterion, (threshold,) * n_layers)

    @classmethod
    def static(cls, layer: int, n_layers: int):
        """Every token leaves at ``layer`` whatever it looks like; ``n_layers`` is full depth."""
        threshold = layer if layer < n_layers else math.inf
        return cls.constant(threshold, n_layers, "depth")

    @property
    def rule(self) -> Criterion:
        return CRITERIA[self.criterion]

    def checks(self, layer: int) -> bool:
        """Whether tokens are judged at ``layer``; a streak must see every exit, others skip "never"."""
        return self.rule.streak or self.thresholds[layer] != self.rule.never

    def passes(self, layer: int, scores, progress):
        """Whether scores at ``layer`` pass; ``progress`` is each token's position over n_seq."""
        threshold = self.thresholds[layer]
        if self.decay and threshold != self.rule.never:
            falling = (
                (-self.decay * progress).exp()
                if isinstance(progress, Tensor)
                else np.exp(-self.decay * progress)
            )
            threshold = 0.9 * threshold + 0.1 * falling
        return self.rule.passes(scores, threshold)

    def exit_layers(self, scores: np.ndarray, progress: np.ndarray | float = 0.0) -> np.ndarray:
        """First layer that passes, n_layers where none does.

        Args:
            scores: the criterion at every exit ``(T, L)``.
            progress: position over n_seq ``(T,)``; used by decaying thresholds only.
        """
        if self.decay:
            columns = [self.passes(i, scores[:, i], progress) for i in range(scores.shape[1])]
            passed = np.stack(columns, axis=1)
        else:
            passed = self.rule.passes(scores, np.asarray(self.thresholds, dtype=scores.dtype))
        return np.where(passed.any(axis=1), passed.argmax(axis=1), scores.shape[1])

    def to_dict(self) -> dict:
        """Plain JSON; "never" is null."""
        thresholds = [t if math.isfinite(t) else None for t in self.thresholds]
        return {"criterion": self.criterion, "thresholds": thresholds, "decay": self.decay}

    @classmethod
    def from_dict(cls, data: dict) -> ExitPolicy:
        """What :meth:`to_dict` gave.

        Raises:
            ValueError: a field is missing or unknown, or see the class.
        """
        if set(data) != {"criterion", "thresholds", "decay"} or data["criterion"] not in CRITERIA:
            raise ValueError(f"not an exit policy: {data}")
        never = CRITERIA[data["criterion"]].never
        thresholds = tuple(never if t is None else t for t in data["thresholds"])
        return cls(data["criterion"], thresholds, data["decay"])

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ExitPolicy:
        """Read what :meth:`save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def check_threshold(threshold: float, criterion: Criterion) -> float:
    """The threshold, if it is a number within the criterion's bounds.

    Raises:
        ValueError: otherwise.
    """
    low, high = criterion.bounds
    if low <= threshold <= high:
        return float(threshold)
    raise ValueError(f"threshold {threshold} of {criterion.name!r} must lie in [{low}, {high}]")
