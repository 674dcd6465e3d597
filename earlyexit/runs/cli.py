"""Options that describe a model's run, or a machine, checked before anything starts."""

from __future__ import annotations

import argparse
from dataclasses import fields

import torch

from earlyexit.cost.parts import Load
from earlyexit.cost.synthetic import geometric_shares
from earlyexit.devices import resolve_device
from earlyexit.exits.criteria import CRITERIA
from earlyexit.nn.config import ModelConfig
from earlyexit.runs.settings import UsageError


def load_from(options: argparse.Namespace) -> Load:
    """The run that the options of ``predict`` describe.

    Raises:
        UsageError: sizes that make no model, an unknown criterion, a depth or shares that do not fit.
    """
    known = [name for name in CRITERIA if name != "depth"]
    if options.criterion not in known:
        raise UsageError(f"--criterion {options.criterion}: choose one of {', '.join(known)}")
    asked = {f.name: getattr(options, f.name) for f in fields(ModelConfig) if f.name in options}
    try:
        config = ModelConfig(**asked, dropout_p=0.0, gate_hidden=0)
        config.check_trainable()
        shares = options.exit_shares
        if shares is None:
            depth = options.mean_depth
            depth = (config.n_layers + 1) / 2 if depth is None else depth
            shares = geometric_shares(config.n_layers, depth)
        shares = tuple(map(float, shares))
        return Load(config, options.batch, config.n_seq, options.criterion, shares)
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
