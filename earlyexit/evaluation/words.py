"""Measure which classes of words leave early, and at which positions of a window."""

from __future__ import annotations

import numpy as np
import pandas as pd

from earlyexit.calibration.trace import ExitTrace
from earlyexit.corpus.corpus import Corpus

BANDS = (100, 1000)  # ranks that divide words into frequent, common and rare
SENTENCE_ENDS = (".", "?", "!", "<eos>")


def word_classes(corpus: Corpus, targets: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Return the class of each predicted word ``(T,)``, one of seven names.

    Args:
        targets: ids of consecutive words ``(T,)``.
        document: index of the document of each word ``(T,)``.
    """
    words = np.array(corpus.decode(np.arange(corpus.vocab_size)), dtype=object)
    rank = np.empty(corpus.vocab_size, dtype=int)
    rank[np.argsort(-corpus.counts, kind="stable")] = np.arange(corpus.vocab_size)
    letters = np.array([any(c.isalnum() for c in w) for w in words])
    names = np.select(
        [rank < BANDS[0], rank < BANDS[1]],
        [f"word, top {BANDS[0]}", f"word, top {BANDS[1]:,}"],
        default="word, rarer",
    ).astype(object)
    names[~letters] = "punctuation"
    names[corpus.unk_id], names[corpus.eos_id] = "<unk>", "<eos>"
    found = names[targets]
    ends = np.isin(words, SENTENCE_ENDS)[targets]
    after_end = np.concatenate([[True], ends[:-1] | (document[1:] != document[:-1])])
    found[after_end & letters[targets]] = "first of a sentence"
    return found


def depth_by_class(corpus: Corpus, trace: ExitTrace, layers: np.ndarray) -> pd.DataFrame:
    """Average the layers executed and the NLL by class of the predicted word.

    Args:
        layers: layers executed for each token ``(T,)``.

    Returns:
        Columns word_class, share (of the tokens), layers, nll (at full depth, nats).
    """
    classes = word_classes(corpus, trace.target, trace.document)
    table = pd.DataFrame({"word_class": classes, "layers": layers, "nll": trace.nll[:, -1]})
    groups = table.groupby("word_class")
    out = groups.mean().assign(share=groups.size() / len(table))
    return out.sort_values("layers").reset_index()


def depth_by_position(trace: ExitTrace, layers: np.ndarray, n_bins: int = 16) -> pd.DataFrame:
    """Average layers executed and NLL by position in the window: columns position, layers, nll."""
    edges = np.linspace(0, trace.n_seq, min(n_bins, trace.n_seq) + 1)
    index = np.digitize(trace.position, edges) - 1
    table = pd.DataFrame({"position": edges[index], "layers": layers, "nll": trace.nll[:, -1]})
    return table.groupby("position").mean().reset_index()
