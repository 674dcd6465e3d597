"""How far back a model reads: what its predictions lose without the tokens before, and gain with them.

Neither curve shows the other. A prediction may suffer where a distant past is exchanged, although it
would have been as good without any; and NLL may fall along the window without a long memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from earlyexit.calibration.trace import ExitTrace
from earlyexit.corpus.splits import Split
from earlyexit.corpus.windows import IGNORE, windows
from earlyexit.exits.protocol import ExitModel

CONTEXTS = (0, 1, 2, 4, 8, 16, 32, 64, 96)  # tokens kept before the one that is read
SCORED = 8  # last positions of a window that are scored
ENOUGH_DOCUMENTS = 8  # with fewer, a standard error over windows is the better guess


def memory_curve(
    model: ExitModel,
    split: Split,
    eos_id: int,
    contexts: Sequence[int] = CONTEXTS,
    *,
    scored: int = SCORED,
    max_tokens: int = 0,
    seed: int = 0,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Measure the rise of the NLL when all tokens more than c positions back are replaced.

    A position keeps the token that it reads and the c before it; all earlier ones are replaced by those
    of another window, at the same places, of another document if there is one. Every position is scored
    with its own c tokens, at each exit of full-depth states. Windows without a break are used alone.

    Args:
        contexts: numbers c; those that do not fit a window before the scored positions are left out.
        scored: how many of a window's last positions are scored.
        max_tokens: take about so many tokens' windows, evenly spread over the split; 0: all.
        seed: draws the windows that replace others.

    Returns:
        One row per exit and c: exit_layer, context (c), rise_nats (mean over windows and positions),
        standard_error (over documents, or windows if there are few documents), n (positions scored).

    Raises:
        ValueError: the split has fewer than two whole windows, or no c fits.
    """
    x, y, document = whole_windows(split, model.n_seq, eos_id, max_tokens)
    scored = min(scored, model.n_seq)
    contexts = sorted({c for c in contexts if c <= model.n_seq - scored})
    if len(x) < 2 or not contexts:
        raise ValueError(
            f"{len(x)} whole windows of {model.n_seq} tokens and contexts {contexts}: a memory curve"
            " needs 2 and one, so take more of the split"
        )
    parts = zip(
        *(a.split(batch_size) for a in (x, x[partners(document, seed)], y[:, -scored:])),
        strict=True,
    )
    rises = np.concatenate([_rises(model, *part, contexts) for part in parts])
    return _means(rises.mean(axis=1), document, scored, "context", contexts, "rise_nats")


def whole_windows(
    split: Split, n_seq: int, eos_id: int, max_tokens: int = 0
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Return inputs and targets ``(W, N)`` and the document ``(W,)`` of windows without padding.

    Args:
        max_tokens: keep about so many tokens' windows, evenly spread; 0: all.
    """
    cut = windows(split, n_seq, eos_id)
    whole = np.flatnonzero((cut.targets != IGNORE).all(axis=1))
    n = min(len(whole), max(2, max_tokens // n_seq) if max_tokens else len(whole))
    rows = whole[np.linspace(0, len(whole) - 1, n).round().astype(int)] if n else whole
    x, y = (torch.as_tensor(a[rows]) for a in (cut.inputs, cut.targets))
    return x, y, cut.document[rows]


def partners(document: np.ndarray, seed: int) -> np.ndarray:
    """Return for each window another one, of another document unless one has most of the windows.

    Args:
        document: each window's document ``(W,)``, ascending.
    """
    n, largest = len(document), np.unique(document, return_counts=True)[1].max()
    low, high = (largest, n - largest) if 2 * largest <= n else (1, n - 1)
    shift = np.random.default_rng(seed).integers(low, high, endpoint=True)
    return (np.arange(n) + shift) % n


@torch.no_grad()
def _rises(model: ExitModel, x: Tensor, other: Tensor, y: Tensor, contexts: list[int]):
    """Return the rise of the NLL at the last positions ``(B, S, L, C)``, where y is ``(B, S)``.

    A run in which everything before a position s is replaced serves each scored position i with
    c = i − s, as a causal model reads nothing after i.
    """
    device, length, scored = next(model.parameters()).device, x.shape[1], y.shape[1]
    x, other, y = (a.to(device) for a in (x, other, y))
    before = _last_nll(model, x, y)
    rises = before.new_empty(*before.shape, len(contexts))
    positions = range(length - scored, length)
    for start in {i - c for i in positions for c in contexts}:
        replaced = torch.cat([other[:, :start], x[:, start:]], dim=1)
        rise = _last_nll(model, replaced, y) - before
        for k, c in enumerate(contexts):
            if (place := start + c - positions[0]) in range(scored):
                rises[:, place, :, k] = rise[:, place]
    return rises.double().cpu().numpy()


def _last_nll(model: ExitModel, x: Tensor, y: Tensor) -> Tensor:
    """Return the NLL at each exit of the last positions ``(B, S, L)``, for targets ``(B, S)``."""
    states = model.hidden_states(x)[1:]
    target, columns = y.flatten(), []
    for layer, h in enumerate(states):
        head = model.head(layer)
        features = head.features(h[:, -y.shape[1] :]).flatten(0, 1)
        columns.append(head.unembedding.nll(features, target).view_as(y))
    return torch.stack(columns, dim=-1)


def nll_by_position(trace: ExitTrace) -> pd.DataFrame:
    """Tabulate each exit's NLL over the position in the window, in bins 0, 1, 2–3, 4–7, …

    Windows that the end of a document cuts short are left out, so that the same windows are read at
    every position.

    Returns:
        One row per exit and bin: exit_layer, position (the bin's first), nll (nats per token),
        standard_error (as in :func:`memory_curve`), n (tokens).

    Raises:
        ValueError: the trace has no whole window.
    """
    window = np.cumsum(trace.position == 0) - 1
    whole = (np.bincount(window) == trace.n_seq)[window]
    if not whole.any():
        raise ValueError(
            f"the trace of {trace.split!r} has no whole window of {trace.n_seq} tokens"
        )
    nll = trace.nll[whole].reshape(-1, trace.n_seq, trace.n_layers)
    document = trace.document[whole].reshape(-1, trace.n_seq)[:, 0]
    starts = [0, *(2**k for k in range(trace.n_seq.bit_length()) if 2**k < trace.n_seq)]
    ends = [*starts[1:], trace.n_seq]
    parts = [
        _means(
            nll[:, a:b].mean(axis=1, dtype=float)[..., None],
            document,
            b - a,
            "position",
            [a],
            "nll",
        )
        for a, b in zip(starts, ends, strict=True)
    ]
    table = pd.concat(parts, ignore_index=True)
    return table.sort_values(["exit_layer", "position"], ignore_index=True)


def _means(
    values: np.ndarray, document: np.ndarray, each: int, x: str, xs: Sequence[int], y: str
) -> pd.DataFrame:
    """Tabulate means and standard errors over windows of values ``(W, L, X)``."""
    several = len(np.unique(document)) >= ENOUGH_DOCUMENTS
    cluster = document if several else np.arange(len(document))
    index = pd.MultiIndex.from_product([range(values.shape[1]), xs], names=["exit_layer", x])
    flat = values.reshape(len(values), -1)
    table = pd.DataFrame({y: flat.mean(axis=0), "standard_error": standard_error(flat, cluster)})
    return table.set_index(index).assign(n=len(values) * each).reset_index()


def standard_error(values: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """Return the standard error ``(K,)`` of the mean of rows ``(W, K)`` that come in clusters ``(W,)``.

    Rows of one cluster may depend on each other: the sums of their deviations vary as they do.
    """
    _, group = np.unique(cluster, return_inverse=True)
    sums = np.zeros((group.max() + 1, values.shape[1]))
    np.add.at(sums, group, values - values.mean(axis=0))
    n = len(sums)
    return np.sqrt((sums**2).sum(axis=0) * n / (n - 1)) / len(values)
