"""Predict the time of a configuration that was never run, for ``python -m earlyexit predict``."""

from __future__ import annotations

import numpy as np

from earlyexit.cost import time_model as times
from earlyexit.cost.parts import FULL_DEPTH, Load, policy_flops
from earlyexit.cost.time_model import TimeModel
from earlyexit.exits.criteria import CRITERIA


def answer(model: TimeModel, load: Load) -> dict:
    """Predict a run with exits and the same model at full depth, as plain JSON.

    Returns:
        ``speedup_layers``, ``speedup_flops``, ``speedup_time`` (predicted wall-clock), ``pays`` (whether
        it is above 1), milliseconds and their parts, exit shares, and the relative error of the prices
        on configurations that they were not fitted on.
    """
    runs = {FULL_DEPTH: load.at_full_depth, "with exits": load}
    ratio = model.speedup(load)
    return load.describe() | {
        "exit_shares": [round(s, 6) for s in load.shares],
        "speedup_layers": load.config.n_layers / load.mean_depth,
        "speedup_flops": policy_flops(load.operations, load.shares, load.criterion)[
            "speedup_flops"
        ],
        "speedup_time": ratio,
        "pays": bool(ratio > 1),
        "milliseconds": {name: model.milliseconds(run) for name, run in runs.items()},
        "parts": {name: model.predict(run) for name, run in runs.items()},
        "prediction_error": model.check,
        "beyond": times.beyond(load),
        "machine": model.machine,
    }


def text(answer: dict) -> str:
    """Format the answer as text."""
    full, exits = (answer["parts"][name] for name in (FULL_DEPTH, "with exits"))
    lines = [
        f"d={answer['d_model']}, {answer['n_layers']} layers, {answer['vocab_size']:,} words"
        f" ({answer['output_head']} head), {answer['batch']} × {answer['n_seq']} tokens,"
        f" {answer['criterion']}, mean depth {answer['mean_depth']:.2f}",
        "",
        f"{'milliseconds':<16}{'full depth':>12}{'with exits':>12}",
        *(f"{part:<16}{full[part]:>12.2f}{exits[part]:>12.2f}" for part in full),
        f"{'total':<16}{sum(full.values()):>12.2f}{sum(exits.values()):>12.2f}",
        "",
        f"speedup: layers {answer['speedup_layers']:.2f}×, FLOPs {answer['speedup_flops']:.2f}×,"
        f" predicted wall-clock {answer['speedup_time']:.2f}×"
        + ("" if answer["pays"] else ": early exit loses here"),
    ]
    where, error = answer["machine"], answer["prediction_error"]
    hardware = where.get("hardware", {})
    if "profile" in where:
        lines.append(
            f"by published prices, results/{where['profile']} ({where['made_by']} of this project), of"
            f" {hardware['cpu']}, {hardware['threads']} thread(s): --refit measures this machine"
        )
    if error:
        lines.append(
            f"these prices were off by {error['median_error']:.0%} (median),"
            f" {error['largest_error']:.0%} (largest) on configurations they were not fitted on"
        )
    if answer["beyond"]:
        lines.append(f"outside of what was measured, so take care: {', '.join(answer['beyond'])}")
    rule = CRITERIA[answer["criterion"]]
    if rule.reads == "logits" and not rule.of_top:
        lines.append("a logit costs this check what it costs one of maximum probability")
    if not np.isfinite(answer["speedup_time"]):
        lines.append("the prices are unusable: run again with --refit")
    return "\n".join(lines)
