"""The fastest policy is certified that a test accepts: fixed-sequence testing on unit losses.

The fit part proposes policies, ordered from safest to riskiest. They are run for real (compacted) on
the certification part, which nothing else reads. A unit's loss is its mean NLL gap to full depth,
clipped from above at a ceiling B that the fit part chose; fixed-sequence testing then accepts policies
until one fails, so the probability that the returned one breaks

    mean over units of min(gap, B) ≤ log(1 + ε)

is at most δ, for each ε by itself, where units are independent draws from one source. Units are
documents, or, as a labelled alternative, windows; never tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import get_args

import numpy as np

from earlyexit.calibration.bounds import METHODS, fixed_sequence, smallest_level, upper_bound
from earlyexit.calibration.certificate import Certificate
from earlyexit.calibration.exit_costs import ExitCosts
from earlyexit.calibration.power import ceilings, chosen_ceiling
from earlyexit.calibration.thresholds import Thresholds, Unreachable, fit_policy
from earlyexit.calibration.trace import ExitTrace
from earlyexit.calibration.unit_losses import Unit, WindowLosses, traced_losses, window_losses
from earlyexit.checked import brief, real
from earlyexit.corpus.splits import Split
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy

# Losses that candidates are fitted to, in multiples of ε.
PATH = tuple(k / 10 for k in range(1, 13))


class Refused(ValueError):
    """Nothing can be certified; the message says what would be needed."""


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
    losses: np.ndarray, epsilon: float, delta: float, ceiling: float, method: str = "betting"
) -> tuple[int, np.ndarray]:
    """Test candidates in a fixed sequence on unit losses ``(units, candidates)``.

    Args:
        ceiling: B over log(1 + ε).

    Returns:
        Index of the riskiest accepted candidate, or −1, and the p-values ``(candidates,)``.

    Raises:
        ValueError: ε ≤ 0, δ is outside (0, 1), the ceiling is ≤ 1, there are fewer than two units, or
            a loss is NaN.
    """
    check_risk(epsilon, delta)
    if not ceiling > 1:
        raise ValueError(
            f"ceiling={ceiling} must be > 1: at or below what ε allows it says nothing"
        )
    if losses.shape[0] < 2:
        raise ValueError(f"{losses.shape[0]} units: no test can use fewer than two")
    if np.isnan(losses).any():
        raise ValueError("NaN among the losses: the model's NLL is broken on some unit")
    _known("method", method, METHODS)
    level = math.log1p(epsilon)
    ceiling *= level
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
    _known("unit", unit, get_args(Unit))
    _known("method", method, METHODS)
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
    expected = traced_losses(trace, policies, losses.unit_length(unit))
    ceiling = chosen_ceiling(ceilings(expected, epsilon, delta, losses.count(unit)))
    return decide(policies, losses, epsilon, delta, ceiling, unit, method)


def decide(
    policies: Sequence[ExitPolicy],
    losses: WindowLosses,
    epsilon: float,
    delta: float,
    ceiling: float,
    unit: Unit = "document",
    method: str = "betting",
) -> Certificate:
    """Return the certificate that these losses allow; see :func:`certify`.

    Args:
        ceiling: B over log(1 + ε), chosen without these losses by
            :func:`earlyexit.calibration.power.ceilings`.
    """
    if losses.split != "certify":
        raise ValueError(
            f"losses on {losses.split!r}: measure them on the certification part, which fits nothing"
        )
    level, per_unit = math.log1p(epsilon), losses.per_unit(unit)
    n = len(per_unit)
    index, p_values = certify_losses(per_unit, epsilon, delta, ceiling, method)
    ceiling *= level
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


def _known(name: str, value: object, known: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={brief(value)}: choose {' or '.join(map(repr, known))}")


def check_risk(epsilon: float, delta: float) -> None:
    """Raise TypeError or ValueError unless ε > 0 and δ lies in (0, 1)."""
    real("epsilon", epsilon, above=0)
    real("delta", delta, above=0, below=1)
