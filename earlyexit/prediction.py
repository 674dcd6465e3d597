"""What ``python -m earlyexit predict`` answers: time of a configuration that was never run."""

from __future__ import annotations

import argparse
import logging

import numpy as np
import torch

from earlyexit import time_model as times
from earlyexit.cost import policy_flops
from earlyexit.devices import resolve_device
from earlyexit.exits import CRITERIA
from earlyexit.model import ModelConfig
from earlyexit.paths import project
from earlyexit.patterns import geometric_shares
from earlyexit.settings import UsageError
from earlyexit.time_model import TimeModel
from earlyexit.work import FULL_DEPTH, Load

log = logging.getLogger(__name__)


def load_from(options: argparse.Namespace) -> Load:
    """The run that the command line describes.

    Raises:
        UsageError: sizes below 1, an unknown criterion or head, a depth or shares that do not fit.
    """
    sizes = ("d_model", "n_layers", "vocab", "batch", "n_seq", "bk_heads", "num_experts", "top_k")
    for name in sizes:
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)} must be ≥ 1")
    if options.top_k > options.num_experts:
        raise UsageError(f"--top-k {options.top_k} exceeds --num-experts {options.num_experts}")
    if options.criterion not in CRITERIA or options.criterion == "depth":
        known = ", ".join(name for name in CRITERIA if name != "depth")
        raise UsageError(f"--criterion {options.criterion}: choose one of {known}")
    if options.output_head not in ("linear", "adaptive"):
        raise UsageError(f"--output-head {options.output_head}: linear or adaptive")
    if options.output_head == "adaptive" and (options.vocab < 10 or options.d_model < 4):
        raise UsageError("an adaptive output head needs --vocab ≥ 10 and --d-model ≥ 4")
    config = ModelConfig(
        options.vocab, options.d_model, options.n_layers, options.n_seq, options.num_experts,
        options.top_k, 0.0, bk_heads=options.bk_heads, gate_hidden=0,
        output_head=options.output_head, tie_embeddings=options.output_head == "linear",
    )  # fmt: skip
    try:
        shares = options.exit_shares
        if shares is None:
            depth = options.mean_depth
            shares = geometric_shares(
                config.n_layers, (config.n_layers + 1) / 2 if depth is None else depth
            )
        return Load(
            config, options.batch, options.n_seq, options.criterion, tuple(map(float, shares))
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def device_and_threads(name: str, threads: int) -> torch.device:
    """The device, with torch set to ``threads`` where that is not 0.

    Raises:
        UsageError: no such device, or a negative number of threads.
    """
    if threads < 0:
        raise UsageError(f"--threads {threads} must be ≥ 0")
    try:
        device = resolve_device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if threads:
        torch.set_num_threads(threads)
    return device


def time_model(device: torch.device, refit: bool = False) -> TimeModel:
    """This machine's prices: from the cache, or measured now and kept."""
    path = times.stored(project().cache, device)
    if path.exists() and not refit:
        return TimeModel.load(path)
    log.info("no prices of this machine yet: measuring them, once, about a minute")
    model, _ = times.calibrate(device)
    model.save(path)
    return model


def answer(model: TimeModel, load: Load) -> dict:
    """Prediction of a run with exits and of the same model at full depth, plain JSON.

    Returns:
        ``speedup_layers``, ``speedup_flops``, ``speedup_time`` (predicted wall-clock), ``pays`` (whether
        it is above 1), milliseconds and their parts, exit shares, and how far the prices were off on
        configurations they were not fitted on.
    """
    full = Load(load.config, load.batch, load.length)
    flops = policy_flops(load.config, load.shares, load.criterion)
    ratio = model.speedup(load)
    return {
        "d_model": load.config.d_model,
        "n_layers": load.config.n_layers,
        "vocab_size": load.config.vocab_size,
        "output_head": load.config.output_head,
        "batch": load.batch,
        "n_seq": load.length,
        "criterion": load.criterion,
        "exit_shares": [round(s, 6) for s in load.shares],
        "mean_depth": load.mean_depth,
        "speedup_layers": load.config.n_layers / load.mean_depth,
        "speedup_flops": flops["speedup_flops"],
        "speedup_time": ratio,
        "pays": bool(ratio > 1),
        "milliseconds": {
            FULL_DEPTH: model.milliseconds(full),
            "with exits": model.milliseconds(load),
        },
        "parts": {FULL_DEPTH: model.predict(full), "with exits": model.predict(load)},
        "prediction_error": model.check,
        "beyond": times.beyond(load),
        "machine": model.machine,
    }


def text(answer: dict) -> str:
    """The answer for a reader."""
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
    error = answer["prediction_error"]
    if error:
        lines.append(
            f"prices of this machine were off by {error['median_error']:.0%} (median),"
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
