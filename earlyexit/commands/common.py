"""What commands share: how one is added, and what the values of their options must be."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from earlyexit.devices import resolve_device
from earlyexit.runs.profiles import PROFILES
from earlyexit.runs.settings import UsageError

# Adds a command: its function, what it does, an example, and options of its parser.
Add = Callable[..., argparse.ArgumentParser]


class Several(argparse.Action):
    """An option that takes several values and may be given more than once."""

    def __call__(self, parser, namespace, values, option=None):
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), *values))


SEVERAL = {"nargs": "+", "action": Several, "default": ()}


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that read the clock."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: its own choice)")
    parser.add_argument("--json", action="store_true", help="for machines")


def known_profile(name: str) -> str:
    """Return the name of a profile.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in PROFILES:
        raise UsageError(f"--profile {name}: choose one of {', '.join(PROFILES)}")
    return name


def device_of(name: str, threads: int = 0) -> torch.device:
    """Return the device, and set the threads of torch unless ``threads`` is 0.

    Raises:
        UsageError: the device does not exist, or the number of threads is negative.
    """
    if threads < 0:
        raise UsageError(f"--threads {threads} must be ≥ 0")
    try:
        device = resolve_device(name)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    if threads:
        torch.set_num_threads(threads)
    return device
