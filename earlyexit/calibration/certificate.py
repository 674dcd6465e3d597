"""A certificate guarantees perplexity: it holds the riskiest policy that a test accepts.

The fit part proposes policies, ordered from safest to riskiest. They are run for real (compacted) on
the certification part, which nothing else reads. A unit's loss is its mean NLL gap to full depth,
clipped from above at a ceiling B fixed beforehand; fixed-sequence testing then accepts policies until
one fails, so the probability that the returned one breaks

    mean over units of min(gap, B) ≤ log(1 + ε)

is at most δ. Units are documents, or, as a labelled alternative, windows; never tokens.

A certificate is bound to what it speaks of: a digest binds its policy, ε and all other fields, and
``check`` compares model, policy, text, split, length of documents and length of windows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from earlyexit.atomic import atomic_path
from earlyexit.calibration.bounds import METHODS, fixed_sequence, smallest_level, upper_bound
from earlyexit.calibration.exit_costs import ExitCosts
from earlyexit.calibration.thresholds import Thresholds, Unreachable, fit_policy
from earlyexit.calibration.trace import ExitTrace
from earlyexit.calibration.unit_losses import Unit, WindowLosses, window_losses
from earlyexit.checked import (
    Checked,
    Count,
    Limit,
    Positive,
    Probability,
    Share,
    exact_fields,
    read_document,
    real,
)
from earlyexit.corpus.corpus import Corpus
from earlyexit.corpus.splits import Split
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy

log = logging.getLogger(__name__)
CEILING = 4.0  # B in multiples of log(1 + ε): a unit that loses more counts as losing that

# Losses that candidates are fitted to, in multiples of ε.
PATH = tuple(k / 10 for k in range(1, 13))

COVERED = ("certify", "test")  # splits that neither the weights nor the candidates were fitted to


class Refused(ValueError):
    """Nothing can be certified; the message says what would be needed."""


@dataclass(frozen=True)
class Certificate(Checked):
    """A certificate says what was certified, of which policy, on which units.

    A changed copy is refused, unless it is made on purpose by ``replace(certificate, …, digest="")``.
    The digest finds slips; it is no signature, and anyone can make another.

    Attributes:
        policy: the certified policy.
        epsilon, delta: tolerated quality loss, and the probability with which it may be broken.
        unit, n: what the units are, and how many there were.
        longest_unit: tokens of the longest unit.
        ceiling: B in nats; clipped_share: share of units above it.
        method: the test; p_value: its p-value for the certified policy.
        bound: upper bound (1 − δ) on the policy's mean clipped loss, nats; only the certified level is
            covered by the family-wise guarantee.
        mean_gap, token_gap: the policy's mean loss over units (unclipped), and over tokens, nats.
        layers: mean layers executed on the certification part, of the model's n_layers.
        smallest_level: the least mean loss that any valid test could certify on so many units if no
            loss were negative, nats.
        candidates, accepted: how many policies were on the path, and how many passed.
        model_hash, data_hash: hashes of the weights and of the text.
        n_seq: length of the windows in which the model read, tokens; 0: not known, nothing is covered.
        cut: length to which documents were cut, tokens; 0: they were whole.
        digest: 16 hexadecimal digits of the SHA-256 of all other fields; "" is filled in.

    Raises:
        ValueError: a field is of a wrong type, impossible or at odds with another, or the digest is of
            other content.
    """

    policy: ExitPolicy
    epsilon: Positive
    delta: Probability
    unit: Unit
    n: Annotated[int, Field(ge=2)]
    longest_unit: Count
    ceiling: Positive
    clipped_share: Share
    method: str
    p_value: Share
    bound: float
    mean_gap: float
    token_gap: float
    layers: Annotated[float, Field(ge=1)]
    n_layers: Count
    smallest_level: float
    candidates: Count
    accepted: Count
    model_hash: str
    data_hash: str
    n_seq: Limit
    cut: Limit
    digest: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        thresholds = len(self.policy.thresholds)
        odd = {
            f"{thresholds} thresholds for n_layers={self.n_layers}": thresholds != self.n_layers,
            f"method={self.method!r}: known are {', '.join(METHODS)}": self.method not in METHODS,
            f"layers={self.layers} of n_layers={self.n_layers}": self.layers > self.n_layers,
            f"accepted={self.accepted} of candidates={self.candidates}": self.accepted
            > self.candidates,
            f"p_value={self.p_value} above delta={self.delta}": self.p_value > self.delta,
        }
        if found := [told for told, wrong in odd.items() if wrong]:
            raise ValueError(f"not a certificate: {'; '.join(found)}")
        if not self.digest:
            object.__setattr__(self, "digest", self._digest())
        self._check_digest()

    @property
    def speedup_layers(self) -> float:
        return self.n_layers / self.layers

    def check(
        self,
        model: EarlyExitModel,
        text: Corpus | Split,
        *,
        policy: ExitPolicy | None = None,
        n_seq: int | None = None,
    ) -> bool:
        """Tell whether the guarantee covers this model on this text.

        It speaks of the mean over documents like those it was made on: drawn from a split in
        ``COVERED``, cut to the same length, and read in windows of the same length.

        Args:
            text: a split as it is read; a corpus stands for its splits in ``COVERED``, cut alike.
            policy: policy that is to run; None: the certified one.
            n_seq: length of the windows in which the text is read; None: the model's.

        Returns:
            True on the text that it was made on; False, with a warning in the log, on another, and on
            a text without ``data_hash``.

        Raises:
            ValueError: the certificate was changed, or it is for another model, policy, split, length
                of documents or length of windows.
        """
        self._check_digest()
        if (found := model.fingerprint()) != self.model_hash:
            raise ValueError(
                f"the certificate is for model {self.model_hash}, not {found}: certify again"
            )
        if policy not in (None, self.policy):
            raise ValueError(f"{policy} is not certified: run certificate.policy, or certify again")
        if (length := model.n_seq if n_seq is None else n_seq) != self.n_seq:
            raise ValueError(
                f"n_seq={length}: the certificate is for windows of {self.n_seq} tokens, read in those"
            )
        if not self.data_hash or text.data_hash != self.data_hash:
            log.warning("another text: the policy runs, but nothing is certified there")
            return False
        if isinstance(text, Split):
            self._check_split(text)
        return True

    def _check_split(self, split: Split) -> None:
        """Raise ValueError unless a split of the certified text is covered as it is cut."""
        if split.name not in COVERED:
            raise ValueError(
                f"split {split.name!r} is not covered: something was fitted to it, or nobody knows; give"
                f" {' or '.join(map(repr, COVERED))}"
            )
        longest = int(split.spans()[1].max(initial=0))
        whole = not split.cut or longest < split.cut
        if split.cut != self.cut and not (whole and (not self.cut or longest <= self.cut)):
            read = f"documents cut to {split.cut}" if split.cut else f"documents of up to {longest}"
            raise ValueError(
                f"{read} tokens: the certificate is for documents "
                + (
                    f"cut to {self.cut}: give split.truncate({self.cut})"
                    if self.cut
                    else "that are whole"
                )
                + ", or certify again on documents cut alike"
            )

    def _content(self) -> dict:
        """Return all fields but the digest, as plain JSON."""
        content = asdict(self) | {"policy": self.policy.to_dict()}
        del content["digest"]
        return content

    def _digest(self) -> str:
        content = json.dumps(self._content(), sort_keys=True, allow_nan=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _check_digest(self) -> None:
        """Raise ValueError if a field was changed after the digest was made."""
        if (found := self._digest()) != self.digest:
            raise ValueError(
                f"the certificate has digest {self.digest!r}, its content {found}: a field was changed"
                " (epsilon, a threshold, …), and what it says now was never tested; certify again"
            )

    def to_json(self) -> str:
        """Return the certificate as JSON."""
        return json.dumps(self._content() | {"digest": self.digest}, indent=2)

    @classmethod
    def from_dict(cls, data: object) -> Certificate:
        """Make the certificate that :meth:`to_json` gave.

        Raises:
            ValueError: a field is missing, unknown or of a wrong type, or the content was changed.
        """
        given = exact_fields(data, cls)
        if not given["digest"]:
            raise ValueError(f"digest={given['digest']!r}: nothing says that it was not changed")
        return cls(**given | {"policy": ExitPolicy.from_dict(given["policy"])})

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_json` to a file."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is no certificate, or was changed; the message names it.
        """
        return read_document(path, cls.from_dict)


def propose(
    trace: ExitTrace,
    epsilons: Sequence[float],
    criterion: str = "gate",
    thresholds: Thresholds = "per_layer",
    costs: ExitCosts | Sequence[float] | None = None,
) -> list[ExitPolicy]:
    """Fit a candidate to each ε on the fit part, and order them safest first.

    This is the proposal of Pareto testing (Laufer-Goldshtein et al. 2023).

    Raises:
        Unreachable: no candidate leaves early.
    """
    found: list[ExitPolicy] = []
    for epsilon in epsilons:
        try:
            policy = fit_policy(trace, criterion, float(epsilon), thresholds, costs)
        except Unreachable as error:
            reason = error
        else:
            if policy not in found:
                found.append(policy)
    if not found:
        raise reason
    return sorted(found, key=lambda policy: trace.evaluate(policy)["quality_loss"])


def certify_losses(
    losses: np.ndarray, epsilon: float, delta: float, method: str = "betting", ceiling: float = 0.0
) -> tuple[int, np.ndarray]:
    """Test candidates in a fixed sequence on unit losses ``(units, candidates)``.

    Returns:
        Index of the riskiest accepted candidate, or −1, and the p-values ``(candidates,)``.

    Raises:
        ValueError: ε ≤ 0, δ is outside (0, 1), there are fewer than two units, or a loss is NaN.
    """
    check_risk(epsilon, delta)
    if losses.shape[0] < 2:
        raise ValueError(f"{losses.shape[0]} units: no test can use fewer than two")
    if np.isnan(losses).any():
        raise ValueError("NaN among the losses: the model's NLL is broken on some unit")
    if method not in METHODS:
        raise ValueError(f"{method=}: known are {', '.join(METHODS)}")
    level, ceiling = math.log1p(epsilon), ceiling or CEILING * math.log1p(epsilon)
    clipped = np.minimum(losses, ceiling)
    p_values = np.array([METHODS[method](x, level, ceiling) for x in clipped.T])
    return fixed_sequence(p_values, delta), p_values


def certify(
    model: EarlyExitModel,
    trace: ExitTrace,
    split: Split,
    eos_id: int,
    *,
    epsilon: float = 0.05,
    delta: float = 0.05,
    criterion: str = "gate",
    thresholds: Thresholds = "per_layer",
    costs: ExitCosts | Sequence[float] | None = None,
    unit: Unit = "document",
    method: str = "betting",
) -> Certificate:
    """Certify the fastest policy that can be certified.

    Args:
        trace: a trace of the fit part, which proposes the candidates.
        split: the certification part, which decides.
        epsilon: tolerated quality loss; delta: probability with which it may be broken.
        criterion, thresholds, costs: see :func:`earlyexit.calibration.thresholds.fit_policy`.
        unit: what a loss is averaged over.
        method: a key of ``METHODS``; the bootstrap is asymptotic only.

    Raises:
        ValueError: ε or δ is out of range, there are fewer than two units, the trace is of another
            model, or the split or the trace may not be used so.
        Unreachable: no candidate within reach of ε leaves early.
        Refused: the safest candidate could not be certified.
    """
    check_risk(epsilon, delta)
    if split.name != "certify":
        raise ValueError(f"certify on the certification part, not on {split.name!r}")
    if trace.split in ("certify", "valid"):
        raise ValueError(
            f"a trace of {trace.split!r} holds documents that certify, and may not propose: give one of"
            " the fit part"
        )
    if trace.model_hash != (fingerprint := model.fingerprint()):
        raise ValueError(f"the trace is of model {trace.model_hash}, not of {fingerprint}")
    policies = propose(trace, epsilon * np.array(PATH), criterion, thresholds, costs)
    losses = window_losses(model, split, eos_id, policies)
    return decide(policies, losses, epsilon, delta, unit, method)


def decide(
    policies: Sequence[ExitPolicy],
    losses: WindowLosses,
    epsilon: float,
    delta: float,
    unit: Unit = "document",
    method: str = "betting",
) -> Certificate:
    """Return the certificate that these losses allow; see :func:`certify`."""
    if losses.split != "certify":
        raise ValueError(
            f"losses on {losses.split!r}: measure them on the certification part, which fits nothing"
        )
    level, ceiling = math.log1p(epsilon), CEILING * math.log1p(epsilon)
    per_unit = losses.per_unit(unit)
    n = len(per_unit)
    index, p_values = certify_losses(per_unit, epsilon, delta, method)
    least = smallest_level(n, delta, ceiling)
    if index < 0:
        clipped = np.minimum(per_unit[:, 0], ceiling)
        raise Refused(
            f"the safest candidate has mean loss {clipped.mean():.4f} nats over {n} {unit}s"
            f" (p = {p_values[0]:.3f} > δ = {delta}); ε = {epsilon:.2%} allows {level:.4f}, and with"
            f" {n} units no test can certify less than {least:.4f}: give more {unit}s, or a larger ε"
        )
    gaps = per_unit[:, index]
    clipped = np.minimum(gaps, ceiling)
    return Certificate(
        policy=policies[index],
        epsilon=float(epsilon),
        delta=float(delta),
        unit=unit,
        n=n,
        longest_unit=losses.longest(unit),
        ceiling=ceiling,
        clipped_share=float((gaps > ceiling).mean()),
        method=method,
        p_value=float(p_values[index]),
        bound=upper_bound(clipped, delta, ceiling, method),
        mean_gap=float(gaps.mean()),
        token_gap=float(losses.per_token[index]),
        layers=float(losses.layers[index]),
        n_layers=losses.n_layers,
        smallest_level=least,
        candidates=len(policies),
        accepted=index + 1,
        model_hash=losses.model_hash,
        data_hash=losses.data_hash,
        n_seq=losses.n_seq,
        cut=losses.cut,
    )


def check_risk(epsilon: float, delta: float) -> None:
    """Raise TypeError or ValueError unless ε > 0 and δ lies in (0, 1)."""
    real("epsilon", epsilon, above=0)
    real("delta", delta, above=0, below=1)
