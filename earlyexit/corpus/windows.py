"""A split is read in windows: inputs and targets of one length, for training and evaluation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from earlyexit.corpus.splits import Split
from earlyexit.corpus.tokenizers import EOS_ID

IGNORE = -100  # target of a padded position, as in torch.nn.functional.cross_entropy


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
    if n_seq < 1:
        raise ValueError(f"n_seq={n_seq}: a window needs at least 1 position")
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
    """
    cut = windows(split, n_seq, eos_id)
    data = TensorDataset(torch.from_numpy(cut.inputs), torch.from_numpy(cut.targets))
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle, generator=generator)
