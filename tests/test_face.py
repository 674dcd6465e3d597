"""What ``from earlyexit import …`` gives; published models are what they were when published."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

import earlyexit
from earlyexit import load
from earlyexit.corpus.load import encode_texts
from earlyexit.corpus.windows import IGNORE, windows
from earlyexit.models.checkpoints import CheckpointError, load_model, save_model
from earlyexit.runs.paths import HOME_VARIABLE, project

FACE = """
    ACTLanguageModel BKCore CRITERIA Certificate CorpusConfig EarlyExitEvaluator
    EarlyExitLanguageModel EarlyExitResNetBKBlock ExitPolicy ExitTrace ModelConfig MoEResNetBKLayer
    MultiScaleLanguageModel SparseBKLanguageModel SparseMoELayer TrainingConfig attach certify
    collect_trace convert_act_to_early_exit explore fit_policy load load_corpus load_model loader
    save_model train train_gates
"""


def test_the_face_is_what_is_announced():
    assert set(earlyexit.__all__) == set(FACE.split())
    assert all(hasattr(earlyexit, name) for name in earlyexit.__all__)


@pytest.fixture(scope="module")
def published():
    return load("cpu", device="cpu")


def test_a_published_model_comes_with_its_text_and_its_certified_policy(published):
    assert published.certificate.check(published.model, published.corpus)
    assert published.policy == published.certificate.policy
    assert published.certificate.epsilon == 0.05
    assert not published.model.training and published.model.gates is not None


TEXT = "My fellow citizens, the state of the Union is strong. We zorgle.\n\nGod bless America!\n"


def test_a_text_is_scored_word_by_word_as_the_model_scores_it(published):
    table = published.score(20 * TEXT)  # three windows
    split = encode_texts(published.corpus, [20 * TEXT], "text")
    assert len(table) == split.n_tokens > 2 * published.model.n_seq
    assert table["word"].tolist()[:6] == ["My", "fellow", "citizens", ",", "the", "state"]
    assert set(table.loc[~table["known"], "word"]) == {"zorgle"}
    cut = windows(split, published.model.n_seq, published.corpus.eos_id)
    x, y = torch.from_numpy(cut.inputs), torch.from_numpy(cut.targets)
    with torch.no_grad():
        nll, exits = published.model.nll(x, y, published.policy, execution="dense")
    kept = y != IGNORE
    assert table["nll"].to_numpy() == pytest.approx(nll[kept].numpy(), abs=1e-4)
    assert table["layers"].tolist() == (exits[kept] + 1).clip(max=4).tolist()
    assert 1 < table["layers"].mean() < 4


@pytest.mark.parametrize("text", ["", " \n ", None, ["a text"]])
def test_what_is_no_text_is_refused(published, text):
    with pytest.raises((TypeError, ValueError), match="text"):
        published.score(text)


def test_what_is_not_published_is_refused_with_what_is():
    for arguments in (("nope",), ("gpu",), ("cpu", 7)):
        with pytest.raises(
            CheckpointError, match=r"there are .*cpu \(seed 0.*\), .*wikitext2 \(seed 0, 1, 2\)"
        ):
            load(*arguments)


@pytest.fixture
def copy(tmp_path, monkeypatch, published):
    """A project with the published model of ``cpu``, to be tampered with; the text is at hand."""
    names = ("model_seed0.safetensors", "certificate.json", "*.run.json")
    for name in names:
        for path in (project().results / "cpu").glob(name):
            target = tmp_path / "results" / "cpu" / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    monkeypatch.setattr("earlyexit.runs.published.load_corpus", lambda *_: published.corpus)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    return tmp_path / "results" / "cpu"


def test_a_changed_file_is_refused(copy):
    save_model(load_model(copy / "model_seed0.safetensors"), copy / "model_seed0.safetensors")
    with pytest.raises(CheckpointError, match="is not the file that was published"):
        load("cpu")


def test_another_text_is_refused(copy, published, monkeypatch):
    other = replace(published.corpus, data_hash="0" * 64)
    monkeypatch.setattr("earlyexit.runs.published.load_corpus", lambda *_: other)
    with pytest.raises(
        ValueError, match=r"digest 0000000000000000, but .* one with digest 474b2432"
    ):
        load("cpu", device="cpu")


def test_a_certificate_of_another_model_is_not_handed_out(copy, published, monkeypatch):
    monkeypatch.setattr("earlyexit.runs.published.check_bytes", lambda _: None)
    replace(published.certificate, model_hash="another", digest="").save(copy / "certificate.json")
    without = load("cpu", device="cpu")
    assert (without.certificate, without.policy) == (None, None)
    assert without.model.fingerprint() == published.model.fingerprint()
