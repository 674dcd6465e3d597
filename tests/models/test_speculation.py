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
from earlyexit.nn.decode_loops import distribution

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


@pytest.fixture
def agreeing():
    """Deeper layers that add nothing, and an exit without a translator: every word is the last's."""
    model = gated(decoder("llama")).double()
    with torch.no_grad():
        for block in model.blocks[2:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return model


def test_drafts_that_agree_all_stand_and_are_verified_at_once(agreeing):
    made = decode_with_drafts(agreeing, PROMPTS[:1], 12, Drafts(1, 3))
    drafted, decided, stood, rows = made.drafts.numpy()
    assert drafted.sum() == decided.sum() == stood.sum() == 9
    # Three rounds of 3 drafted words and one more.
    assert rows[-1].tolist() == [0, 0, 0, 12] and rows[0].tolist() == [12, 0, 0, 0]


@torch.no_grad()
def test_the_gate_decides_how_long_a_draft_is():
    """Words stand only where the gate, which reads the state after the exit, expected agreement."""
    model = gated(decoder("llama")).double()
    of = {a: decode_with_drafts(model, PROMPTS, 12, Drafts(1, 4, a)) for a in (0.0, 0.5, 1.0)}
    drafted = {a: int(made.drafts[0].sum()) for a, made in of.items()}
    assert drafted[1.0] == 0 < drafted[0.5] < drafted[0.0]
    ids, exits = of[0.5].ids, of[0.5].exits
    state = model.hidden_states(ids[:, :-1])[2]
    expected = model.gates(1, state.flatten(0, 1))[:, 1].sigmoid().view(exits.shape)
    assert (exits == 1).any() and (expected[exits == 1] >= 0.5).all()


def test_a_stop_word_ends_a_sequence_within_a_draft():
    model = gated(decoder("llama")).double()
    free = decode_with_drafts(model, PROMPTS, 12, Drafts(1, 0))
    stop = free.ids[0, 12].item()
    made = decode_with_drafts(model, PROMPTS, 12, Drafts(1, 4), stop=[stop])
    for b, words in enumerate(free.ids[:, 9:].tolist()):
        kept = words[: words.index(stop) + 1] if stop in words else words
        assert made.ids[b, 9 : 9 + len(kept)].tolist() == kept and made.new[b] == len(kept)


def test_nothing_is_drafted_behind_a_stop_word(agreeing):
    words = decode_with_drafts(agreeing, PROMPTS[:1], 4, Drafts(1, 0)).ids[0, 9:].tolist()
    assert words[1] not in words[:1]
    made = decode_with_drafts(agreeing, PROMPTS[:1], 12, Drafts(1, 6), stop=[words[1]])
    drafted, decided, stood, rows = made.drafts.numpy()
    assert made.ids[0, 9:].tolist() == words[:2]
    assert drafted.sum() == decided.sum() == stood.sum() == 2
    assert rows[0].sum() == rows[-1].sum() == rows[-1, 1] == 2  # one for each, verified at once


@torch.no_grad()
def test_drawn_words_are_distributed_as_the_last_layer_s():
    """Three words at once, two of them drafted, among the most probable ones of a flatter softmax."""
    model = gated(decoder("llama", vocab_size=4, num_hidden_layers=2), exits=2).double()
    prompt, draws, temperature, top_p = torch.tensor([[3, 1]]), 2_000, 1.3, 0.9
    wanted, p = np.full((4, 4, 4), float(draws)), np.empty(4)
    drafted = wanted.copy()  # as if none was verified
    for words in np.ndindex(4, 4, 4):
        ids = torch.tensor([[3, 1, *words]])
        early = model.head(0)(model.hidden_states(ids)[1])[0, 1:4]
        for told, logits in (wanted, model.decoder(ids).logits[0, 1:4]), (drafted, early):
            for row, word in zip(logits.numpy(), words, strict=True):
                distribution(row, temperature, top_p, p)
                told[words] *= p[word]
    made = decode_with_drafts(
        model, prompt.expand(draws, -1), 3, Drafts(0, 3), temperature,
        torch.Generator().manual_seed(0), top_p=top_p,
    )  # fmt: skip
    counted = np.zeros((4, 4, 4))
    np.add.at(counted, tuple(made.ids[:, 2:].T.numpy()), 1)
    assert not counted[wanted == 0].any()
    assert chisquare(counted[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3
    apart = np.abs(counted - drafted).sum() / draws
    assert apart > 3 * np.abs(counted - wanted).sum() / draws


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"drafts": Drafts(3, 2)}, "exit_layer=3: must be ≤ 2"),
        ({"drafts": Drafts(0, -1)}, "longest=-1"),
        ({"drafts": Drafts(0, 65)}, "longest=65: must be ≤ 64"),
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


def test_one_exit_drafts_nothing():
    with pytest.raises(ValueError, match="attach with two or more"):
        decode_with_drafts(gated(decoder("gpt2"), exits=1), PROMPTS, 2, Drafts())


def test_a_gate_that_was_not_fitted_is_not_asked():
    model = gated(decoder("gpt2"))
    model.gates.trained.fill_(False)
    with pytest.raises(ValueError, match="not fitted"):
        decode_with_drafts(model, PROMPTS, 2, Drafts(0, 2, 0.5))
