"""A text is encoded by the tokenizer of an existing model, in the splits that all models read."""

from __future__ import annotations

import hashlib
import json

import numpy as np
from tokenizers import Tokenizer

from earlyexit.corpus.corpus import Corpus
from earlyexit.corpus.documents import ROLES, CorpusConfig, Document, read_documents
from earlyexit.corpus.splits import Split

CHARACTERS = (
    16  # a token has about four; windows are drawn from four times as many as are asked for
)


def foreign_corpus(
    config: CorpusConfig, tokenizer: Tokenizer, eos_id: int, max_train: int = 0
) -> Corpus:
    """Read the text, and encode every document whole, its lines as they stand.

    Args:
        config: which text, and how many articles certify; its vocabulary is not used.
        tokenizer: of the library ``tokenizers``, as ``backend_tokenizer`` of a fast one of transformers.
        eos_id: the id that ends a document, and stands before it.
        max_train: tokens that will be drawn from the training split, of which enough is encoded; 0: all.

    Raises:
        ValueError: the text is missing, empty, not UTF-8, or too short to fill the splits.
    """
    documents = _shortened(read_documents(config), CHARACTERS * max_train)
    encoded = tokenizer.encode_batch(
        ["\n".join(document.lines) for document in documents], add_special_tokens=False
    )
    digest = hashlib.sha256(tokenizer.to_str().encode())
    digest.update(json.dumps([config.name, eos_id]).encode())
    parts: dict[str, list] = {role: [] for role in ROLES}
    for number, (document, found) in enumerate(zip(documents, encoded, strict=True)):
        digest.update(f"\0{document.role}\n".encode() + "\n".join(document.lines).encode())
        ids = np.array([*found.ids, eos_id], np.int32)
        start, end = np.array([*found.offsets, (0, 0)]).reshape(-1, 2).T
        # Parts of one character share its span: count it once.
        characters = np.maximum(0, end - np.maximum(start, np.concatenate([[0], end[:-1]])))
        parts[document.role].append((ids, np.full(len(ids), number), characters))
    data_hash = digest.hexdigest()
    splits = {
        role: Split(
            role, *(np.concatenate(arrays).astype(np.int32) for arrays in zip(*found, strict=True)),
            data_hash,
        )
        for role, found in parts.items()
    }  # fmt: skip
    return Corpus(config, tokenizer, splits, data_hash, unk_id=-1, eos_id=eos_id)


def _shortened(documents: list[Document], characters: int) -> list[Document]:
    """Keep training documents in a random order until they have so many characters; 0 keeps all."""
    train = [number for number, document in enumerate(documents) if document.role == "train"]
    order = np.random.default_rng(0).permutation(train)
    sizes = np.cumsum([sum(map(len, documents[number].lines)) for number in order])
    count = 1 + int(np.searchsorted(sizes, characters)) if characters else len(order)
    kept = set(order[:count].tolist())
    return [d for n, d in enumerate(documents) if d.role != "train" or n in kept]
