"""Drafts of a Hugging Face decoder's first layers: the words of full depth, and their distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny_decoders import decoder, gated

from earlyexit.models.attach import FAMILIES
from earlyexit.models.speculation import Drafts, decode_with_drafts

PROMPTS = torch.randint(3, 61, (6, 9), generator=torch.Generator().manual_seed(3))
WAYS = (Drafts(1, 0), Drafts(0, 1), Drafts(1, 4), Drafts(2, 3, 0.4))


@pytest.fixture(scope="module", params=FAMILIES)
def attached(request):
    model = gated(decoder(request.param))
    return model if request.param == "mixtral" else model.double()  # its experts know no float64


@torch.no_grad()
def test_words_are_those_of_the_decoder(attached):
    """By hand: at every word the decoder itself is run again over all before it."""
    wanted = PROMPTS
    for _ in range(12):
        wanted = torch.cat([wanted, attached.decoder(wanted).logits[:, -1:].argmax(-1)], dim=1)
    for drafts in WAYS:
        made = decode_with_drafts(attached, PROMPTS, 12, drafts)
        assert torch.equal(made.ids, wanted), drafts
        drafted, decided, stood, rows = made.drafts.numpy()
        assert stood.sum() <= decided.sum() <= drafted.sum()
        assert (drafted.sum() > 0) == (drafts.longest > 0)
        assert made.layers == pytest.approx(rows.sum() / 72)
        assert (made.exits == drafts.exit_layer).sum() == stood.sum()


def test_stages_of_several_layers_and_the_contract_say_the_same():
    model = gated(decoder("llama"), exits=2).double()
    wanted = model.decode(PROMPTS, 8).ids
    for drafts in (Drafts(0, 0), Drafts(0, 3), Drafts(0, 8, 0.5)):
        assert torch.equal(decode_with_drafts(model, PROMPTS, 8, drafts).ids, wanted)


def test_drafts_that_agree_all_stand_and_are_verified_at_once():
    """Deeper layers that add nothing, and an exit without a translator: every word is the last's."""
    model = gated(decoder("llama")).double()
    with torch.no_grad():
        for block in model.blocks[2:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    made = decode_with_drafts(model, PROMPTS[:1], 12, Drafts(1, 3))
    drafted, decided, stood, rows = made.drafts.numpy()
    assert drafted.sum() == decided.sum() == stood.sum() == 9
    # Three rounds of 3 drafted words and one more.
    assert rows[-1].tolist() == [0, 0, 0, 12] and rows[0].tolist() == [12, 0, 0, 0]


def test_the_gate_decides_how_long_a_draft_is():
    model = gated(decoder("llama")).double()
    of = {a: decode_with_drafts(model, PROMPTS, 12, Drafts(1, 4, a)) for a in (0.0, 0.5, 1.0)}
    drafted = {a: int(made.drafts[0].sum()) for a, made in of.items()}
    assert drafted[1.0] == 0 < drafted[0.5] < drafted[0.0]


def test_a_stop_word_ends_a_sequence_within_a_draft():
    model = gated(decoder("llama")).double()
    free = decode_with_drafts(model, PROMPTS, 12, Drafts(1, 0))
    stop = free.ids[0, 12].item()
    made = decode_with_drafts(model, PROMPTS, 12, Drafts(1, 4), stop=[stop])
    for b, words in enumerate(free.ids[:, 9:].tolist()):
        kept = words[: words.index(stop) + 1] if stop in words else words
        assert made.ids[b, 9 : 9 + len(kept)].tolist() == kept and made.new[b] == len(kept)


@torch.no_grad()
def test_drawn_words_are_distributed_as_the_last_layer_s():
    model = gated(decoder("llama", vocab_size=6, num_hidden_layers=2), exits=2).double()
    prompt, draws = torch.tensor([[3, 5]]), 1_000
    p = model.decoder(prompt).logits[0, -1].softmax(-1).numpy()
    q = model.head(0)(model.hidden_states(prompt)[1])[0, -1].softmax(-1).numpy()
    generator = torch.Generator().manual_seed(0)
    made = decode_with_drafts(model, prompt.expand(draws, -1), 2, Drafts(0, 1), 1.0, generator)
    counted = np.bincount(made.ids[:, 2].numpy(), minlength=6)
    assert chisquare(counted, draws * p / p.sum()).pvalue > 1e-3
    assert chisquare(counted, draws * q / q.sum()).pvalue < 1e-9  # a draft that is not verified


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"drafts": Drafts(3, 2)}, "exit_layer=3: must be ≤ 2"),
        ({"drafts": Drafts(0, -1)}, "longest=-1"),
        ({"drafts": Drafts(0, 1, 1.5)}, "agreement=1.5"),
        ({"n_new": -1}, "n_new=-1"),
        ({"n_new": 60}, "9 \\+ 60 tokens exceed n_seq=64"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"stop": [61]}, "stop=61"),
        ({"prompt": torch.zeros(1, 0, dtype=torch.long)}, "expected token ids"),
    ],
)
def test_what_cannot_be_decoded_is_refused(options, told):
    model = gated(decoder("gpt2"))
    usual = {"prompt": PROMPTS, "n_new": 2, "drafts": Drafts(1, 2)}
    with pytest.raises(ValueError, match=told):
        decode_with_drafts(model, **usual | options)


def test_a_gate_that_was_not_fitted_is_not_asked():
    model = gated(decoder("gpt2"))
    model.gates.trained.fill_(False)
    with pytest.raises(ValueError, match="not fitted"):
        decode_with_drafts(model, PROMPTS, 2, Drafts(0, 2, 0.5))
