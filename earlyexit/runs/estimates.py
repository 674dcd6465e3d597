"""How long a notebook will take, from how long it took."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from earlyexit.runs.profiles import Profile

# Tokens of the training splits, roughly; a folder's text is counted when it is read, not before.
TRAIN_TOKENS = {"sotu": 1_800_000, "wikitext-2": 2_088_628, "wikitext-103": 103_227_021}


def training_work(profile: Profile, seeds: int) -> float | None:
    """FLOPs of training: 6 × tokens × epochs × seeds × active parameters; None if not known.

    Per token, a layer of width D with top-k experts of hidden width 2 D multiplies by 4 k D²
    weights; the vocabulary head counts twice, once for the random exit trained in each step.
    """
    tokens = TRAIN_TOKENS.get(profile.corpus.name)
    if limit := profile.max_train_tokens:
        tokens = min(tokens or limit, limit)
    if tokens is None:
        return None
    model = profile.model
    layers = model.n_layers * 4 * model.top_k * model.d_model**2
    heads = 2 * model.vocab_size * model.d_model
    return 6.0 * tokens * profile.training.epochs * seeds * (layers + heads)


def minutes(
    notebook: str, label: str, work: float | None, receipts: Iterable[dict[str, Any]]
) -> tuple[float | None, str]:
    """Expected minutes of a notebook and what they rest on.

    Args:
        notebook: its name.
        label: of the run that is asked for.
        work: its training work.
        receipts: of earlier runs, under any label.

    Returns:
        The last time under the same label if the work was the same, else the time of another run
        scaled by training work (``"rough"``), else ``(None, "unknown")``.
    """
    known = [r for r in receipts if r["notebook"] == notebook]
    for receipt in known:
        if receipt["label"] == label and receipt["work"] == work:
            return receipt["seconds"] / 60, "last run"
    scaled = [r for r in known if r["work"] and work]
    if not scaled:
        return None, "unknown"
    # The largest run is the one that start-up times distort least.
    nearest = max(scaled, key=lambda r: r["work"])
    return nearest["seconds"] / 60 * work / nearest["work"], "rough"
