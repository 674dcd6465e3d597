"""Peaks of every way of running hold at least what they return, and exits never hold more logits."""

from __future__ import annotations

import pytest
import torch

from earlyexit.cost.memory import MIB, RETURNED, SCORED, memory_parts, peak_memory, peak_resident
from earlyexit.exits.policy import ExitPolicy


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
