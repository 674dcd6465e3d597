"""Would early exit pay for an existing model? Tables and one sentence, from traces and real runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from earlyexit.calibration.certificate import Certificate
from earlyexit.calibration.certify import Refused
from earlyexit.calibration.trace import ExitTrace
from earlyexit.cost.timing import time_columns
from earlyexit.evaluation.compare import Candidate, compare, fitted, oracle
from earlyexit.evaluation.curves import exit_quality
from earlyexit.evaluation.rivals import random_exits
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models.pretrained import PretrainedModel

CLOSE = 0.05  # nats of KL: an exit so near to the last layer says the same
ENOUGH = 100_000  # tokens on which translators should be fitted
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
    batch: tuple[Tensor, Tensor],
    repeats: int,
) -> pd.DataFrame:
    """Run the candidates compacted on the test split, beside hindsight and random exits on its trace.

    Args:
        test: trace of the tokens of ``loader``.
        batch: token ids and targets ``(B, N)`` on which all runs are timed.

    Returns:
        The columns of :func:`~earlyexit.evaluation.compare.compare`, with trace_loss: the quality loss
        that the trace promises, where states are those of full depth.
    """
    distinct = {c.policy: c for c in candidates}  # several ε may share a policy
    kinds = {policy.criterion for policy in distinct} | {"depth"}
    real = compare(model, [*distinct.values()], dict.fromkeys(kinds, loader), batch, repeats)
    place = {policy: row for row, policy in enumerate(distinct)}
    real = real.iloc[[place[c.policy] for c in candidates]].reset_index(drop=True)
    real["criterion"] = [c.criterion for c in candidates]
    real["epsilon"] = [c.value for c in candidates]
    real["trace_loss"] = [test.evaluate(c.policy)["quality_loss"] for c in candidates]
    parts = [real, oracle(model, test, epsilons), random_exits(test, candidates, FITTED)]
    table = pd.concat([part for part in parts if len(part)], ignore_index=True)
    hindsight = table["criterion"].isin(["oracle (kl)", "random exits"])
    return table.assign(trace_loss=table["trace_loss"].where(~hindsight, table["quality_loss"]))


def verdict(policies: pd.DataFrame, epsilon: float, fit_tokens: int) -> str:
    """Return one sentence: what is certified at ε, how far hindsight would go, whether time is saved.

    Args:
        policies: the table of :func:`existing_policies`.
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


@torch.no_grad()
def assisted_generation(
    model: PretrainedModel, prompts: Tensor, n_new: int, repeats: int
) -> pd.DataFrame:
    """Time transformers' own self-drafting, whose drafts leave after each exit, against plain decoding.

    Every prompt is one greedy run with a cache. Drafts are verified, so that the words are the same.

    Args:
        prompts: token ids ``(B, N)``; n_new: new tokens of each.

    Returns:
        One row per exit but the last: criterion, exit_layer, speedup_time with its 90 % interval over
        prompts and repeats, and agreement (share of new tokens that are those of plain decoding).
    """
    decoder, seconds, said = model.decoder, {}, {}
    library = logging.getLogger("transformers")  # it warns of the settings that it makes itself
    level = library.level
    library.setLevel(logging.ERROR)
    exits = [None, *(model.config.stage_layers * (k + 1) for k in range(model.n_layers - 1))]
    for repeat in range(repeats + 1):  # the first warms up
        for layers in exits:
            for number, prompt in enumerate(prompts.split(1)):
                start = time.perf_counter()
                ids = decoder.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n_new,
                    do_sample=False,
                    **({} if layers is None else {"assistant_early_exit": layers}),
                )  # fmt: skip
                if repeat:
                    seconds.setdefault(layers, []).append(time.perf_counter() - start)
                said[layers, number] = ids[0, prompt.shape[1] :]
    library.setLevel(level)
    rows = []
    for index, layers in enumerate(exits[1:]):
        same = []
        for number in range(len(prompts)):
            drafted, plain = said[layers, number], said[None, number]
            shorter = min(len(drafted), len(plain))
            same.append(drafted[:shorter] == plain[:shorter])
        rows.append(
            {"criterion": "assistant_early_exit", "exit_layer": index}
            | time_columns(np.array(seconds[None]), np.array(seconds[layers]))
            | {"agreement": torch.cat(same).double().mean().item()}
        )
    return pd.DataFrame(rows)
