"""Ways of decoding by drafts are timed on one model, and leave it as it was."""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import decoder, gated

from earlyexit.evaluation import peers
from earlyexit.evaluation.peers import decoding_times, peer_table
from earlyexit.models.attach import FAMILIES

PROMPTS = torch.randint(3, 61, (2, 6), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_the_same_words_in_every_way(family):
    model = gated(decoder(family))
    usual = model.decoder.config.to_dict()
    table = peer_table(model, PROMPTS, 5, 1)
    measured = table[table["basis"] == "measured"].set_index("system")
    assert measured["agreement"].eq(1).all()
    assert measured.index.str.startswith("here, drafts").sum() == 6
    assert measured.index.str.startswith("transformers").any() == (family not in peers.WHOLE)
    assert model.decoder.config.to_dict() == usual
    assert model.decoder.config._attn_implementation == "earlyexit"


def test_a_library_that_fails_leaves_the_decoder_whole():
    model = gated(decoder("llama"))
    with pytest.raises(RuntimeError, match="inside"), peers._own_attention(model):
        model.decoder.config.num_hidden_layers = 1
        raise RuntimeError("inside")
    assert model.decoder.config.num_hidden_layers == 4


def test_a_way_that_says_fewer_words_is_not_faster_for_it(monkeypatch):
    """Speed is that of a word, and words that one way lacks do not agree."""
    now = [0.0]
    monkeypatch.setattr(peers.time, "perf_counter", lambda: now[0])

    def saying(words, seconds):
        def way(prompt, n_new):
            now[0] += words * seconds
            return torch.arange(words)

        return way

    ways = {"plain": saying(20, 1.0), "short": saying(2, 0.5)}
    short = decoding_times(ways, PROMPTS, 20, 3).set_index("system").loc["short"]
    assert short["agreement"] == pytest.approx(2 / 20)
    assert short["speedup_time"] == short["speedup_time_low"] == pytest.approx(2.0)
    assert short["tokens_per_second"] == pytest.approx(2.0)


def test_quoted_figures_have_a_source():
    quoted = peers.quoted()
    assert quoted["source"].str.len().gt(5).all() and quoted["basis"].eq("quoted").all()
