"""Exits of a frozen model learn to say early what its last layer will say.

An exit's translator is an affine map of its state before the last layer's norm and output layer, which
it borrows (Belrose et al. 2023, tuned lens, eq. 4). It starts in closed form: the ridge regression of
the last layer's states on its own. It is then refined by the KL from the last layer's prediction to its
own, over words drawn anew in every step, because all of a large vocabulary would cost as much as the
model itself.

A shortcut is the same regression of the states after the next exit: it carries on what a token that has
left hands to deeper layers (Yom Din et al. 2023, *Jump to Conclusions*, 2303.09435, §3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from earlyexit.checked import LARGEST_RATE, bounded, real, whole
from earlyexit.corpus.splits import Split
from earlyexit.corpus.windows import loader
from earlyexit.exits.execution import scored_states
from earlyexit.models.pretrained import PretrainedModel
from earlyexit.nn.borrowed import borrowed
from earlyexit.nn.unembedding import LinearUnembedding
from earlyexit.training.train import check_trainable

HELD_OUT = 10  # one of so many states is kept out of the refinement, to judge it
KEPT_BYTES = 2**30  # of states for the refinement, at most
Affine = tuple[Tensor, Tensor]  # weight (D, D) and bias (D,) of what is added to a state


class _States(NamedTuple):
    """States after every exit ``(L, T, D)``, and the words that came next ``(T,)``."""

    after: Tensor
    targets: Tensor


@bounded(learning_rate=LARGEST_RATE)
def fit_translators(
    model: PretrainedModel,
    split: Split,
    eos_id: int,
    max_tokens: int = 100_000,
    *,
    refine_tokens: int = 20_000,
    steps: int = 300,
    batch_size: int = 512,
    words: int = 2_048,
    learning_rate: float = 3e-4,
    ridge: float = 1e-3,
    seed: int = 0,
) -> list[dict]:
    """Fit all translators and shortcuts in place, by what follows them; everything else is frozen.

    Args:
        split: the training split; validation and test have other uses.
        max_tokens: tokens of the regression, in random windows; refine_tokens: those whose states are
            kept for the refinement of translators, fewer if they take more than a gibibyte.
        steps, batch_size, words, learning_rate: of the refinement by Adam; words are drawn uniformly,
            beside those that come next in the batch. 0 steps: the regression alone.
        ridge: weight of the map's squared entries, relative to the states' mean square.

    Returns:
        One row per exit: tokens, and over held-out states and drawn words the KL in nats of the exit
        without a translator, of the regression, and as it was refined; ``refined`` tells whether the
        refinement was kept, which it is where it lowers that KL.

    Raises:
        ValueError: ``split`` is not the training split, an exit has no translator or the output layer is
            not linear, or another argument is out of range.
    """
    if split.name != "train":
        raise ValueError(f"translators are fitted on the training split, not on {split.name!r}")
    heads = [model.head(k) for k in range(model.n_layers)]
    if any(h.translator is None for h in heads[:-1]) or not isinstance(
        heads[-1].unembedding, LinearUnembedding
    ):
        raise ValueError("exits need translators before one linear output layer: attach a model")
    sizes = {"max_tokens": max_tokens, "refine_tokens": refine_tokens, "batch_size": batch_size}
    max_tokens, refine_tokens, batch_size = (whole(k, n, 1) for k, n in sizes.items())
    steps, words = whole("steps", steps), whole("words", words, 1)
    learning_rate, ridge = (
        real("learning_rate", learning_rate, above=0), real("ridge", ridge, above=0),
    )  # fmt: skip
    check_trainable(model, split)
    model.check_text(split)
    with borrowed(model):
        torch.manual_seed(seed)
        maps, shortcuts, kept, tokens = _regression(
            model, split, eos_id, max_tokens, min(refine_tokens, max_tokens), ridge
        )
        for shortcut, found in zip(model.shortcuts, shortcuts, strict=True):
            _write(shortcut, *found)
        held, rest = (
            _States(kept.after[:, rows], kept.targets[rows]) for rows in _parts(len(kept.targets))
        )
        draw = torch.Generator().manual_seed(seed)
        judged = _drawn(held.targets, words, model.vocab_size, draw)
        rows = []
        for k, head in enumerate(heads[:-1]):
            _write(head.translator, torch.zeros(()), torch.zeros(()))
            row = {"exit": k, "tokens": tokens, "kl_lens": _kl(heads, k, held, judged)}
            _write(head.translator, *maps[k])
            rows.append(row | {"kl_ridge": _kl(heads, k, held, judged)})
        _refine(heads, rest, steps, batch_size, words, learning_rate, model.vocab_size, draw)
        for k, row in enumerate(rows):
            row["kl_refined"] = _kl(heads, k, held, judged)
            row["refined"] = row["kl_refined"] < row["kl_ridge"]
            if not row["refined"]:
                _write(heads[k].translator, *maps[k])
    model.trained_on = model.trained_on or split.data_hash
    return rows


def _parts(tokens: int) -> tuple[Tensor, Tensor]:
    held = torch.arange(tokens) % HELD_OUT == 0
    return held.nonzero().squeeze(1), (~held).nonzero().squeeze(1)


@torch.no_grad()
def _write(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.copy_(weight.expand_as(linear.weight))
    linear.bias.copy_(bias.expand_as(linear.bias))


@torch.no_grad()
def _regression(
    model: PretrainedModel,
    split: Split,
    eos_id: int,
    max_tokens: int,
    kept_tokens: int,
    ridge: float,
) -> tuple[list[Affine], list[Affine], _States, int]:
    """Return the maps of exits and of the stages behind them, some states, and the tokens seen.

    A token counts by the inverse mean square of its last state, since the norm that follows removes its
    scale: a few first tokens are a thousand times as large as the others.
    """
    device, exits = next(model.parameters()).device, model.n_layers - 1
    moments, kept, count, kept_count = None, [], 0, 0
    bar = tqdm(total=min(max_tokens, split.n_tokens), desc="states", unit="token", mininterval=2)
    for x, y in loader(split, model.n_seq, 4, eos_id, shuffle=True):
        (_, *states), target = scored_states(model, x.to(device), y.to(device))
        after = torch.stack(states)  # (L, T, D)
        weight = after[-1].square().mean(dim=-1, keepdim=True).clamp_min(1e-12).reciprocal()
        ones = after.new_ones(*after.shape[1:-1], 1)
        given = [torch.cat([h, ones], dim=-1) for h in after[:-1]]
        # The next state beside the last one: of the last exit but one they are the same.
        found = [
            _moments(g, torch.cat([after[-1] - h, later - h], dim=-1), weight)
            for g, h, later in zip(given, after[:-1], after[1:], strict=True)
        ]
        moments = found if moments is None else [
            (a + c, b + d) for (a, b), (c, d) in zip(moments, found, strict=True)
        ]  # fmt: skip
        most = min(kept_tokens, KEPT_BYTES // (4 * after[:, 0].numel())) - kept_count
        if most > 0:
            kept.append(_States(after[:, :most].clone(), target[:most]))
            kept_count += len(kept[-1].targets)
        count += len(target)
        bar.update(min(len(target), bar.total - bar.n))  # whole windows are read
        if count >= max_tokens:
            break
    bar.close()
    maps, shortcuts = [], []
    for k in range(exits):
        square, cross = moments[k]
        small = torch.eye(len(square), dtype=square.dtype, device=device)
        small[-1, -1] = 0  # the bias is free
        # The median: a few channels are a thousand times as large as the others.
        scale = ridge * square.diagonal()[:-1].median()
        solved = torch.linalg.solve(square + scale * small, cross).to(after.dtype)
        for found, part in zip((maps, shortcuts), solved.chunk(2, dim=1), strict=True):
            found.append((part[:-1].T, part[-1]))
    joined = _States(
        torch.cat([part.after for part in kept], dim=1), torch.cat([part.targets for part in kept])
    )
    return maps, shortcuts[:-1], joined, count


def _moments(given: Tensor, wanted: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return Gᵀ W G and Gᵀ W Y in float64."""
    weighted = (given * weight).T.double()
    return weighted @ given.double(), weighted @ wanted.double()


def _drawn(targets: Tensor, words: int, vocab_size: int, draw: torch.Generator) -> Tensor:
    """Return the targets' words and others drawn uniformly, each once."""
    others = torch.randperm(vocab_size, generator=draw)[:words]
    return torch.cat([others.to(targets.device), targets]).unique()


def _log_p(head, states: Tensor, words: Tensor) -> Tensor:
    """Return log-probabilities among ``words``, ``(T, W)``, of states ``(T, D)``."""
    weight, bias = head.unembedding.weight[words], head.unembedding.bias
    bias = None if bias is None else bias[words]
    return nn.functional.linear(head.features(states), weight, bias).log_softmax(dim=-1)


def _divergence(heads, k: int, states: Tensor, last: Tensor, words: Tensor) -> Tensor:
    return nn.functional.kl_div(
        _log_p(heads[k], states, words), last, reduction="batchmean", log_target=True
    )


@torch.no_grad()
def _kl(heads, k: int, held: _States, words: Tensor) -> float:
    """Return the mean KL in nats from the last layer's prediction to that of exit ``k``."""
    parts = torch.arange(len(held.targets)).split(256)
    total = 0.0
    for rows in parts:
        last = _log_p(heads[-1], held.after[-1, rows], words)
        total += len(rows) * _divergence(heads, k, held.after[k, rows], last, words).item()
    return total / len(held.targets)


def _refine(heads, states, steps, batch_size, words, learning_rate, vocab_size, draw) -> None:
    learned = [p for head in heads[:-1] for p in head.translator.parameters()]
    for head in heads:
        head.requires_grad_(False)
    for parameter in learned:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(learned, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in tqdm(range(steps), desc="translators", unit="step", mininterval=2):
        rows = torch.randint(len(states.targets), (batch_size,), generator=draw)
        chosen = _drawn(states.targets[rows], words, vocab_size, draw)
        with torch.no_grad():
            last = _log_p(heads[-1], states.after[-1, rows], chosen)
        loss = sum(
            _divergence(heads, k, states.after[k, rows], last, chosen)
            for k in range(len(heads) - 1)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
