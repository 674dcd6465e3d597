"""Tabulate certificates, their candidates, bounds and audits, and their transfer to another text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd

from earlyexit.calibration.audit import audit, synthetic_units, width_table
from earlyexit.calibration.bounds import smallest_level
from earlyexit.calibration.certificate import Certificate
from earlyexit.calibration.certify import Refused, decide
from earlyexit.calibration.power import ceilings, chosen_ceiling, nearest_to_level
from earlyexit.calibration.thresholds import Unreachable
from earlyexit.calibration.trace import ExitTrace
from earlyexit.calibration.unit_losses import Unit, WindowLosses, traced_losses, window_losses
from earlyexit.corpus.corpus import Corpus
from earlyexit.corpus.splits import Split
from earlyexit.evaluation.compare import stopping_policy
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy

UNITS: tuple[Unit, ...] = ("document", "window")
SIZES = (10, 30, 100, 300, 1000)  # numbers of units for which the widths of bounds are shown
SYNTHETIC_UNITS = 20_000  # the population of the audit on synthetic units
AUDITED = (120, 500)  # numbers of units of the audits, beside the number there is
GROUP = 6  # documents that are alike in the audit of dependence
FACTS = ("n", "ceiling", "bound", "mean_gap", "token_gap", "clipped_share", "smallest_level")
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


def ceiling_table(
    trace: ExitTrace,
    policies: Sequence[ExitPolicy],
    losses: WindowLosses,
    epsilons: Sequence[float],
    delta: float,
) -> pd.DataFrame:
    """Tabulate what each ceiling would find and hide, and choose one, for each ε and unit.

    Args:
        trace: trace of the fit part, whose losses decide.
        losses: losses on the certification part; only the number and the length of its units are used.

    Returns:
        Columns epsilon, unit, and those of :func:`earlyexit.calibration.power.ceilings`.
    """
    expected = {u: traced_losses(trace, policies, losses.unit_length(u)) for u in UNITS}
    parts = [
        ceilings(expected[unit], epsilon, delta, losses.count(unit)).assign(
            epsilon=epsilon, unit=unit
        )
        for epsilon, unit in product(epsilons, UNITS)
    ]
    table = pd.concat(parts, ignore_index=True)
    return table[["epsilon", "unit", *parts[0].columns[:-2]]]


def certify_each(
    policies: Sequence[ExitPolicy],
    losses: WindowLosses,
    ceilings_of: pd.DataFrame,
    delta: float,
) -> Certificates:
    """Return by (ε, unit) the certificate that the losses allow, or the reason for a refusal.

    Args:
        ceilings_of: the table that :func:`ceiling_table` returns.
    """
    return {
        (epsilon, unit): _or_reason(
            decide, policies, losses, epsilon, delta, chosen_ceiling(rows), unit
        )
        for (epsilon, unit), rows in ceilings_of.groupby(["epsilon", "unit"], sort=False)
    }


def certificate_table(
    model: EarlyExitModel,
    trace: ExitTrace,
    certificates: Certificates,
    criterion: str,
    test: Split,
    eos_id: int,
) -> pd.DataFrame:
    """Run, for each ε, the certified policies and one that is fitted without a certificate.

    Args:
        trace: trace of the fit part.
        certificates: the certificates that :func:`certify_each` returns.
        test: the test split, its documents cut as those that certified.

    Returns:
        Columns epsilon, level (log(1 + ε)), policy, ``FACTS`` of certificates, test_quality_loss (over
        tokens), test_document_loss (the mean over documents, of which a certificate speaks) and
        test_speedup_layers; and reason, if there is no policy.

    Raises:
        ValueError: a certificate does not cover ``test``.
    """
    rows, place = [], {}  # place: each policy's among those that are run
    for epsilon in dict.fromkeys(epsilon for epsilon, _ in certificates):
        found = {
            "fitted, no certificate": _or_reason(stopping_policy, model, trace, criterion, epsilon)
        }
        for unit in UNITS:
            found[f"certified by {unit}"] = certificates[epsilon, unit]
        for name, policy in found.items():
            row = {"epsilon": epsilon, "level": math.log1p(epsilon), "policy": name}
            if isinstance(policy, Exception):
                rows.append(row | {"test": -1, "reason": str(policy)})
                continue
            if isinstance(policy, Certificate):
                policy.check(model, test)
                row |= {fact: getattr(policy, fact) for fact in FACTS}
                policy = policy.policy
            rows.append(row | {"test": place.setdefault(policy, len(place))})
    real = window_losses(model, test, eos_id, list(place))
    measured = pd.DataFrame(
        {
            "test_quality_loss": np.expm1(real.per_token),
            "test_document_loss": np.expm1(real.per_unit("document").mean(axis=0)),
            "test_speedup_layers": model.n_layers / real.layers,
        }
    )
    return pd.DataFrame(rows).join(measured, on="test").drop(columns="test")


def _or_reason(function: Callable, *arguments):
    """Return the function's result, or the exception that says why there is no such policy."""
    try:
        return function(*arguments)
    except (Refused, Unreachable) as error:
        return error


def bound_widths(
    losses: np.ndarray, epsilon: float, delta: float, ceiling: float, repeats: int = 3
) -> pd.DataFrame:
    """Compute upper bounds on one candidate's mean loss, by every method, on n resampled units.

    The candidate is the one whose mean loss is nearest to half of the level log(1 + ε).

    Args:
        losses: mean gap of each unit ``(units, candidates)``.
        ceiling: B over log(1 + ε).

    Returns:
        Columns method, n, mean, bound, with ``repeats`` rows per method and n; n is each of ``SIZES``
        and the number of units.
    """
    level, rng = math.log1p(epsilon), np.random.default_rng(0)
    shown = nearest_to_level(losses, level / 2)
    parts = [
        width_table(rng.choice(shown, n), delta, ceiling * level)
        for n in sorted({*SIZES, len(losses)})
        for _ in range(repeats)
    ]
    return pd.concat(parts, ignore_index=True)


def least_levels(
    sizes: Iterable[int], epsilon: float, delta: float, ceiling: float
) -> pd.DataFrame:
    """Tabulate the least level that any valid test on n units could certify: columns n, level."""
    ceiling *= math.log1p(epsilon)
    return pd.DataFrame([{"n": n, "level": smallest_level(n, delta, ceiling)} for n in sizes])


def audits(
    losses: np.ndarray, epsilon: float, delta: float, ceiling: float, trials: int
) -> pd.DataFrame:
    """Audit synthetic units, and documents taken as a population, independent and in groups alike.

    Documents vary as under the candidate whose mean loss is nearest to log(1 + ε).

    Args:
        losses: mean gap of each document ``(documents, candidates)``.
        ceiling: B over log(1 + ε).
        trials: number of samples of each audit.

    Returns:
        The rows of :func:`earlyexit.calibration.audit.audit`, with a column units.
    """
    documents = nearest_to_level(losses, math.log1p(epsilon))
    pools = {
        "synthetic units": (synthetic_units(SYNTHETIC_UNITS, epsilon), 1),
        "documents, resampled": (documents, 1),
        f"documents, {GROUP} alike": (documents, GROUP),
    }
    parts = [
        audit(pool, epsilon, delta, n, trials, ceiling=ceiling, group=group, seed=n).assign(
            units=units
        )
        for units, (pool, group) in pools.items()
        for n in sorted({len(losses), *AUDITED})
    ]
    return pd.concat(parts, ignore_index=True)


def neighbours_correlation(losses: np.ndarray, epsilon: float) -> tuple[float, float]:
    """Return how the losses of documents next to each other correlate, and the p-value of none.

    Args:
        losses: mean gap of each document, in the order of the text ``(documents, candidates)``.
    """
    from scipy import stats  # slow to import, and needed here only

    documents = nearest_to_level(losses, math.log1p(epsilon))
    found = stats.pearsonr(documents[:-1], documents[1:])
    return float(found.statistic), float(found.pvalue)


def kept_out(corpus: Corpus) -> float:
    """Return the share of the training split's tokens that is kept out of it to certify."""
    certify, first = corpus.splits["certify"], corpus.splits["fit"].document.min()
    moved = (certify.document < first).sum() if corpus.config.certify_articles else 0
    return float(moved / (moved + corpus.splits["train"].n_tokens))


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
