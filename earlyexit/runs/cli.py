"""runs/cli."""

from __future__ import annotations

import argparse

import torch

from earlyexit.cost.parts import Load
from earlyexit.cost.synthetic import geometric_shares
from earlyexit.devices import resolve_device
from earlyexit.exits.criteria import CRITERIA
from earlyexit.nn.config import ModelConfig
from earlyexit.runs.settings import UsageError


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
        output_head=options.output_head,
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
