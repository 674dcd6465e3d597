"""A device is found by name, and waited for before a clock is read."""

from __future__ import annotations

import torch


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device of that name; ``"auto"`` means CUDA where there is a GPU, else the CPU.

    Raises:
        RuntimeError: torch knows no device of that name.
    """
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device is done: calls of CUDA kernels return before that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
