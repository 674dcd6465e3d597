"""Measure which words leave early: by class, by position in a window, and one by one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from earlyexit.calibration.trace import ExitTrace
from earlyexit.corpus.corpus import Corpus
from earlyexit.corpus.documents import document_lines
from earlyexit.corpus.load import encode_texts
from earlyexit.corpus.windows import IGNORE, loader
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.statistics import layers_executed

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


def as_written(corpus: Corpus, text: str, limit: int | None = None) -> list[str]:
    """Return the first words of a text as its reader wrote them, ``<eos>`` after each line."""
    words: list[str] = []
    for line in document_lines(text, corpus.config):
        spans = corpus.tokenizer.encode(line, add_special_tokens=False).offsets
        words += [*(line[start:end] for start, end in spans), "<eos>"]
        if limit and len(words) >= limit:
            break
    return words[:limit]


@torch.no_grad()
def score(
    model: EarlyExitModel, corpus: Corpus, text: str, policy: ExitPolicy | None
) -> pd.DataFrame:
    """Run a model over a text, and return what each word took.

    Exited words really leave the computation. A text longer than a window is read window by window.

    Args:
        policy: None runs full depth.

    Returns:
        One row per word, and one per end of a line: columns word (as it is written), known (whether it
        is in the vocabulary; the model reads ``<unk>`` in place of one that is not), layers (executed)
        and nll (nats).

    Raises:
        TypeError, ValueError: the text is no string, or has no word.
    """
    split = encode_texts(corpus, [text], "text")
    losses, exits, device = [], [], next(model.parameters()).device
    for x, y in loader(split, model.n_seq, 32, corpus.eos_id):
        read = model.nll(x.to(device), y.to(device), policy)
        nll, layers = (read, torch.full_like(y, model.n_layers)) if policy is None else read
        losses.append(nll.cpu()[y != IGNORE])
        exits.append(layers.cpu()[y != IGNORE])
    return pd.DataFrame(
        {
            "word": as_written(corpus, text),
            "known": split.ids != corpus.unk_id,
            "layers": layers_executed(torch.cat(exits).numpy(), model.n_layers),
            "nll": torch.cat(losses).double().numpy(),
        }
    )
