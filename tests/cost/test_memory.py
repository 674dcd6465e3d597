"""Peaks of every way of running hold at least what they return, and exits never hold more logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from earlyexit.cost import memory
from earlyexit.cost.memory import MIB, RETURNED, SCORED, memory_parts, peak_memory, peak_resident
from earlyexit.exits.policy import ExitPolicy
from earlyexit.nn.config import ModelConfig

SMALL = ModelConfig(40, 16, 3, n_seq=16, num_experts=2, bk_heads=4, dropout_p=0.0, gate_hidden=0)


@pytest.mark.slow
def test_peaks_by_execution(make_model, make_tokens, make_policy):
    model, x = make_model(vocab_size=2000), make_tokens(8, 12)
    policy = make_policy(model, x, "gate")
    table = peak_memory(model, x, x, policy, 0.5).set_index(["output", "execution"])
    logits = x.numel() * 2000 * 4 / MIB
    assert (table.loc[RETURNED, "peak_mib"] >= logits - 1e-9).all()
    assert table.loc[(RETURNED, "full depth"), "logits_mib"] == pytest.approx(logits)
    assert (table.loc[SCORED, "logits_mib"] == 0).all()
    worst = table.loc[(RETURNED, "original's procedure"), "peak_mib"]
    assert worst > table.loc[(RETURNED, "full depth"), "peak_mib"]
    held = memory_parts(model, 8).set_index("part")["mib"]
    assert held["logits of one batch"] == pytest.approx(logits)


@pytest.mark.slow
def test_a_child_process_grows_by_the_logits_it_returns(make_model):
    config = make_model(vocab_size=20_000, n_seq=128).config
    grown = peak_resident(config, 8, ExitPolicy.static(1, 3), 0.5, (RETURNED, "full depth"))
    assert grown >= 0.8 * 8 * 128 * 20_000 * 4 / MIB
    assert torch.is_grad_enabled()


@pytest.mark.slow
def test_memory_grows_with_the_batch_and_the_length(make_model, make_tokens):
    model, x, y = make_model(), make_tokens(4, 12), make_tokens(4, 12, 1)
    policy = ExitPolicy.static(1, 3)
    pairs = [(x[:size], y[:size]) for size in (1, 4)]
    table = memory.memory_over_batches(model, pairs, policy, 0.5)
    peak = table.pivot(index="batch", columns=["output", "execution"], values="peak_mib")
    assert peak.index.tolist() == [1, 4] and (peak.loc[4] > peak.loc[1]).all()
    table = memory.memory_over_lengths(SMALL, [8, 32], torch.device("cpu"))
    logits = table[table["output"] == "logits returned"].groupby("length")["logits_mib"].first()
    assert logits.tolist() == pytest.approx([n * 40 * 4 / 2**20 for n in (8, 32)])
    assert np.isfinite(table["peak_mib"]).all()


def test_a_row_per_measured_process(monkeypatch):
    monkeypatch.setattr(memory, "peak_resident", lambda *arguments: len(arguments[-1][1]))
    keys = [("scored in chunks", "full depth"), ("scored in chunks", "compacted")]
    table = memory.resident_memory(SMALL, 2, ExitPolicy.static(1, 3), 0.5, keys)
    assert table[["output", "execution"]].to_records(index=False).tolist() == keys
    assert table["resident_mib"].tolist() == [10, 9]
