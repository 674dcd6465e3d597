"""A split is read in windows: inputs and targets of one length, for training and evaluation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from earlyexit.checked import whole
from earlyexit.corpus.splits import Split
from earlyexit.corpus.tokenizers import EOS_ID

IGNORE = -100  # target of a padded position, as in torch.nn.functional.cross_entropy

LONGEST = 2**24  # positions of a window


def check_whole(ids: object, name: str) -> None:
    """Raise TypeError unless ``ids`` is a tensor of whole numbers."""
    kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
    if not isinstance(ids, Tensor) or kind.is_floating_point or kind.is_complex or ids.is_quantized:
        raise TypeError(f"{name} are {kind}: give a tensor of whole numbers, such as torch.int64")
    if kind is torch.bool:
        raise TypeError(
            f"{name} are {kind}, which is a mask: give the ids themselves, as torch.int64"
        )


def checked_ids(ids: Tensor, vocab_size: int) -> Tensor:
    """Return token ids of any shape and integer type as int64.

    Raises:
        TypeError: they are no tensor of whole numbers.
        ValueError: one is outside 0 … V − 1.
    """
    check_whole(ids, "token ids")
    _check_range(ids := ids.long(), vocab_size, "token id", "encode the text with this vocabulary")
    return ids


def checked_targets(targets: Tensor, vocab_size: int) -> Tensor:
    """Return targets of any shape and integer type as int64: words 0 … V − 1, or ``IGNORE``.

    Raises:
        TypeError: they are no tensor of whole numbers.
        ValueError: one is neither a word nor ``IGNORE``.
    """
    check_whole(targets, "targets")
    targets = targets.long()
    words = torch.where(targets == IGNORE, 0, targets)
    _check_range(words, vocab_size, "target", f"{IGNORE} is the one that is not scored")
    return targets


def _check_range(ids: Tensor, vocab_size: int, name: str, remedy: str) -> None:
    if ids.numel() == 0:
        return
    low, high = torch.stack(ids.aminmax()).tolist()  # one transfer to the host
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} {wrong} is outside the vocabulary 0 … {vocab_size - 1}: {remedy}")


class Windows(NamedTuple):
    """Windows do not overlap: every token of a split is a target in exactly one of W windows.

    Attributes:
        inputs: (W, n_seq) int64; padding is ``<eos>``.
        targets: (W, n_seq) int64; padding is ``IGNORE``.
        document: (W,) int32, number of the window's document.
        start: (W,) int64, position in the split of the window's first target.
    """

    inputs: np.ndarray
    targets: np.ndarray
    document: np.ndarray
    start: np.ndarray


def windows(split: Split, n_seq: int, eos_id: int = EOS_ID) -> Windows:
    """Cut each document into windows of ``n_seq`` targets, the last one padded on the right.

    The input of a target is the token before it in its document (at a window's first position, the
    last token of the window before), and ``<eos>`` before the document's first token.

    Raises:
        ValueError: ``n_seq`` is less than 1.
    """
    n_seq = whole("n_seq", n_seq, 1, LONGEST)
    first, length = split.spans()
    before = np.concatenate([[eos_id], split.ids[:-1]])[: split.n_tokens]  # (T,)
    before[first] = eos_id
    count = -(-length // n_seq)  # windows per document
    nth = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)  # (W,)
    start = np.repeat(first, count) + nth * n_seq
    position = start[:, None] + np.arange(n_seq)  # (W, n_seq)
    inside = position < np.repeat(first + length, count)[:, None]
    position = np.where(inside, position, 0)
    return Windows(
        np.where(inside, before[position], eos_id).astype(np.int64),
        np.where(inside, split.ids[position], IGNORE).astype(np.int64),
        split.document[start],
        start,
    )


def loader(
    split: Split,
    n_seq: int,
    batch_size: int,
    eos_id: int = EOS_ID,
    shuffle: bool = False,
    seed: int = 0,
) -> DataLoader:
    """Load batches (inputs, targets), both (B, n_seq) int64; the last, smaller batch is kept.

    Windows are shuffled, in an order that depends on ``seed`` and the number of passes made only.

    Raises:
        TypeError, ValueError: a number is not whole, ``n_seq`` or ``batch_size`` is less than 1.
    """
    batch_size, seed = whole("batch_size", batch_size, 1), whole("seed", seed)
    cut = windows(split, n_seq, eos_id)
    data = TensorDataset(torch.from_numpy(cut.inputs), torch.from_numpy(cut.targets))
    data.data_hash = split.data_hash  # a model knows the words of one text
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle, generator=generator)
