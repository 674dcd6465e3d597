"""A small model with its traces, and the batches that the traces were taken on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from earlyexit.calibration.collect import collect_trace
from earlyexit.corpus.windows import loader


@pytest.fixture(scope="module")
def subject(make_model, corpus) -> SimpleNamespace:
    """A model of 3 layers: its traces of the fit part and the test split, and batches of the latter."""
    model = make_model()
    with torch.no_grad():  # the deeper an exit, the less sure of its noise: depth pays
        for block, scale in zip(model.blocks, (0.45, 0.35, 0.15), strict=True):
            block.exit_classifier.layer_norm.weight.mul_(scale)
    batches = list(loader(corpus.splits["test"], 12, 5, corpus.eos_id))
    fit, test = (
        collect_trace(model, corpus.splits[name], corpus.eos_id) for name in ("fit", "test")
    )
    return SimpleNamespace(model=model, fit=fit, test=test, batches=batches, batch=batches[0])
