"""Compare the claims of the original with measurements.

Source: the early-exit design note of the open-source ResNet-BK project (neko-jpg/Project-ResNet-BK-
An-O-N-Language-Model-Architecture on GitHub, commit 6182361). Its tables were not produced by a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files

import numpy as np
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
PROMISED_LOSS = 0.05  # within which exits were to be two to three times as fast
WITHIN = f"time, within {PROMISED_LOSS:.0%}"
FROZEN = f"layers, without retraining, within {PROMISED_LOSS:.0%}"
COMBINED = ("several scales", "sparse BK-Core", "exits", "scales + exits", "sparse + exits")
ROUNDING = 1e-9  # so that an ε equal to the claimed loss counts as within it


def original_claims() -> pd.DataFrame:
    """Read the result tables of the design note.

    Returns:
        Columns source, table, setting, threshold ("none": no exits), avg_exit_as_printed, speedup,
        perplexity, quality_loss; NaN where the note gives no number.
    """
    with files("earlyexit").joinpath("data/original_claims.csv").open(encoding="utf-8") as file:
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


def verdicts(
    tables: Mapping[str, pd.DataFrame], front: pd.DataFrame, combinations_settle: bool = True
) -> pd.DataFrame:
    """Settle each promise of the original by one number: held, not held, or cannot hold.

    A promise cannot hold where a bound refutes it: a count of operations or positions, or the share of
    measured time that there is to save. It is not measured where 03 trained no frozen exits, or the
    front has no gates that were fitted to the promised loss; both hold theirs only if their real run
    keeps to it.

    Args:
        tables: name → table of one seed: costs (01), recipes (03), part_times and end_to_end (04),
            memory_peaks (05), claimed_products and sparse_limits (07).
        front: the rows of that seed of :func:`earlyexit.evaluation.compare.compare`.
        combinations_settle: 07 was run long enough for conclusions; otherwise what is promised of
            combinations is not settled, unless a bound refutes it.

    Returns:
        Columns claim, claimed, measured, best_possible (the bound; NaN: nothing refutes it), verdict.
    """
    costs = tables["costs"].set_index("part")["share_of_block"]
    times = tables["part_times"].set_index("part")["share_of_block"]
    peaks = tables["memory_peaks"].query("output != 'logits returned'")
    peaks = peaks.set_index("execution")["peak_mib"]
    products = tables["claimed_products"].set_index("claim")
    frozen = tables["recipes"].query("recipe == 'frozen'").head(1)
    frozen_speedup = next(iter(frozen["gate_speedup_layers"]), np.nan)
    gates = front[(front["criterion"] == "gate") & np.isclose(front["epsilon"], PROMISED_LOSS)]
    broken = {
        FROZEN: (frozen["real_loss_twin"] > PROMISED_LOSS).any(),
        WITHIN: (gates["quality_loss"] > PROMISED_LOSS).any(),
    }
    n_layers = front[front["criterion"] == "static"]["exit_layer"].max() + 2
    ends = tables["end_to_end"].iloc[0]
    total, positions = products["total time"], products["positions"]
    at_least, at_most = 1, -1
    rows = [
        ("exit check / layer", CHECK_SHARE, times["maximum probability"],
         costs[["head norm", "unembedding", "softmax"]].sum(), at_most),
        ("confidence / layer", CONFIDENCE_SHARE, costs["softmax"], costs["softmax"], at_most),
        ("activation memory saved", MEMORY_SAVED,
         1 - peaks["compacted"] / peaks["full depth"], np.nan, at_least),
        ("time / layers saved", EFFICIENCY,
         ends["speedup_time"] / ends["speedup_layers"], np.nan, at_least),
        ("several scales", MULTI_SCALE, total["several scales"], positions["several scales"],
         at_least),
        ("sparse BK-Core", SPARSE, total["sparse BK-Core"],
         tables["sparse_limits"]["at_most"].max(), at_least),
        ("exits", EXITS, total["exits"], np.nan, at_least),
        ("scales + exits", MULTI_SCALE_AND_EXITS, total["scales + exits (measured)"],
         positions["several scales"] * n_layers, at_least),
        ("sparse + exits", SPARSE_AND_EXITS, total["sparse + exits (measured)"], np.nan, at_least),
        (WITHIN, EXITS, next(iter(gates["speedup_time"]), np.nan), np.nan, at_least),
        (FROZEN, EXITS, frozen_speedup, np.nan, at_least),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["claim", "claimed", "measured", "best_possible", "sign"])
    sign = table.pop("sign")
    held = sign * table["measured"] >= sign * table["claimed"]
    held &= ~table["claim"].map(broken).eq(True)
    refuted = sign * table["best_possible"] < sign * table["claimed"]
    open_yet = table["claim"].isin(COMBINED) & (not combinations_settle)
    settled = {
        "cannot hold": refuted & ~held,
        "not settled": open_yet,
        "held": held,
        "not measured": table["measured"].isna(),
    }
    return table.assign(verdict=np.select(list(settled.values()), list(settled), "not held"))
