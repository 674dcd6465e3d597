"""Tabulate certificates, their candidates, bounds and audits, and their transfer to another text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd

from earlyexit.calibration.audit import audit, synthetic_units, width_table
from earlyexit.calibration.bounds import smallest_level
from earlyexit.calibration.certificate import CEILING, Certificate, Refused, decide
from earlyexit.calibration.thresholds import Unreachable
from earlyexit.calibration.trace import ExitTrace
from earlyexit.calibration.unit_losses import Unit, WindowLosses, window_losses
from earlyexit.corpus.splits import Split
from earlyexit.evaluation.compare import fitted_policy, run_row
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy

UNITS: tuple[Unit, ...] = ("document", "window")
SIZES = (10, 30, 100, 300, 1000)  # numbers of units for which the widths of bounds are shown
SYNTHETIC_UNITS, SYNTHETIC_SIZES = 20_000, (30, 100, 500, 2000)  # in all, and in each audit
FACTS = ("n", "bound", "mean_gap", "token_gap", "clipped_share", "smallest_level")
Certificates = dict[tuple[float, Unit], Certificate | Refused]


def candidate_table(
    trace: ExitTrace, policies: Sequence[ExitPolicy], losses: WindowLosses
) -> pd.DataFrame:
    """Tabulate the losses of the candidates per unit.

    Args:
        trace: trace of the fit part, on which the policies were fitted.
        losses: losses on the certification part.

    Returns:
        Columns unit, n, candidate, fit_quality_loss, mean_gap, sd_gap and worst_gap (nats), layers.
    """
    table = pd.DataFrame(
        {
            "candidate": range(len(policies)),
            "fit_quality_loss": [trace.evaluate(policy)["quality_loss"] for policy in policies],
            "layers": losses.layers,
        }
    )
    parts = []
    for unit in UNITS:
        gaps = losses.per_unit(unit)
        mean, sd, worst = gaps.mean(axis=0), gaps.std(axis=0, ddof=1), gaps.max(axis=0)
        columns = {"unit": unit, "n": len(gaps), "mean_gap": mean, "sd_gap": sd, "worst_gap": worst}
        parts.append(table.assign(**columns))
    order = ["unit", "n", "candidate", "fit_quality_loss", "mean_gap", "sd_gap", "worst_gap"]
    return pd.concat(parts, ignore_index=True)[[*order, "layers"]]


def certify_each(
    policies: Sequence[ExitPolicy],
    losses: WindowLosses,
    epsilons: Sequence[float],
    delta: float,
) -> Certificates:
    """Return by (ε, unit) the certificate that the losses allow, or the reason for a refusal."""
    return {
        (epsilon, unit): _or_reason(decide, policies, losses, epsilon, delta, unit)
        for epsilon, unit in product(epsilons, UNITS)
    }


def certificate_table(
    model: EarlyExitModel,
    trace: ExitTrace,
    certificates: Certificates,
    criterion: str,
    loader: Iterable,
) -> pd.DataFrame:
    """Run, for each ε, the certified policies and one that is fitted without a certificate.

    Args:
        trace: trace of the fit part.
        certificates: the certificates that :func:`certify_each` returns.
        loader: batches of the test split.

    Returns:
        Columns epsilon, level (log(1 + ε)), policy, ``FACTS`` of certificates, test_quality_loss and
        test_speedup_layers; and reason, if there is no policy.
    """
    full, rows = run_row(model, None, loader)["perplexity"], []
    for epsilon in dict.fromkeys(epsilon for epsilon, _ in certificates):
        found = {
            "fitted, no certificate": _or_reason(fitted_policy, model, trace, criterion, epsilon)
        }
        for unit in UNITS:
            found[f"certified by {unit}"] = certificates[epsilon, unit]
        for name, policy in found.items():
            row = {"epsilon": epsilon, "level": math.log1p(epsilon), "policy": name}
            if isinstance(policy, Exception):
                rows.append(row | {"reason": str(policy)})
                continue
            if isinstance(policy, Certificate):
                row |= {fact: getattr(policy, fact) for fact in FACTS}
                policy = policy.policy
            real = run_row(model, policy, loader, full)
            names = ("quality_loss", "speedup_layers")
            rows.append(row | {f"test_{name}": real[name] for name in names})
    return pd.DataFrame(rows)


def _or_reason(function: Callable, *arguments):
    """Return the function's result, or the exception that says why there is no such policy."""
    try:
        return function(*arguments)
    except (Refused, Unreachable) as error:
        return error


def bound_widths(
    losses: np.ndarray, epsilon: float, delta: float, repeats: int = 3
) -> pd.DataFrame:
    """Compute upper bounds on one candidate's mean loss, by every method, on n resampled units.

    The candidate is the one whose mean loss is nearest to half of the level log(1 + ε).

    Args:
        losses: mean gap of each unit ``(units, candidates)``.

    Returns:
        Columns method, n, mean, bound, with ``repeats`` rows per method and n; n is each of ``SIZES``
        and the number of units.
    """
    level, ceiling = math.log1p(epsilon), CEILING * math.log1p(epsilon)
    k = int(np.argmin(np.abs(losses.mean(axis=0) - level / 2)))
    rng = np.random.default_rng(0)
    parts = [
        width_table(rng.choice(losses[:, k], n), delta, ceiling)
        for n in sorted({*SIZES, len(losses)})
        for _ in range(repeats)
    ]
    return pd.concat(parts, ignore_index=True)


def least_levels(sizes: Iterable[int], epsilon: float, delta: float) -> pd.DataFrame:
    """Tabulate the least level that any valid test on n units could certify: columns n, level."""
    ceiling = CEILING * math.log1p(epsilon)
    return pd.DataFrame([{"n": n, "level": smallest_level(n, delta, ceiling)} for n in sizes])


def audits(
    losses: np.ndarray, epsilon: float, delta: float, trials: int, real_trials: int
) -> pd.DataFrame:
    """Audit synthetic units, and real units taken as a population, for several numbers of units.

    Args:
        losses: mean gap of each real unit ``(units, candidates)``.
        trials, real_trials: number of resamples of synthetic and of real units.

    Returns:
        The rows of :func:`earlyexit.calibration.audit.audit`, with a column units.
    """
    pools = {
        "synthetic units": (*synthetic_units(SYNTHETIC_UNITS, epsilon), SYNTHETIC_SIZES, trials),
        "documents, resampled": (
            losses,
            np.minimum(losses, CEILING * math.log1p(epsilon)).mean(axis=0),
            sorted({min(30, len(losses)), len(losses), 2 * len(losses)}),
            real_trials,
        ),
    }
    parts = [
        audit(pool, risks, epsilon, delta, n, count, seed=n).assign(units=units)
        for units, (pool, risks, sizes, count) in pools.items()
        for n in sizes
    ]
    return pd.concat(parts, ignore_index=True)


def transfer(
    model: EarlyExitModel,
    certificates: Mapping[float, Certificate],
    other: Split,
    eos_id: int,
) -> pd.DataFrame:
    """Measure certified policies on another text, on which nothing is certified.

    Args:
        certificates: ε → certificate of the model.
        other: the other text in the model's vocabulary.

    Returns:
        Columns epsilon, covered (whether the certificate holds for this text), quality_loss,
        speedup_layers, unknown_share.
    """
    policies = [certificate.policy for certificate in certificates.values()]
    losses = window_losses(model, other, eos_id, policies)
    return pd.DataFrame(
        {
            "epsilon": list(certificates),
            "covered": [c.check(model, other) for c in certificates.values()],
            "quality_loss": np.expm1(losses.per_token),
            "speedup_layers": model.n_layers / losses.layers,
            "unknown_share": other.unk_share,
        }
    )
