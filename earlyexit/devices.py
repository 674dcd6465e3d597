"""Which device, and waiting for it."""

from __future__ import annotations

import torch


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """``"auto"`` is CUDA where there is one, otherwise the CPU.

    Raises:
        RuntimeError: torch does not know the name.
    """
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def synchronize(device: torch.device) -> None:
    """Wait for the device: kernels on CUDA return before they are done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
