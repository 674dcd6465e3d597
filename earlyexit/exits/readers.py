"""A reader takes from each token's prediction what a run is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from earlyexit.corpus.windows import checked_targets
from earlyexit.nn.unembedding import Unembedding, finite_words, nll_of_logits


class Reader:
    """A reader takes something from each token's prediction; this one takes all logits."""

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Read logits ``(T′, V)`` of the tokens ``(T′,)``, which are indices of the flattened batch."""
        return logits

    def from_top(self, word: Tensor) -> Tensor | None:
        """Read the most probable word ``(T′,)``; None where that is not enough."""
        return None

    def from_features(self, unembedding: Unembedding, features: Tensor, tokens: Tensor) -> Tensor:
        """Read features ``(T′, D)`` by the cheapest way there is."""
        chunks = unembedding.chunks(features)
        return torch.cat([self(logits, tokens[part]) for part, logits in chunks])


class Scores(Reader):
    """It takes the NLL of ``targets`` ``(T,)`` in nats, 0 where they are ``IGNORE``.

    Raises:
        TypeError, ValueError: see :func:`earlyexit.corpus.windows.checked_targets`.
    """

    def __init__(self, targets: Tensor, vocab_size: int):
        self.targets = checked_targets(targets, vocab_size)

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return nll_of_logits(logits, self.targets[tokens])

    def from_features(self, unembedding: Unembedding, features: Tensor, tokens: Tensor) -> Tensor:
        return unembedding.nll(features, self.targets[tokens])


class Predictions(Reader):
    """It takes the most probable word.

    Raises:
        ValueError: logits are not finite.
    """

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return finite_words(*logits.max(dim=-1))

    def from_top(self, word: Tensor) -> Tensor:
        return word

    def from_features(self, unembedding: Unembedding, features: Tensor, tokens: Tensor) -> Tensor:
        return unembedding.predict(features)
