"""Running a model with exits, two ways with one answer.

* ``dense``: every token runs every layer, exits are masks, exited states stay frozen: the slow truth.
* ``compacted``: exited tokens leave. A deeper layer's experts see only the tokens that are left; of
  the others the recursion still reads the potentials of their frozen states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from earlyexit.exits.clock import marker
from earlyexit.exits.criteria import ExitState
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.propagation import ExitedPotentials
from earlyexit.exits.readers import Reader
from earlyexit.exits.tally import ExitRun, _Tally

if TYPE_CHECKING:
    from earlyexit.models.resnet_bk import EarlyExitLanguageModel


Execution = Literal["compacted", "dense"]


def run(
    model: EarlyExitLanguageModel,
    x: Tensor,
    policy: ExitPolicy,
    read: Reader,
    execution: Execution = "compacted",
) -> ExitRun:
    """Run with exits and read each token's prediction once.

    Args:
        x: token ids ``(B, N)``.
        policy: thresholds for this model's depth.
        read: what to take from each token's prediction.
        execution: ``"compacted"`` or ``"dense"``.
    """
    return _run(model, x, policy, read, execution)


@torch.no_grad()
def decide(
    model: EarlyExitLanguageModel,
    x: Tensor,
    policy: ExitPolicy,
    execution: Execution = "compacted",
) -> ExitRun:
    """Layers and checks of :func:`run` without any prediction: where tokens leave, no vocabulary paid.

    Returns:
        A run whose ``outputs`` are None.

    Raises:
        ValueError: the policy's criterion reads logits.
    """
    if policy.rule.reads == "logits":
        raise ValueError(f"{policy.criterion!r} reads logits: its decisions are not free of them")
    return _run(model, x, policy, None, execution)


def _run(model, x: Tensor, policy: ExitPolicy, read: Reader | None, execution: str) -> ExitRun:
    if execution not in ("compacted", "dense"):
        raise ValueError(f"execution={execution!r} must be 'compacted' or 'dense'")
    h = model.embed(x)
    walk = _compacted if execution == "compacted" else _dense
    progress = torch.arange(x.shape[1], device=x.device).expand_as(x).flatten() / model.n_seq
    tally = _Tally(model, progress, policy, read)
    tally.mark("rest")
    walk(model, h, tally)
    return tally.finish()


def _dense(model: EarlyExitLanguageModel, h: Tensor, tally: _Tally) -> None:
    mark = marker()
    for layer, block in enumerate(model.blocks):
        if not len(tally.alive):  # the slowest has left
            return
        after = block.hidden(h)
        mark("blocks")
        alive = tally.alive
        now, before = (t.flatten(0, 1).index_select(0, alive) for t in (after, h))
        frozen = torch.ones(h.shape[0] * h.shape[1], dtype=torch.bool, device=h.device)
        frozen[alive] = False
        h = torch.where(frozen.view(*h.shape[:2], 1), h, after)
        mark("gather/scatter")
        tally.leave(_state(model, layer, now, before))


def _compacted(model: EarlyExitLanguageModel, h: Tensor, tally: _Tally) -> None:
    mark, shape = marker(), h.shape[:2]
    h = h.flatten(0, 1)  # (A, D): states of the A tokens that are still running
    exited = ExitedPotentials(model, len(h))
    u = model.blocks[0].layer_norm(h)
    mark("blocks")
    for layer, block in enumerate(model.blocks):
        alive, bk = tally.alive, block.bk_layer
        v = bk.potentials(u)
        mark("blocks")
        v = exited.join(layer, alive, v)  # (T, H)
        mark("gather/scatter")
        features = bk.bk_core(v.view(*shape, -1)).flatten(0, 1)
        mark("blocks", "propagation", len(alive) / len(v))  # the recursion passes over everyone
        if len(alive) < len(v):
            features = features.index_select(0, alive)
            mark("gather/scatter")
        before, h = h, h + bk.transform(u, features)
        last = layer + 1 == model.n_layers
        # Shared: the gate reads what the next block reads.
        u = None if last else model.blocks[layer + 1].layer_norm(h)
        mark("blocks")
        departure = tally.leave(ExitState(layer, h, before, u, model.gates))
        if last or not len(tally.alive):
            return
        if departure is not None:
            exited.add(layer, departure.tokens, departure.hidden)
            mark("propagation")
            h, u = h.index_select(0, departure.stay), u.index_select(0, departure.stay)
            mark("gather/scatter")


def _state(model: EarlyExitLanguageModel, layer: int, after: Tensor, before: Tensor) -> ExitState:
    last = layer == model.n_layers - 1
    normalised = None if last else model.blocks[layer + 1].layer_norm(after)
    return ExitState(layer, after, before, normalised, model.gates)
