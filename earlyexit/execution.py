"""Running a model with exits, two ways with one answer.

* ``dense``: every token runs every layer, exits are masks, exited states stay frozen: the slow truth.
* ``compacted``: exited tokens leave. A deeper layer's experts see only the tokens that are left; of
  the others the recursion still reads the potentials of their frozen states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from earlyexit.clock import marker
from earlyexit.exits import ExitPolicy, ExitState
from earlyexit.propagation import ExitedPotentials
from earlyexit.vocabulary import Reader

if TYPE_CHECKING:
    from earlyexit.layers import ExitHead
    from earlyexit.model import EarlyExitLanguageModel

Execution = Literal["compacted", "dense"]


@dataclass
class ExitRun:
    """Outcome of a run with exits over T = B·N tokens.

    Attributes:
        outputs: what the reader made of each token's logits ``(T, …)``.
        exit_layers: 0-based exit, n_layers where none ``(T,)`` int64.
        scores: the criterion at the exit, or at the last layer ``(T,)``; NaN where it has none.
    """

    outputs: Tensor | None
    exit_layers: Tensor
    scores: Tensor


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


@dataclass
class _Departure:
    """Who left at an exit: ``tokens`` with last states ``hidden`` ``(E, D)``; the rows that stay."""

    tokens: Tensor
    hidden: Tensor
    stay: Tensor


def _state(model: EarlyExitLanguageModel, layer: int, after: Tensor, before: Tensor) -> ExitState:
    last = layer == model.n_layers - 1
    normalised = None if last else model.blocks[layer + 1].layer_norm(after)
    return ExitState(layer, after, before, normalised, model.gates)


@torch.no_grad()
def generate(
    model: EarlyExitLanguageModel,
    prompt: Tensor,
    n_new: int,
    policy: ExitPolicy | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue ``prompt`` ``(B, N)`` by ``n_new`` tokens, in O(1) state per layer.

    Args:
        policy: exit policy; None runs full depth.
        temperature: 0 takes the most probable token, otherwise samples.

    Returns:
        Token ids ``(B, N + n_new)``, and the exit layer of every token run ``(B, N + n_new − 1)``.

    Raises:
        ValueError: prompt and continuation exceed n_seq, a policy for another depth, logits that are
            not finite, or see ``embed``.
    """
    inputs = model.embed(prompt)
    batch, length = prompt.shape
    if length + n_new > model.n_seq + 1:
        raise ValueError(
            f"{length} + {n_new} tokens exceed n_seq={model.n_seq}: shorten prompt or n_new"
        )
    policy = policy or ExitPolicy.static(model.n_layers, model.n_layers)
    states: list[Tensor | None] = [None] * model.n_layers
    ids, exits, was_training = prompt, [], model.training
    model.eval()
    try:
        for position in range(length + n_new - 1):
            if position < length:
                h = inputs[:, position]
            else:
                h = model.token_embedding(ids[:, position])
                h = h + model.position_embedding.weight[position]
            progress = h.new_full((batch,), position / model.n_seq)
            tally = _Tally(model, progress, policy, Reader())
            _step(model, h, states, tally)
            run = tally.finish()
            exits.append(run.exit_layers)
            if position >= length - 1:
                ids = torch.cat([ids, _choose(run.outputs, temperature, generator)], dim=1)
    finally:
        model.train(was_training)
    return ids, torch.stack(exits, dim=1) if exits else ids.new_zeros(batch, 0)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if not torch.isfinite(logits).all():
        raise ValueError("logits are not finite: the weights hold NaN or infinity")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return (logits / temperature).softmax(dim=-1).multinomial(1, generator=generator)


def _step(
    model: EarlyExitLanguageModel, h: Tensor, states: list[Tensor | None], tally: _Tally
) -> None:
    """One position ``(B, D)`` through all layers; exited rows only feed the recursion."""
    for layer, block in enumerate(model.blocks):
        alive = tally.alive
        u = block.layer_norm(h)
        v = block.bk_layer.potentials(u)
        states[layer], features = block.bk_layer.bk_core.step(states[layer], v)
        if len(alive):
            before = h[alive]
            after = before + block.bk_layer.transform(u[alive], features[alive])
            h = h.index_copy(0, alive, after)
            tally.leave(_state(model, layer, after, before))


class _Tally:
    """Who is still running, who left where, and what was read of each token.

    A criterion that needs all logits has paid for the projection: the prediction is read from the same
    chunk. Otherwise the features wait, and are projected together at the end, once per token.
    """

    def __init__(
        self,
        model: EarlyExitLanguageModel,
        progress: Tensor,
        policy: ExitPolicy,
        read: Reader | None,
    ):
        if len(policy.thresholds) != model.n_layers:
            raise ValueError(
                f"the policy has {len(policy.thresholds)} thresholds, the model {model.n_layers} layers"
            )
        self.model, self.policy, self.read = model, policy, read
        self.progress = progress  # (T,) position of each token over n_seq
        self.alive = torch.arange(len(progress), device=progress.device)
        self.exit_layers = torch.full_like(self.alive, model.n_layers)
        dtype = model.token_embedding.weight.dtype
        self.scores = torch.full_like(progress, torch.nan, dtype=dtype)
        self.reading = self.scores.clone()  # what a streak's criterion read at the exit before
        self.streak = torch.zeros_like(self.scores)
        self.outputs: Tensor | None = None
        self.waiting: list[tuple[ExitHead, Tensor, Tensor]] = []
        self.mark = marker()

    def leave(self, state: ExitState) -> _Departure | None:
        """Judge the alive tokens at an exit, and let go those that pass (at the end, all).

        Returns:
            Who left, and which rows stay; None where all stay.
        """
        mark = self.mark
        layer, rule = state.layer, self.policy.rule
        skip, last = not self.policy.checks(layer), layer == self.model.n_layers - 1
        if not len(self.alive) or (skip and not last):
            return None
        head, features, output = self.model.blocks[layer].exit_classifier, None, None
        if skip:
            passed = torch.zeros_like(self.alive, dtype=torch.bool)
            score = self.scores[self.alive]
        else:
            if rule.reads == "state":
                score = rule.score(state)
            else:
                features = head.features(state.hidden)
                if rule.cheap(head.unembedding):
                    log_p, word = head.unembedding.top(features)
                    score, output = rule.of_top(log_p, word), self.read.from_top(word)
                else:
                    score, output = self._score_and_read(head, features)
            if rule.streak:
                score = self._extend_streak(score)
            passed = self.policy.passes(layer, score, self._progress())
        # One transfer to the host per layer: how many leave, and whether all is well.
        leaving, broken = torch.stack([passed.sum(), torch.isnan(score).sum()]).tolist()
        mark("check")
        if broken and not skip and not (last and rule.reads == "state"):
            raise ValueError(
                f"{rule.name} is NaN at layer {layer}: the weights hold NaN or infinity"
            )
        if not leaving and not last:
            return None
        order = passed.argsort(stable=True, descending=True)
        gone, stay = (order, order[:0]) if last else order.tensor_split([leaving])
        tokens, hidden = self.alive[gone], state.hidden.index_select(0, gone)
        self.scores[tokens] = score[gone]
        self.exit_layers[tokens] = torch.where(passed[gone], layer, self.model.n_layers)
        self.alive = self.alive[stay]
        mark("gather/scatter")
        if output is not None:
            self._store(tokens, output.index_select(0, gone))
            mark("gather/scatter")
        elif self.read is not None:
            seen = head.features(hidden) if features is None else features.index_select(0, gone)
            self.waiting.append((head, tokens, seen))
            mark("head")
        return _Departure(tokens, hidden, stay)

    def _progress(self) -> Tensor | float:
        """Where each alive token stands in its window; only thresholds that decay ask."""
        return self.progress[self.alive] if self.policy.decay else 0.0

    def _score_and_read(self, head: ExitHead, features: Tensor) -> tuple[Tensor, Tensor]:
        score, output = [], []
        for part, logits in head.unembedding.chunks(features):
            score.append(self.policy.rule.score(logits))
            output.append(self.read(logits, self.alive[part]))
        return torch.cat(score), torch.cat(output)

    def _extend_streak(self, reading: Tensor) -> Tensor:
        same = reading == self.reading[self.alive]
        streak = torch.where(same, self.streak[self.alive] + 1, 0)
        self.reading[self.alive], self.streak[self.alive] = reading, streak
        return torch.where(reading.isnan(), reading, streak)  # a broken reading stays visible

    def _store(self, tokens: Tensor, output: Tensor) -> None:
        if self.outputs is None:
            self.outputs = output.new_empty(len(self.exit_layers), *output.shape[1:])
        self.outputs = self.outputs.index_copy(0, tokens, output)

    def finish(self) -> ExitRun:
        by_unembedding: dict[int, list] = {}
        for departure in self.waiting:
            by_unembedding.setdefault(id(departure[0].unembedding), []).append(departure)
        for departures in by_unembedding.values():
            tokens = torch.cat([tokens for _, tokens, _ in departures])
            if len(tokens):
                # Sorted here, where rows are narrow, outputs need no scattering.
                tokens, order = tokens.sort()
                features = torch.cat([features for *_, features in departures])
                features = features.index_select(0, order)
                self.mark("gather/scatter")
                head = departures[0][0]
                outputs = self.read.from_features(head.unembedding, features, tokens)
                self.mark("head")
                if len(tokens) == len(self.exit_layers):
                    self.outputs = outputs
                else:
                    self._store(tokens, outputs)
                self.mark("gather/scatter")
        return ExitRun(self.outputs, self.exit_layers, self.scores)
