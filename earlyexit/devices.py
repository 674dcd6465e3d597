"""A device is found by name, and waited for before a clock is read."""

from __future__ import annotations

import torch


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device of that name; ``"auto"`` means CUDA where there is a GPU, else the CPU.

    Raises:
        ValueError: it is neither the CPU nor a GPU that is there.
    """
    name = str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
        usable = found.type in ("cpu", "cuda") and torch.empty(0, device=found).device
        why = "" if usable else "it cannot compute here"
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
    if why:
        raise ValueError(f"device {name}: choose auto, cpu or cuda ({why:.120})")
    return found


def synchronize(device: torch.device) -> None:
    """Wait until the device is done: calls of CUDA kernels return before that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
