"""Candidate policies are run for real, and lose some NLL on every window, document or token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from earlyexit.calibration.trace import ExitTrace
from earlyexit.checked import whole
from earlyexit.corpus.splits import Split
from earlyexit.corpus.windows import IGNORE, windows
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.statistics import layers_executed
from earlyexit.nn.borrowed import borrowed

Unit = Literal["document", "window"]


@dataclass(frozen=True)
class WindowLosses:
    """These losses are the NLL gaps of candidate policies on the windows of a split.

    Attributes:
        gaps: sum over a window's tokens of NLL − NLL at full depth, nats ``(windows, candidates)``.
        full: sum over a window's tokens of the NLL at full depth, nats ``(windows,)``.
        tokens: scored tokens per window ``(windows,)``.
        document: document of each window ``(windows,)``.
        layers: mean layers executed per token of each candidate ``(candidates,)``.
        n_layers: layers of the model.
        model_hash, data_hash: hashes of the weights and of the text.
        n_seq: length of the windows; cut: length to which documents were cut, 0: whole.
        split: name of the split.
    """

    gaps: np.ndarray
    full: np.ndarray
    tokens: np.ndarray
    document: np.ndarray
    layers: np.ndarray
    n_layers: int
    model_hash: str = ""
    data_hash: str = ""
    n_seq: int = 0
    cut: int = 0
    split: str = "certify"

    def per_unit(self, unit: Unit) -> np.ndarray:
        """Return the mean gap per token of each unit ``(units, candidates)``.

        Raises:
            ValueError: the unit is neither document nor window; tokens are never units.
        """
        index, tokens = self._units(unit)
        totals = np.zeros((len(tokens), self.gaps.shape[1]))
        np.add.at(totals, index, self.gaps)
        return totals / tokens[:, None]

    def count(self, unit: Unit) -> int:
        """Return the number of units."""
        return len(self._units(unit)[1])

    def unit_length(self, unit: Unit) -> int:
        """Return the number of tokens that units were cut to; 0: whole documents."""
        return self.cut if unit == "document" else self.n_seq

    def longest(self, unit: Unit) -> int:
        """Return the number of tokens of the longest unit."""
        return int(self._units(unit)[1].max())

    def _units(self, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
        """Return the unit of each window, and the tokens of each unit."""
        if unit not in ("document", "window"):
            raise ValueError(f"unit={unit!r} must be 'document' or 'window'")
        label = self.document if unit == "document" else np.arange(len(self.tokens))
        _, index = np.unique(label, return_inverse=True)
        return index, np.bincount(index, self.tokens)

    @property
    def per_token(self) -> np.ndarray:
        """Return the mean gap per token of each candidate ``(candidates,)``."""
        return self.gaps.sum(axis=0) / self.tokens.sum()


def traced_losses(trace: ExitTrace, policies: Sequence[ExitPolicy], length: int) -> np.ndarray:
    """Return the mean gaps ``(units, policies)`` that a trace shows, nats per token.

    Units are pieces of ``length`` tokens of its documents, which stand for documents that are cut to so
    many, or for windows; a rest of less than half of that is left out. With 0 they are documents.
    """
    _, document = np.unique(trace.document, return_inverse=True)
    first = np.flatnonzero(np.diff(document, prepend=-1))
    place = np.arange(trace.n_tokens) - first[document]
    piece = place // length if length else np.zeros_like(place)
    _, unit = np.unique(np.stack([document, piece]), axis=1, return_inverse=True)
    tokens = np.bincount(unit)
    used = (2 * tokens >= length) | (np.bincount(unit, piece) == 0)
    gaps = [
        np.bincount(unit, trace.nll[np.arange(trace.n_tokens), exits] - trace.nll[:, -1])
        for exits in (layers_executed(trace.exit_layers(p), trace.n_layers) - 1 for p in policies)
    ]
    return (np.stack(gaps, axis=1) / tokens[:, None])[used]


@torch.no_grad()
def window_losses(
    model: EarlyExitModel,
    split: Split,
    eos_id: int,
    policies: Sequence[ExitPolicy] = (),
    batch_size: int = 32,
) -> WindowLosses:
    """Run full depth and every policy, compacted, over ``split``.

    Raises:
        FloatingPointError: an NLL is not finite.
        ValueError: the split is empty or of another text than the model was trained on, or a policy is
            of another model.
    """
    model.check_text(split)
    batch_size = whole("batch_size", batch_size, 1)
    if not split.n_tokens:
        raise ValueError(f"the split {split.name!r} holds no token")
    with borrowed(model):
        return _measure(model, split, eos_id, policies, batch_size)


def _measure(
    model: EarlyExitModel,
    split: Split,
    eos_id: int,
    policies: Sequence[ExitPolicy],
    batch_size: int,
) -> WindowLosses:
    device = next(model.parameters()).device
    w = windows(split, model.n_seq, eos_id)
    tokens = (w.targets != IGNORE).sum(axis=1)
    gaps, full = np.zeros((len(tokens), len(policies))), np.zeros(len(tokens))
    layers = np.zeros(len(policies))
    starts = range(0, len(tokens), batch_size)
    for start in tqdm(starts, desc=f"losses {split.name}", mininterval=2):
        rows = slice(start, start + batch_size)
        x, y = (torch.as_tensor(a[rows]).to(device) for a in (w.inputs, w.targets))
        full[rows] = model.nll(x, y).double().sum(dim=1).cpu().numpy()
        for k, policy in enumerate(policies):
            nll, exits = model.nll(x, y, policy)
            gaps[rows, k] = nll.double().sum(dim=1).cpu().numpy() - full[rows]
            layers[k] += layers_executed(exits, model.n_layers)[y != IGNORE].sum().item()
    if not (np.isfinite(full).all() and np.isfinite(gaps).all()):
        raise FloatingPointError("an NLL is not finite: the weights hold NaN or infinity")
    return WindowLosses(
        gaps,
        full,
        tokens,
        np.asarray(w.document),
        layers / tokens.sum(),
        model.n_layers,
        model.fingerprint(),
        split.data_hash,
        model.n_seq,
        split.cut,
        split.name,
    )
