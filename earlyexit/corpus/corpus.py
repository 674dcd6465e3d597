"""A corpus is one text, encoded and split, together with the tokenizer that encoded it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer

from earlyexit.corpus.documents import CorpusConfig
from earlyexit.corpus.splits import Split
from earlyexit.corpus.tokenizers import EOS_ID, UNK_ID


@dataclass(frozen=True, eq=False)
class Corpus:
    """A corpus holds the splits of one text under one tokenizer.

    Attributes:
        splits: "train", "fit", "certify", "valid", "test" → Split.
        data_hash: SHA-256 of text, split and tokenizer settings. Equal hashes mean equal ids,
            wherever the text was read from.
    """

    config: CorpusConfig
    tokenizer: Tokenizer
    splits: dict[str, Split]
    data_hash: str
    unk_id: int = UNK_ID
    eos_id: int = EOS_ID

    @property
    def vocab_size(self) -> int:
        """Return how many entries the vocabulary really has, at most ``config.vocab_size``."""
        return self.tokenizer.get_vocab_size()

    @cached_property
    def counts(self) -> np.ndarray:
        """Count how often each id occurs in the training split: (vocab_size,) int64."""
        return np.bincount(self.splits["train"].ids, minlength=self.vocab_size)

    def decode(self, ids: np.ndarray | list[int]) -> list[str]:
        """Return the text of each id, one string each; a part of a multi-byte character is "�"."""
        flat = [int(i) for i in ids]
        if self.config.tokenizer == "word":
            return [self.tokenizer.id_to_token(i) for i in flat]
        return [self.tokenizer.decode([i], skip_special_tokens=False) for i in flat]
