"""A model is run with exits in two ways that give the same answer.

* ``dense``, the slow truth: every token runs every layer, exits are masks, exited states are frozen.
* ``compacted``: exited tokens leave. Deeper layers transform the running tokens only; of the others
  they read what their frozen states contribute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit.corpus.windows import IGNORE, check_whole, checked_targets
from earlyexit.exits.clock import marker
from earlyexit.exits.policy import ExitPolicy, check_policy
from earlyexit.exits.propagation import LeftBehind
from earlyexit.exits.protocol import Execution, ExitModel, ExitState, Observation, Walk, exit_state
from earlyexit.exits.readers import Reader
from earlyexit.exits.tally import ExitRun, Tally
from earlyexit.nn.borrowed import own_precision


def run(
    model: ExitModel,
    x: Tensor,
    policy: ExitPolicy,
    read: Reader | None,
    execution: Execution = "compacted",
) -> ExitRun:
    """Run ``model`` with exits and read each token's prediction once.

    Args:
        x: token ids ``(B, N)``.
        policy: thresholds for this model's depth.
        read: what to take from each token's prediction; None makes no prediction.
        execution: ``"compacted"`` or ``"dense"``.

    Raises:
        TypeError: the policy is no :class:`ExitPolicy`, or the ids are no whole numbers.
        ValueError: the execution is unknown, the policy is for another model or depth, scores are NaN,
            or ``embed`` refuses the ids.
    """
    if execution not in ("compacted", "dense"):
        raise ValueError(f"execution={execution!r} must be 'compacted' or 'dense'")
    check_policy(policy, model.n_layers)
    check_whole(x, "token ids")
    with own_precision(model):
        walk = model.walk(x, execution, policy.rule.history)
        if walk is None:
            walk = (CompactedWalk if execution == "compacted" else DenseWalk)(model, x)
        progress = torch.arange(x.shape[1], device=x.device).expand_as(x).flatten() / model.n_seq
        tally = Tally(model, walk, progress, policy, read)
        tally.mark("rest")
        for layer in range(model.n_layers):
            walk.advance(layer)
            tally.judge(layer)
            if not len(walk.alive):  # the slowest has left
                break
        del walk
        return tally.finish()


@torch.no_grad()
def decide(
    model: ExitModel, x: Tensor, policy: ExitPolicy, execution: Execution = "compacted"
) -> ExitRun:
    """Find where tokens leave, as :func:`run` does, but predict nothing: ``outputs`` are None.

    Raises:
        ValueError: the policy's criterion reads logits.
    """
    if policy.rule.reads == "logits":
        raise ValueError(f"{policy.criterion!r} reads logits: its decisions are not free of them")
    return run(model, x, policy, None, execution)


def scored_states(model: ExitModel, x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
    """Run full depth, and keep the tokens that have a target.

    Returns:
        Their states before the first and after every layer, L + 1 tensors ``(S, D)``, and their
        targets ``(S,)``.

    Raises:
        TypeError, ValueError: see :func:`earlyexit.corpus.windows.checked_targets`.
    """
    targets = checked_targets(y.flatten(), model.vocab_size)
    scored = (targets != IGNORE).nonzero().squeeze(1)
    states = [h.flatten(0, 1)[scored] for h in model.hidden_states(x)]
    return states, targets[scored]


class DenseWalk(Walk):
    """Every layer runs on all tokens, and the states of exited ones are put back."""

    def __init__(self, model: ExitModel, x: Tensor):
        self.model, self.h = model, model.embed(x)
        self.given: Tensor | None = None
        self.alive = torch.arange(x.numel(), device=x.device)
        self.mark = marker()

    def exited(self) -> Tensor:
        """Return which tokens of the batch have left."""
        shape = self.h.shape[:-1]
        exited = torch.ones(shape.numel(), dtype=torch.bool, device=self.h.device)
        exited[self.alive] = False
        return exited.view(shape)

    def advance(self, layer: int) -> None:
        h, exited = self.h, self.exited()
        self.mark("gather/scatter")
        self.h, self.given = self.model.layer_around(layer, h, exited, self.given)
        self.mark("blocks")
        self.after, self.before = (t.flatten(0, 1).index_select(0, self.alive) for t in (self.h, h))
        self.mark("gather/scatter")

    def observe(self, layer: int) -> Observation:
        return Observation(exit_state(self.model, layer, self.after, self.before), self.alive)

    def states(self, rows: Tensor) -> Tensor:
        return self.after.index_select(0, rows)

    def leave(self, layer: int, leaving: Tensor, staying: Tensor, hidden: Tensor) -> None:
        self.alive = self.alive.index_select(0, staying)


class CompactedWalk(Walk):
    """Each layer transforms the running tokens only.

    Their states ``(A, D)`` are normed once: the gate reads what the next layer reads.
    """

    def __init__(self, model: ExitModel, x: Tensor):
        self.model, self.shape = model, x.shape
        self.h = model.embed(x).flatten(0, 1)
        self.alive = torch.arange(x.numel(), device=x.device)
        self.left_behind = LeftBehind(model, x.numel())
        self.mark = marker()
        self.u = model.normed(0, self.h)
        self.mark("blocks")

    def advance(self, layer: int) -> None:
        model = self.model
        self.given = model.contribution(layer, self.u)
        self.mark("blocks")
        given = self.left_behind.join(layer, self.alive, self.given).unflatten(0, self.shape)
        self.mark("gather/scatter")
        rows = self.alive if len(self.alive) < self.shape.numel() else None
        mixed = model.mix(layer, self.u, given, rows)
        self.before, self.h = self.h, model.update(layer, self.h, self.u, mixed)
        self.u = model.normed(layer + 1, self.h) if layer + 1 < model.n_layers else None
        self.mark("blocks")

    def observe(self, layer: int) -> Observation:
        state = ExitState(layer, self.h, self.before, self.u, self.model.gates)
        return Observation(state, self.alive)

    def states(self, rows: Tensor) -> Tensor:
        return self.h.index_select(0, rows)

    def leave(self, layer: int, leaving: Tensor, staying: Tensor, hidden: Tensor) -> None:
        tokens = self.alive.index_select(0, leaving)
        self.alive = self.alive.index_select(0, staying)
        if not len(staying):
            return
        self.left_behind.add(layer, tokens, hidden, self.given.index_select(0, leaving))
        self.mark("propagation")
        self.h, self.u = self.h.index_select(0, staying), self.u.index_select(0, staying)
        self.mark("gather/scatter")
