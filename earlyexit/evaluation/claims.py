"""Compare the claims of the original with measurements.

Source: the early-exit design note of the open-source ResNet-BK project (neko-jpg/Project-ResNet-BK-
An-O-N-Language-Model-Architecture on GitHub, commit 6182361). Its tables were not produced by a run.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files

import pandas as pd

from earlyexit.evaluation.compare import SPEEDUPS, run_rows
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy

# The numbers that the note claims:
CHECK_SHARE = 0.01  # of a layer's time: the exit check
CONFIDENCE_SHARE = 0.02  # of a layer's time: softmax and maximum
MEMORY_SAVED = 0.30  # of activation memory
EFFICIENCY = 0.85  # measured over theoretical speedup
MULTI_SCALE, SPARSE, EXITS = 4.0, 1.8, 2.0  # speedups of each idea alone
MULTI_SCALE_AND_EXITS, SPARSE_AND_EXITS = 8.0, 3.6  # speedups of two ideas together, multiplied
ROUNDING = 1e-9  # so that an ε equal to the claimed loss counts as within it


def original_claims() -> pd.DataFrame:
    """Read the result tables of the design note.

    Returns:
        Columns source, table, setting, threshold ("none": no exits), avg_exit_as_printed, speedup,
        perplexity, quality_loss; NaN where the note gives no number.
    """
    with files("earlyexit").joinpath("data/original_claims.csv").open() as file:
        return pd.read_csv(file)


def claimed_test_rows() -> pd.DataFrame:
    """Return the rows of the WikiText-2 test table that have a numeric threshold."""
    claims = original_claims()
    claims = claims[claims["table"] == "WikiText-2 test"].assign(
        threshold=lambda t: pd.to_numeric(t["threshold"], errors="coerce")
    )
    return claims.dropna(subset="threshold").reset_index(drop=True)


def measured_claims(model: EarlyExitModel, loader: Iterable) -> pd.DataFrame:
    """Run the original's thresholds and compare the results with its claims.

    Returns:
        One row per claim: threshold, claimed_speedup, claimed_quality_loss, measured_speedup_layers,
        measured_quality_loss, perplexity, avg_exit_layer, exited_early (share of the tokens).
    """
    claims = claimed_test_rows()
    policies = [ExitPolicy.constant(t, model.n_layers) for t in claims["threshold"]]
    measured = run_rows(model, policies, loader)
    return pd.DataFrame(
        {
            "threshold": claims["threshold"],
            "claimed_speedup": claims["speedup"],
            "claimed_quality_loss": claims["quality_loss"],
            "measured_speedup_layers": measured["speedup_layers"],
            "measured_quality_loss": measured["quality_loss"],
            **measured[["perplexity", "avg_exit_layer", "exited_early"]],
        }
    )


def claims_and_certificates(front: pd.DataFrame, certificates: pd.DataFrame) -> pd.DataFrame:
    """Compare each claim with the measurement at its threshold and with a certified policy.

    Args:
        front: :func:`earlyexit.evaluation.compare.compare` of the original's thresholds, for one seed.
        certificates: :func:`earlyexit.evaluation.guarantees.certificate_table` for the same seed.

    Returns:
        Columns threshold, claimed_speedup, claimed_loss; the speedups and the loss with the prefix
        measured_; exited_early; and certified_epsilon, certified_speedup_layers, certified_loss of the
        policy certified by document with the largest ε ≤ the claimed loss (NaN: there is none).
    """
    claims = claimed_test_rows()
    measured = front[front["criterion"] == "original's threshold"].set_index("threshold")
    measured = measured.loc[claims["threshold"]].reset_index()
    certified = certificates[certificates["policy"] == "certified by document"]
    certified = certified.dropna(subset="test_speedup_layers").sort_values("epsilon")
    # The last row within each claim; −1 stands for none, and reindex fills it with NaN.
    best = certified["epsilon"].searchsorted(claims["quality_loss"] + ROUNDING, "right") - 1
    certified = certified.reset_index(drop=True).reindex(best).reset_index(drop=True)
    return pd.DataFrame(
        {
            "threshold": claims["threshold"],
            "claimed_speedup": claims["speedup"],
            "claimed_loss": claims["quality_loss"],
            **measured[list(SPEEDUPS)].add_prefix("measured_"),
            "measured_loss": measured["quality_loss"],
            "exited_early": measured["exited_early"],
            "certified_epsilon": certified["epsilon"],
            "certified_speedup_layers": certified["test_speedup_layers"],
            "certified_loss": certified["test_quality_loss"],
        }
    )
