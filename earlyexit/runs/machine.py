"""The prices of work on this machine: measured once, then read from the cache."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from earlyexit.cost import time_model as times
from earlyexit.cost.time_model import TimeModel
from earlyexit.runs import digests, provenance
from earlyexit.runs.paths import project

log = logging.getLogger(__name__)


def time_model(device: torch.device, refit: bool = False) -> TimeModel:
    """This machine's prices: from the cache, or measured now and kept."""
    path = stored(project().cache, device)
    if path.exists() and not refit:
        return TimeModel.load(path)
    log.info("no prices of this machine yet: measuring them, once, about a minute")
    model, _ = times.calibrate(device)
    model = replace(model, machine=machine())
    model.save(path)
    return model


def machine() -> dict:
    """What prices depend on besides the configuration."""
    return {"torch": torch.__version__, "hardware": provenance.hardware()}


def stored(cache: Path, device: torch.device) -> Path:
    """Where this machine's prices are kept; another machine or other code has another place."""
    key = {
        "machine": machine(),
        "device": str(device),
        "code": digests.of_code(f"{times.__name__}.calibrate", TimeModel),
    }
    return cache / "time_model" / f"{digests.of_object(key)[:16]}.json"
