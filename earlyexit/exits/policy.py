"""A policy decides when tokens exit: it compares a criterion's scores to one threshold per layer."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from earlyexit.atomic import atomic_path
from earlyexit.checked import Checked, Weight, brief, exact_fields, read_document, whole
from earlyexit.exits.criteria import CRITERIA, Criterion

MANY = 1_000_000  # layers: more thresholds than any model has
Extended = Annotated[float, Field(allow_inf_nan=True)]


@dataclass(frozen=True)
class ExitPolicy(Checked):
    """A policy is a criterion and a threshold per layer, in the criterion's own units.

    The last layer's threshold saves nothing: it only decides whether a token that ran to the end
    counts as exited there (its index) or as not exited (``n_layers``).

    Attributes:
        criterion: a key of ``CRITERIA``.
        thresholds: one per layer; ``criterion.never`` where no token may exit.
        decay: τ ≥ 0; where it is positive, thresholds fall with the position t in a window of N as
            0.9 λ + 0.1 exp(−τ t / N) (CALM, eq. 5), for criteria that lie in [0, 1] and exit above.
        model_hash: fingerprint of the model that the policy was fitted for, which alone runs it; "":
            any model. It takes no part in comparisons.

    Raises:
        ValueError: the criterion is unknown, there is no threshold, a threshold is no number, NaN or
            out of bounds, or the decay is negative, infinite or not allowed for the criterion.
    """

    criterion: str
    thresholds: tuple[Extended, ...]
    decay: Weight = 0.0
    model_hash: str = field(default="", compare=False)

    def __post_init__(self):
        object.__setattr__(self, "thresholds", _numbers(self.thresholds))
        super().__post_init__()
        known_criterion(self.criterion)
        for threshold in self.thresholds:
            if threshold != self.rule.never:
                check_threshold(threshold, self.rule)
        if self.decay and not self.rule.may_decay:
            raise ValueError(f"decay={self.decay} must be 0 for {self.criterion!r}")

    @classmethod
    def constant(cls, threshold: float, n_layers: int, criterion: str = "max_probability"):
        """Make a policy with the same threshold at every layer."""
        return cls(criterion, (threshold,) * whole("n_layers", n_layers, 1, MANY))

    @classmethod
    def static(cls, layer: int, n_layers: int):
        """Make a policy by which every token leaves at ``layer``; ``n_layers`` is full depth."""
        whole("layer", layer, high=whole("n_layers", n_layers, 1, MANY))
        return cls.constant(layer if layer < n_layers else math.inf, n_layers, "depth")

    @property
    def rule(self) -> Criterion:
        return CRITERIA[self.criterion]

    def checks(self, layer: int) -> bool:
        """Tell whether tokens are judged at ``layer``: where some may exit, and for a streak always."""
        return self.rule.streak or self.thresholds[layer] != self.rule.never

    def passes(self, layer: int, scores, progress):
        """Tell which scores at ``layer`` pass; ``progress`` is each token's position over n_seq."""
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
        """Return the first layer at which each token passes ``(T,)``, n_layers where there is none.

        Args:
            scores: the criterion's scores at every exit ``(T, L)``.
            progress: position over n_seq ``(T,)``; used by decaying thresholds only.
        """
        if self.decay:
            columns = [self.passes(i, scores[:, i], progress) for i in range(scores.shape[1])]
            passed = np.stack(columns, axis=1)
        else:
            passed = self.rule.passes(scores, np.asarray(self.thresholds, dtype=scores.dtype))
        return np.where(passed.any(axis=1), passed.argmax(axis=1), scores.shape[1])

    def to_dict(self) -> dict:
        """Return the policy as plain JSON, with null for a threshold that no score reaches.

        Raises:
            ValueError: a threshold is infinite that every score reaches; JSON has no word for it.
        """
        thresholds = [None if t == self.rule.never else t for t in self.thresholds]
        if -self.rule.never in thresholds:
            raise ValueError(
                f"threshold {-self.rule.never} of {self.criterion!r} cannot be saved: give a finite one"
            )
        plain = {"criterion": self.criterion, "thresholds": thresholds, "decay": self.decay}
        return plain | ({"model_hash": self.model_hash} if self.model_hash else {})

    @classmethod
    def from_dict(cls, data: object) -> ExitPolicy:
        """Make the policy that :meth:`to_dict` gave.

        Raises:
            ValueError: a field is missing, unknown or of a wrong type, or the class refuses its value.
        """
        if isinstance(data, dict):
            data = {"model_hash": ""} | data  # not written where any model may run it
        form = _Form(**exact_fields(data, _Form))
        never = known_criterion(form.criterion).never
        thresholds = tuple(never if t is None else t for t in form.thresholds)
        return cls(form.criterion, thresholds, form.decay, form.model_hash)

    def save(self, path: str | Path) -> None:
        """Write the policy as JSON."""
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ExitPolicy:
        """Read what :meth:`save` wrote."""
        return read_document(path, cls.from_dict)


@dataclass(frozen=True)
class _Form(Checked):
    """This is a policy as it stands in JSON; null is a threshold that no score reaches."""

    criterion: str
    thresholds: Annotated[tuple[float | None, ...], Field(strict=False, min_length=1)]
    decay: Weight
    model_hash: str


def known_criterion(name: object) -> Criterion:
    """Return the criterion of this name.

    Raises:
        ValueError: there is none.
    """
    if isinstance(name, str) and name in CRITERIA:
        return CRITERIA[name]
    raise ValueError(f"unknown criterion {brief(name)}; known: {', '.join(CRITERIA)}")


def check_threshold(threshold: float, criterion: Criterion) -> float:
    """Return the threshold if it lies within the criterion's bounds.

    Raises:
        TypeError: it is no number.
        ValueError: it does not.
    """
    low, high = criterion.bounds
    if isinstance(threshold, (str, bool)) or not hasattr(threshold, "__float__"):
        raise TypeError(f"threshold {brief(threshold)} of {criterion.name!r}: must be a number")
    if low <= threshold <= high:
        return float(threshold)
    raise ValueError(f"threshold {threshold} of {criterion.name!r} must lie in [{low}, {high}]")


def _numbers(thresholds: object) -> tuple[float, ...]:
    """Return thresholds as floats: of a list, a tuple, an array or a tensor of numbers ``(L,)``.

    Raises:
        ValueError: there is none, or one is no number.
    """
    try:
        values = np.asarray(thresholds)
    except (ValueError, TypeError, RuntimeError):  # ragged, or a tensor on another device
        values = np.asarray(None)
    if values.dtype.kind not in "fiu" or values.ndim != 1 or not values.size:
        raise ValueError(f"thresholds={thresholds!r:.80}: must be a number for each layer")
    return tuple(values.astype(float).tolist())


def check_policy(policy: ExitPolicy, n_layers: int) -> None:
    """Raise TypeError for what is no policy, ValueError for a policy of another depth."""
    if not isinstance(policy, ExitPolicy):
        raise TypeError(f"policy={brief(policy)}: give an ExitPolicy")
    if len(policy.thresholds) != n_layers:
        raise ValueError(
            f"the policy has {len(policy.thresholds)} thresholds, the model {n_layers} layers"
        )
