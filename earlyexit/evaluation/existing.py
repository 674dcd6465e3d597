"""Would early exit pay for an existing model? Tables and one sentence, from traces and real runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm

from earlyexit.calibration.certificate import Certificate
from earlyexit.calibration.certify import Refused
from earlyexit.calibration.trace import ExitTrace
from earlyexit.cost.timing import interleaved_times, time_columns
from earlyexit.evaluation.compare import COLUMNS, Candidate, fitted, oracle, run_rows
from earlyexit.evaluation.curves import exit_quality
from earlyexit.evaluation.rivals import random_exits
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models.pretrained import PretrainedModel, Way

CLOSE = 0.05  # nats of KL: an exit so near to the last layer says the same
ENOUGH = 100_000  # tokens on which translators should be fitted
TIMES = ("speedup_time", "speedup_time_low", "speedup_time_high")
CERTIFIED, FITTED, STATIC = "gate, certified", "gate, fitted", "static"


def existing_exits(trace: ExitTrace, stage_layers: int) -> pd.DataFrame:
    """Tabulate the quality of each exit, and how many tokens it says what the last layer says.

    Args:
        stage_layers: layers of the model between two exits.

    Returns:
        :func:`~earlyexit.evaluation.curves.exit_quality` with columns model_layers, close (share of
        tokens whose KL to the last layer is at most ``CLOSE``), and close_so_far (at this exit or one
        before).
    """
    close = trace.kl <= CLOSE
    table = exit_quality(trace).assign(
        close=close.mean(axis=0), close_so_far=np.maximum.accumulate(close, axis=1).mean(axis=0)
    )
    table.insert(1, "model_layers", stage_layers * np.arange(1, trace.n_layers + 1))
    return table


def candidates_of(
    model: PretrainedModel,
    trace: ExitTrace,
    certificates: Mapping[float, Certificate | Refused],
) -> list[Candidate]:
    """Return for each ε the certified policy, the fitted one, and the static exit within it.

    Args:
        trace: trace of the fit part; certificates: ε → certificate, or why there is none.
    """
    epsilons, static = list(certificates), trace.static()
    found = [
        Candidate(CERTIFIED, "epsilon", epsilon, certificate.policy)
        for epsilon, certificate in certificates.items()
        if isinstance(certificate, Certificate)
    ]
    found += [
        Candidate(FITTED, c.setting, c.value, c.policy)
        for c in fitted(model, trace, ["gate"], epsilons)
    ]
    for epsilon in epsilons:
        within = static[static["quality_loss"] <= epsilon]
        layer = int(within.loc[within["speedup_layers"].idxmax(), "exit_layer"])
        if layer < trace.n_layers - 1:
            policy = ExitPolicy.static(layer, trace.n_layers)
            found.append(Candidate(STATIC, "epsilon", epsilon, policy))
    return found


def existing_policies(
    model: PretrainedModel,
    test: ExitTrace,
    candidates: Sequence[Candidate],
    epsilons: Sequence[float],
    loader: Iterable,
) -> pd.DataFrame:
    """Run the candidates compacted on the test split, beside hindsight and random exits on its trace.

    Args:
        test: trace of the tokens of ``loader``.

    Returns:
        The columns of :func:`~earlyexit.evaluation.compare.compare` without times, with trace_loss: the
        quality loss that the trace promises, where states are those of full depth.
    """
    distinct = list(dict.fromkeys(c.policy for c in candidates))  # several ε may share a policy
    real = run_rows(model, tqdm(distinct, desc="real runs", mininterval=2), loader)
    real = real.iloc[[distinct.index(c.policy) for c in candidates]].reset_index(drop=True)
    real["criterion"] = [c.criterion for c in candidates]
    real["epsilon"] = [c.value for c in candidates]
    real["trace_loss"] = [test.evaluate(c.policy)["quality_loss"] for c in candidates]
    parts = [real, oracle(model, test, epsilons), random_exits(test, candidates, FITTED)]
    table = pd.concat([part for part in parts if len(part)], ignore_index=True)
    hindsight = table["criterion"].isin(["oracle (kl)", "random exits"])
    table["trace_loss"] = table["trace_loss"].where(~hindsight, table["quality_loss"])
    return table[[name for name in COLUMNS if name in table and name not in TIMES] + ["trace_loss"]]


def ways_left_behind(
    model: PretrainedModel, test: ExitTrace, policy: ExitPolicy, loader: Iterable
) -> pd.DataFrame:
    """Run a policy compacted with all that exited tokens may leave behind.

    Args:
        test: trace of the tokens of ``loader``.

    Returns:
        One row per way: left_behind, in_use (whether the model has it), quality_loss, trace_loss (where
        all states are those of full depth) and speedup_layers.
    """
    usual, policy, rows = model.config, replace(policy, model_hash=""), []
    promised = test.evaluate(policy)["quality_loss"]
    try:
        for way in tqdm(get_args(Way), desc="left behind", mininterval=2):
            model.config = replace(usual, left_behind=way)
            real = run_rows(model, [policy], loader).iloc[0]
            row = {"left_behind": way, "in_use": way == usual.left_behind, "trace_loss": promised}
            rows.append(row | {k: real[k] for k in ("quality_loss", "speedup_layers")})
    finally:
        model.config = usual
    return pd.DataFrame(rows)


def policy_times(
    model: PretrainedModel,
    candidates: Sequence[Candidate],
    batch: tuple[Tensor, Tensor],
    repeats: int,
) -> pd.DataFrame:
    """Time the candidates against full depth, interleaved: criterion, epsilon and ``TIMES``.

    Args:
        batch: token ids and targets ``(B, N)``; repeats: timed runs of each policy.
    """
    x, y = batch
    runs = {None: lambda: model.nll(x, y)}
    runs |= {c.policy: lambda p=c.policy: model.nll(x, y, p) for c in candidates}
    with tqdm(total=2 * repeats * len(runs), desc="timing", mininterval=2) as bar:
        shown = {policy: lambda run=run: (run(), bar.update()) for policy, run in runs.items()}
        seconds = interleaved_times(shown, x.device, repeats)
    rows = [c.key | time_columns(seconds[None], seconds[c.policy]) for c in candidates]
    return pd.DataFrame(rows, columns=["criterion", "epsilon", *TIMES])


def verdict(policies: pd.DataFrame, epsilon: float, fit_tokens: int) -> str:
    """Return one sentence: what is certified at ε, how far hindsight would go, whether time is saved.

    Args:
        policies: the table of :func:`existing_policies`, with :func:`policy_times`.
        fit_tokens: tokens on which the translators were fitted.
    """
    at = policies[policies["epsilon"] == epsilon].set_index("criterion")
    top = at.loc["oracle (kl)", "speedup_layers"]
    few = "" if fit_tokens >= ENOUGH else (
        f" (exits fitted on {fit_tokens:,} tokens, fewer than the {ENOUGH:,} that they should see)"
    )  # fmt: skip
    ceiling = f"hindsight about the last layer would save {top:.2f}× in layers{few}"
    if CERTIFIED not in at.index:
        return f"Nothing can be certified at {epsilon:.0%} with these documents; {ceiling}."
    row = at.loc[CERTIFIED]
    low, high = row["speedup_time_low"], row["speedup_time_high"]
    pays = (
        "pays"
        if low > 1
        else "costs time"
        if high < 1
        else "cannot be told from full depth by the clock"
    )
    return (
        f"At a tolerated loss of {epsilon:.0%}, early exit {pays} here: the certified policy saves"
        f" {row['speedup_layers']:.2f}× in layers, {row['speedup_flops']:.2f}× in FLOPs and"
        f" {row['speedup_time']:.2f} [{low:.2f}, {high:.2f}]× in time at {row['quality_loss']:+.1%} on"
        f" the test split; {ceiling}."
    )
