"""exits/tally."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from earlyexit.exits.clock import marker
from earlyexit.exits.criteria import ExitState
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.readers import Reader

if TYPE_CHECKING:
    from earlyexit.models.resnet_bk import EarlyExitLanguageModel
    from earlyexit.nn.heads import ExitHead


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


@dataclass
class _Departure:
    """Who left at an exit: ``tokens`` with last states ``hidden`` ``(E, D)``; the rows that stay."""

    tokens: Tensor
    hidden: Tensor
    stay: Tensor


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
