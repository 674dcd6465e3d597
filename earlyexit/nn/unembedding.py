"""The vocabulary projection works on a few rows at a time.

With 10,000 words the logits of one batch of 32 × 128 tokens take 164 MB, and their gradient as much
again. These functions hold no more than one chunk of about ``CHUNK_ELEMENTS`` of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from earlyexit.corpus.windows import IGNORE, checked_targets
from earlyexit.nn.cross_entropy import (
    CHUNK_ELEMENTS,
    Teacher,
    linear_cross_entropy,
    logit_chunks,
    precise,
)


@torch.no_grad()
def token_nll(features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of ``targets`` ``(T,)`` in nats, 0 where ``IGNORE``.

    Raises:
        TypeError, ValueError: see :func:`earlyexit.corpus.windows.checked_targets`.
    """
    targets = checked_targets(targets, len(weight))
    nll, scored = features.new_zeros(targets.shape), (targets != IGNORE).nonzero().squeeze(1)
    features, wanted = features.index_select(0, scored), targets[scored, None]
    for part, logits in logit_chunks(features, weight, bias, reuse=True):
        log_p = torch.log_softmax(logits, dim=-1, out=logits)
        nll[scored[part]] = -log_p.gather(1, wanted[part]).squeeze(1)
    return nll


def nll_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the NLL ``(T,)`` of checked targets under logits ``(T, V)``, 0 where ``IGNORE``."""
    picked = logits.gather(1, targets.clamp_min(0)[:, None]).squeeze(1)
    return (logits.logsumexp(dim=-1) - picked) * (targets != IGNORE)


def most_probable(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probability and index ``(T,)`` of the most probable word of logits ``(T, V)``."""
    value, word = logits.max(dim=-1)
    return value - logits.logsumexp(dim=-1), word


def finite_words(value: Tensor, word: Tensor) -> Tensor:
    """Return most probable words ``(T,)``, given their logits or log-probabilities ``(T,)``.

    Raises:
        ValueError: one of these is not finite; then no word is the most probable.
    """
    if not value.isfinite().all():
        raise ValueError("logits are not finite: the weights hold NaN or infinity")
    return word


class LinearUnembedding(nn.Linear):
    """A linear unembedding, Linear(D, V), is one product with the whole vocabulary."""

    cheap_top = False  # the most probable word takes all logits

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits ``(…, V)`` of features ``(…, D)``, in float32 at least."""
        return nn.functional.linear(precise(features), *self._matrix())

    def _matrix(self) -> tuple[Tensor, Tensor]:
        return precise(self.weight), precise(self.bias)

    def chunks(self, features: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the :func:`logit_chunks` of features ``(T, D)``."""
        return logit_chunks(precise(features), *self._matrix())

    def nll(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the :func:`token_nll` ``(T,)`` of features ``(T, D)`` and targets ``(T,)``."""
        return token_nll(precise(features), *self._matrix(), targets)

    def top(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the :func:`most_probable` word of features ``(T, D)``."""
        tops = [most_probable(logits) for _, logits in self.chunks(features)]
        return tuple(map(torch.cat, zip(*tops, strict=True)))

    def predict(self, features: Tensor) -> Tensor:
        """Return the :func:`finite_words` ``(T,)`` of features ``(T, D)``."""
        tops = [logits.max(dim=-1) for _, logits in self.chunks(features)]
        return finite_words(*map(torch.cat, zip(*tops, strict=True)))

    def loss(
        self, features: Tensor, targets: Tensor, bf16: bool = False, teacher: Teacher | None = None
    ) -> Tensor:
        """Return the :func:`linear_cross_entropy`, which has gradients."""
        return linear_cross_entropy(features, self.weight, self.bias, targets, bf16, teacher)


class AdaptiveUnembedding(nn.Module):
    """An adaptive softmax (Grave et al. 2017) reads rare words in two clusters of smaller width.

    A rare word costs the head and its cluster only, and probabilities stay exactly normalised. Words
    must be numbered by falling frequency, as the word vocabulary is.

    Args:
        d_model: width D; clusters read D/2 and D/4 of it.
        vocab_size: words V.
        cutoffs: first word of each cluster, by default V/10 and 4V/10.

    Raises:
        ValueError: the vocabulary is too small to be split in three, or the width is below 4.
    """

    cheap_top = True  # most probable words are mostly frequent ones

    def __init__(self, d_model: int, vocab_size: int, cutoffs: Sequence[int] | None = None):
        super().__init__()
        cutoffs = list(cutoffs or (vocab_size // 10, 4 * vocab_size // 10))
        if d_model < 4 or not 0 < cutoffs[0] < cutoffs[-1] < vocab_size:
            raise ValueError(
                f"no adaptive softmax of {vocab_size} words and width {d_model} with {cutoffs=}:"
                " use output_head='linear'"
            )
        self.vocab_size = vocab_size
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(
            d_model, vocab_size, cutoffs, div_value=2.0, head_bias=True
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return the log-probabilities ``(…, V)`` of features ``(…, D)``."""
        flat = precise(features.reshape(-1, features.shape[-1]))
        return self._precise().log_prob(flat).view(*features.shape[:-1], self.vocab_size)

    def _precise(self) -> nn.AdaptiveLogSoftmaxWithLoss:
        """Return the softmax, or of one in half precision a copy in float32."""
        half = self.softmax.head.weight.itemsize < 4
        return copy.deepcopy(self.softmax).float() if half else self.softmax

    def chunks(self, features: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield log-probabilities ``(rows, V)`` of features ``(T, D)``, chunk by chunk."""
        features, softmax = precise(features), self._precise()
        parts = self._parts(features, self.vocab_size)
        return ((part, softmax.log_prob(features[part])) for part in parts)

    @torch.no_grad()
    def nll(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the NLL ``(T,)``, 0 where ``IGNORE``; a cluster is opened for its own words only.

        It is that of ``softmax``, but a cluster works on its words of all chunks at once, and the
        head's logits are written over by their log-softmax.

        Raises:
            TypeError, ValueError: see :func:`earlyexit.corpus.windows.checked_targets`.
        """
        features, softmax = precise(features), self._precise()
        head, (column, clusters) = softmax.head, self._divided(softmax, targets)
        nll = token_nll(features, head.weight, head.bias, column)
        for rows, narrow, words, index in clusters:
            nll[rows] += token_nll(narrow(features[rows]), words.weight, None, index)
        return nll

    def _divided(
        self, softmax: nn.AdaptiveLogSoftmaxWithLoss, targets: Tensor
    ) -> tuple[Tensor, list[tuple[Tensor, nn.Module, nn.Module, Tensor]]]:
        """Return each target's column of the head ``(T,)``, and what the clusters have to do.

        That is, for each cluster, the rows whose targets it holds ``(R,)``, its two matrices, and the
        indices in it of the words ``(R,)``.
        """
        targets, cutoffs = checked_targets(targets, self.vocab_size), softmax.cutoffs
        cluster = torch.bucketize(targets, targets.new_tensor(cutoffs[:-1]), right=True)
        clusters = []
        for index, (narrow, words) in enumerate(softmax.tail):
            rows = (cluster == index + 1).nonzero().squeeze(1)
            clusters.append((rows, narrow, words, targets[rows] - cutoffs[index]))
        return torch.where(cluster > 0, cutoffs[0] + cluster - 1, targets), clusters

    def top(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probability and index ``(T,)`` of the most probable word of features ``(T, D)``.

        It is exact: a cluster is opened where all of it outweighs the best word so far.
        """
        features, softmax = precise(features), self._precise()
        parts = self._parts(features, softmax.head_size)
        tops = [_most_probable(softmax, features[part]) for part in parts]
        return tuple(map(torch.cat, zip(*tops, strict=True)))

    def predict(self, features: Tensor) -> Tensor:
        """Return the :func:`finite_words` ``(T,)`` of features ``(T, D)``."""
        return finite_words(*self.top(features))

    def loss(
        self, features: Tensor, targets: Tensor, bf16: bool = False, teacher: Teacher | None = None
    ) -> Tensor:
        """Return the mean NLL over the targets that are not ``IGNORE``, with gradients.

        A teacher supplies its share of the target among the head's columns, frequent words and clusters;
        inside a cluster the word is the whole target.

        Raises:
            TypeError, ValueError: see :func:`earlyexit.corpus.windows.checked_targets`.
        """
        head, (column, clusters) = self.softmax.head, self._divided(self.softmax, targets)
        if teacher is not None:
            teacher = teacher._replace(unembedding=teacher.unembedding.softmax.head)
        loss = linear_cross_entropy(features, head.weight, head.bias, column, bf16, teacher)
        count = (targets != IGNORE).sum().clamp_min(1)
        for rows, narrow, words, index in clusters:
            inside = narrow(features[rows]), words.weight, None, index
            loss = loss + len(rows) / count * linear_cross_entropy(*inside, bf16)
        return loss

    @staticmethod
    def _parts(rows: Tensor, width: int) -> Iterator[slice]:
        step = max(1, CHUNK_ELEMENTS // width)
        return (slice(i, i + step) for i in range(0, max(1, len(rows)), step))


def _most_probable(
    softmax: nn.AdaptiveLogSoftmaxWithLoss, features: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log-probability and index ``(T,)`` of the most probable word of features ``(T, D)``."""
    head = softmax.head(features).log_softmax(dim=-1)  # words, then one column per cluster
    best, word = head[:, : softmax.shortlist_size].max(dim=-1)
    clusters = head[:, softmax.shortlist_size :].unbind(dim=-1)
    firsts = softmax.cutoffs[:-1]
    for first, weight, tail in zip(firsts, clusters, softmax.tail, strict=True):
        rows = (weight > best).nonzero().squeeze(1)
        inside, index = tail(features[rows]).log_softmax(dim=-1).max(dim=-1)
        value, before = weight[rows] + inside, best[rows]
        word[rows] = torch.where(value > before, first + index, word[rows])
        best[rows] = torch.maximum(value, before)
    return best, word


Unembedding = LinearUnembedding | AdaptiveUnembedding
