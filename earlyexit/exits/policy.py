"""A policy decides when tokens exit: it compares a criterion's scores to one threshold per layer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import Field
from torch import Tensor

from earlyexit.atomic import atomic_path
from earlyexit.checked import TINY, Checked, Weight, real, whole
from earlyexit.exits.criteria import CRITERIA, Criterion

T = TypeVar("T")


@dataclass(frozen=True)
class ExitPolicy:
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
        TypeError: a field is of another type.
        ValueError: the criterion is unknown, there is no threshold, a threshold is NaN or out of
            bounds, or the decay is negative, infinite or not allowed for the criterion.
    """

    criterion: str
    thresholds: tuple[float, ...]
    decay: float = 0.0
    model_hash: str = field(default="", compare=False)

    def __post_init__(self):
        known_criterion(self.criterion)
        given = self.thresholds
        if not isinstance(given, Iterable) or isinstance(given, str):
            raise TypeError(f"thresholds={given!r:.60}: must be a list of numbers, one per layer")
        object.__setattr__(self, "thresholds", tuple(check_threshold(t, self.rule) for t in given))
        if not self.thresholds:
            raise ValueError("a policy needs one threshold per layer")
        object.__setattr__(self, "decay", real("decay", self.decay, above=-TINY))
        if not isinstance(self.model_hash, str):
            raise TypeError(
                f"model_hash={self.model_hash!r:.60}: must be text, a model's fingerprint"
            )
        if self.decay and not self.rule.may_decay:
            raise ValueError(f"decay={self.decay} must be 0 for {self.criterion!r}")

    @classmethod
    def constant(cls, threshold: float, n_layers: int, criterion: str = "max_probability"):
        """Make a policy with the same threshold at every layer."""
        return cls(criterion, (threshold,) * whole("n_layers", n_layers, 1))

    @classmethod
    def static(cls, layer: int, n_layers: int):
        """Make a policy by which every token leaves at ``layer``; ``n_layers`` is full depth."""
        threshold = whole("layer", layer) if layer != n_layers else math.inf
        if threshold != math.inf and threshold > n_layers:
            raise ValueError(f"layer={layer}: must be ≤ n_layers={n_layers}, which is full depth")
        return cls.constant(threshold, n_layers, "depth")

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
        anyone = {"model_hash": ""} if isinstance(data, dict) else {}
        form = _Form(**exact_fields(anyone | data if anyone else data, _Form))
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


def exact_fields(data: object, kind: type) -> dict[str, Any]:
    """Return a JSON object that has the fields of a dataclass, no more and no fewer.

    Raises:
        ValueError: it is no object, or fields are missing or unknown; the message names them.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{data!r:.80} is not a JSON object with named fields")
    names = {field.name for field in fields(kind)}
    wrong = {"missing": sorted(names - set(data)), "unknown": sorted(set(data) - names)}
    if told := "; ".join(
        f"{what}: {', '.join(map(str, some))}" for what, some in wrong.items() if some
    ):
        raise ValueError(f"fields {told}")
    return data


def read_document(path: str | Path, make: Callable[[object], T]) -> T:
    """Read a JSON file, and make of it what ``make`` does.

    Raises:
        ValueError: the file holds no JSON, or ``make`` refuses it; the message names the file.
    """
    try:
        return make(json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def known_criterion(name: object) -> Criterion:
    """Return the criterion of this name.

    Raises:
        ValueError: there is none.
    """
    if isinstance(name, str) and name in CRITERIA:
        return CRITERIA[name]
    raise ValueError(f"unknown criterion {name!r:.60}; known: {', '.join(CRITERIA)}")


def check_threshold(threshold: float, criterion: Criterion) -> float:
    """Return the threshold if it lies within the criterion's bounds, or is one that no score reaches.

    Raises:
        TypeError: it is no number.
        ValueError: it does not.
    """
    low, high = criterion.bounds
    if isinstance(threshold, (str, bool)) or not hasattr(threshold, "__float__"):
        raise TypeError(f"threshold {threshold!r:.60} of {criterion.name!r}: must be a number")
    if (threshold := float(threshold)) == criterion.never or low <= threshold <= high:
        return threshold
    raise ValueError(f"threshold {threshold} of {criterion.name!r} must lie in [{low}, {high}]")
