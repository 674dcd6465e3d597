"""A model that is measured is given back as it was, also after an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


@contextmanager
def borrowed(model: Model) -> Iterator[Model]:
    """Yield a model in evaluation mode, and restore every module's mode and what learns.

    Inside, autocast is off: a model computes in the precision of its own weights.
    """
    modes = {module: module.training for module in model.modules()}
    learns = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with own_precision(model):
            yield model.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, learned in learns.items():
            parameter.requires_grad_(learned)


def own_precision(model: nn.Module) -> torch.autocast:
    """Return a context without autocast, whose rounding would decide where tokens exit."""
    return torch.autocast(next(model.parameters()).device.type, enabled=False)
