"""Compare ways of training exits, on validation, with models trained alone on the same tokens."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from earlyexit.calibration.thresholds import Unreachable
from earlyexit.calibration.trace import ExitTrace
from earlyexit.evaluation.compare import fitted_policy, run_row
from earlyexit.evaluation.rivals import Alone, exit_gaps, perplexities
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy


def against_alone(
    model: EarlyExitModel, fit: ExitTrace, alone: Alone, loader: Iterable, epsilon: float
) -> pd.DataFrame:
    """Compare every exit of a model with gates, and what its gates save, with models trained alone.

    All is read on the fit part, so that recipes can be chosen by it.

    Args:
        fit: trace of the model.
        alone: depth → losses by document of a model of that depth, over the same tokens.
        loader: batches of the same tokens, for the real run.

    Returns:
        Columns of :func:`~earlyexit.evaluation.rivals.exit_gaps`; and the same in all rows:
        gate_speedup_layers of the gates fitted to ``epsilon``, gate_loss_twin (against the model of
        full depth trained alone), left_behind: the relative increase of perplexity that the states of
        exited tokens cause in a real run, and real_loss_twin, the loss of that run.
    """
    try:
        policy = fitted_policy(model, fit, "gate", epsilon)
    except Unreachable:
        policy = ExitPolicy.static(model.n_layers, model.n_layers)
    traced, twin = fit.evaluate(policy), perplexities(alone)[model.n_layers]
    real = run_row(model, policy, loader)["perplexity"]
    return exit_gaps(fit, alone).assign(
        gate_speedup_layers=traced["speedup_layers"],
        gate_loss_twin=traced["perplexity"] / twin - 1,
        left_behind=real / traced["perplexity"] - 1,
        real_loss_twin=real / twin - 1,
    )


def alone_rows(alone: Alone) -> pd.DataFrame:
    """Tabulate models trained alone beside exits: columns exit (depth − 1), perplexity."""
    values = perplexities(alone)
    return pd.DataFrame({"exit": np.array(list(values)) - 1, "perplexity": list(values.values())})
