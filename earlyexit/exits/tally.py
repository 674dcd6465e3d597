"""A tally judges running tokens at every exit, and records where they left and what they predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from earlyexit.exits.clock import marker
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.protocol import ExitModel, Observation, Walk
from earlyexit.exits.readers import Reader
from earlyexit.nn.cross_entropy import precise
from earlyexit.nn.heads import ExitHead


@dataclass
class ExitRun:
    """This is the outcome of a run with exits over T = B·N tokens.

    Attributes:
        outputs: what the reader made of each token's logits ``(T, …)``; None without a reader.
        exit_layers: 0-based exit, n_layers where there was none ``(T,)`` int64.
        scores: the criterion's score at the exit or the last layer ``(T,)``; NaN where it has none.
    """

    outputs: Tensor | None
    exit_layers: Tensor
    scores: Tensor


class Tally:
    """A tally judges the tokens of a walk at every exit, and reads each token's prediction once.

    A criterion that needs all logits has paid for the projection: the prediction is read from the same
    chunk. Otherwise the features wait, and are projected together at the end, once per token.

    Args:
        progress: position of each token over n_seq ``(T,)``.
        read: None makes no prediction.
    """

    def __init__(
        self,
        model: ExitModel,
        walk: Walk,
        progress: Tensor,
        policy: ExitPolicy,
        read: Reader | None,
    ):
        self.model, self.walk, self.policy, self.read = model, walk, policy, read
        self.progress = progress
        self.exit_layers = torch.full_like(walk.alive, model.n_layers)
        weight = precise(next(model.parameters())[:0])
        self.scores = torch.full_like(progress, torch.nan, dtype=weight.dtype)
        self.last_word = self.scores.clone()  # what a streak's criterion read at the exit before
        self.streak = torch.zeros_like(self.scores)
        self.outputs: Tensor | None = None
        self.waiting: list[tuple[ExitHead, Tensor, Tensor]] = []
        self.mark = marker()

    def judge(self, layer: int) -> None:
        """Let the running tokens go that pass at ``layer``; at the last layer all go.

        Raises:
            ValueError: a score is NaN where the criterion has one.
        """
        checks, last = self.policy.checks(layer), layer == self.model.n_layers - 1
        alive = self.walk.alive
        if not len(alive) or not (checks or last):
            return
        head, features, output = self.model.head(layer), None, None
        if checks:
            score, features, output = self._score(head, self.walk.observe(layer))
            passed = self.policy.passes(layer, score, self._progress())
        else:
            score, passed = self.scores[alive], torch.zeros_like(alive, dtype=torch.bool)
        # One transfer to the host per layer: how many leave, and whether all is well.
        n_leaving, broken = torch.stack([passed.sum(), torch.isnan(score).sum()]).tolist()
        self.mark("check")
        if broken and checks and not (last and self.policy.rule.reads == "state"):
            raise ValueError(
                f"{self.policy.criterion} is NaN at layer {layer}: the weights hold NaN or infinity"
            )
        if not n_leaving and not last:
            return
        leaving, staying = self._rows(passed | last, len(alive) if last else n_leaving)
        tokens, hidden = alive.index_select(0, leaving), self.walk.states(leaving)
        self.scores.index_copy_(0, tokens, score.index_select(0, leaving).to(self.scores.dtype))
        exit_layer = torch.where(passed.index_select(0, leaving), layer, self.model.n_layers)
        self.exit_layers.index_copy_(0, tokens, exit_layer)
        self.mark("gather/scatter")
        if output is not None:
            self._store(tokens, output.index_select(0, leaving))
            self.mark("gather/scatter")
        elif self.read is not None:
            known = features is not None
            read = features.index_select(0, leaving) if known else head.features(hidden)
            self.waiting.append((head, tokens, read))
            self.mark("head")
        self.walk.leave(layer, leaving, staying, hidden)

    def _score(
        self, head: ExitHead, judged: Observation
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return scores ``(A,)`` and, where the check made them, features and outputs."""
        rule, features, output = self.policy.rule, None, None
        if rule.reads == "state":
            score = precise(rule.score(judged.state))
        else:
            features = head.features(judged.state.hidden)
            if judged.row is not None:  # a few tokens decide for all: nothing to read from
                score, features = rule.of_features(head.unembedding, features), None
            elif rule.cheap(head.unembedding):
                log_p, word = head.unembedding.top(features)
                score, output = rule.of_top(log_p, word), self.read.from_top(word)
            else:
                score, output = self._score_and_read(head, features)
        if rule.streak:
            score = self._extend_streak(judged.tokens, score)
        return (score if judged.row is None else score[judged.row]), features, output

    @staticmethod
    def _rows(passed: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the ``count`` rows that passed, and the others; a known count needs no transfer."""
        sizes = (passed, count), (~passed, len(passed) - count)
        return tuple(torch.nonzero_static(rows, size=n).squeeze(1) for rows, n in sizes)

    def _progress(self) -> Tensor | float:
        """Return each running token's position over n_seq, which only decaying thresholds ask for."""
        return self.progress[self.walk.alive] if self.policy.decay else 0.0

    def _score_and_read(self, head: ExitHead, features: Tensor) -> tuple[Tensor, Tensor]:
        score, output = [], []
        for part, logits in head.unembedding.chunks(features):
            score.append(self.policy.rule.score(logits))
            output.append(self.read(logits, self.walk.alive[part]))
        return torch.cat(score), torch.cat(output)

    def _extend_streak(self, tokens: Tensor, word: Tensor) -> Tensor:
        same = word == self.last_word[tokens]
        streak = torch.where(same, self.streak[tokens] + 1, 0)
        self.last_word[tokens], self.streak[tokens] = word, streak
        return torch.where(word.isnan(), word, streak)  # a broken reading stays visible

    def _store(self, tokens: Tensor, output: Tensor) -> None:
        if self.outputs is None:
            self.outputs = output.new_empty(len(self.exit_layers), *output.shape[1:])
        self.outputs = self.outputs.index_copy(0, tokens, output)

    def finish(self) -> ExitRun:
        """Project the predictions that wait, once per token; the walk is over."""
        self.walk = None  # its states need not stay while words are projected
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
