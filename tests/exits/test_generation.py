"""Decoding: step by step is the whole sequence, drafts change no word, drawing has the right shares."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from earlyexit.corpus.windows import IGNORE
from earlyexit.exits.fused import fusable
from earlyexit.exits.policy import ExitPolicy
from earlyexit.nn.decode_loops import distribution, draw

ADAPTIVE = {"output_head": "adaptive", "tie_embeddings": False, "exit_head": "own"}
PLAIN_BLOCKS = [
    {},
    ADAPTIVE,
    {"exit_head": "own", "top_k": 2, "gate_hidden": 5},
    {"exit_head": "full", "tie_embeddings": False, "bk_values": 1},
    {"left_behind": "kept"},
    ADAPTIVE | {"left_behind": "potentials"},
]


def through_the_contract(model, *arguments, **options):
    """What decoding gives that knows no compiled loops."""
    return model.decode(*arguments, fused=False, **options)


# ---------------------------------------------------------------- the same words


@pytest.mark.parametrize("changes", PLAIN_BLOCKS)
@pytest.mark.parametrize("criterion", [None, "gate", "agreement", "depth"])
def test_compiled_loops_are_the_contract(make_model, make_tokens, make_policy, changes, criterion):
    model, prompt = make_model(2, **changes).double(), make_tokens(5, 4)
    policy = ExitPolicy.static(1, 3) if criterion == "depth" else None
    if criterion in ("gate", "agreement"):
        policy = make_policy(model, make_tokens(6, 12), criterion)
    assert fusable(model)
    found = model.decode(prompt, 9, policy)
    truth = through_the_contract(model, prompt, 9, policy)
    assert torch.equal(found.ids, truth.ids) and torch.equal(found.exits, truth.exits)
    if criterion in ("gate", "agreement"):
        assert len(found.exits.unique()) == 3 and found.layers < 3


def test_thresholds_fall_with_the_position_in_both(make_model, make_tokens):
    model, prompt = make_model().double(), make_tokens(6, 2)
    policy = ExitPolicy("agreement", (0.55, 0.55, math.inf), decay=5.0)
    found, truth = model.decode(prompt, 10, policy), through_the_contract(model, prompt, 10, policy)
    assert torch.equal(found.exits, truth.exits) and torch.equal(found.ids, truth.ids)
    assert not torch.equal(
        found.exits, model.decode(prompt, 10, ExitPolicy(*policy_parts(policy))).exits
    )


def policy_parts(policy: ExitPolicy) -> tuple:
    return policy.criterion, policy.thresholds


@pytest.mark.parametrize("changes", [{"mixing": "attention"}, {"bk_values": 0}, {"causal": False}])
def test_other_models_decode_as_they_did(make_model, make_tokens, changes):
    model, prompt = make_model(**changes).double(), make_tokens(2, 3)
    assert not fusable(model)
    ids, _ = model.generate(prompt, 5)
    for at in range(3, 8):
        assert torch.equal(model.predict(ids[:, :at])[:, -1], ids[:, at])


@pytest.mark.parametrize("way", ["loops", "contract"])
@pytest.mark.parametrize("max_draft", [0, 3])
def test_each_sequence_of_a_batch_is_the_one_alone(make_model, make_tokens, way, max_draft):
    if way == "contract" and max_draft:
        pytest.skip("the contract makes no drafts")
    model, x = make_model(3).double(), make_tokens(4, 7)
    decode = (
        model.decode if way == "loops" else lambda *a, **k: through_the_contract(model, *a, **k)
    )
    prompts = [x[0, :1], x[1, :4], x[2, :7], x[3, :2]]
    policy = ExitPolicy("agreement", (0.5, 0.5, math.inf))
    free = [decode(one[None], 5, policy, max_draft=max_draft) for one in prompts]
    stop = [free[1].ids[0, 6].item()]  # ends at least one of them early
    made = decode(prompts, 5, policy, max_draft=max_draft, stop=stop)
    assert made.ids.shape[0] == 4 and min(made.new) < 5
    for b, one in enumerate(free):
        words = one.ids[0, len(prompts[b]) :].tolist()
        kept = words[: words.index(stop[0]) + 1] if stop[0] in words else words
        end = len(prompts[b]) + len(kept)
        assert made.ids[b, :end].tolist() == [*prompts[b].tolist(), *kept] and made.new[b] == len(
            kept
        )
        assert made.exits[b, : end - 1].tolist() == one.exits[0, : end - 1].tolist()
        assert (made.ids[b, end:] == IGNORE).all() and (made.exits[b, end - 1 :] == IGNORE).all()


def test_words_are_told_as_they_come(make_model, make_tokens):
    model, prompt = make_model(), make_tokens(2, 3)
    for options in ({}, {"policy": ExitPolicy.static(0, 3), "max_draft": 3}):
        heard = [[], []]
        made = model.decode(prompt, 6, told=lambda b, words, h=heard: h[b].extend(words), **options)
        assert heard == made.ids[:, 3:].tolist()
        assert torch.equal(made.ids, model.generate(prompt, 6, **options)[0])


def test_full_depth_runs_no_exit_head(make_model, make_tokens):
    model, prompt = make_model(exit_head="own"), make_tokens(2, 3)
    ids, _ = model.generate(prompt, 6)
    with torch.no_grad():
        for block in model.blocks[:-1]:
            for parameter in block.exit_classifier.parameters():
                parameter.fill_(torch.nan)
    assert torch.equal(model.generate(prompt, 6)[0], ids)
    with pytest.raises(ValueError, match="NaN"):
        model.generate(prompt, 6, ExitPolicy.static(0, 3))


def test_changed_weights_are_read_again(make_model, make_tokens):
    model, prompt = make_model(), make_tokens(2, 3)
    before = model.generate(prompt, 6)[0]
    with torch.no_grad():
        model.token_embedding.weight.mul_(-1)
    after = model.generate(prompt, 6)[0]
    assert not torch.equal(before, after)
    assert torch.equal(after[:, -1], model.predict(after[:, :-1])[:, -1])


# ---------------------------------------------------------------- lossless


@pytest.fixture(scope="module")
def thousand(make_tokens):
    return make_tokens(1024, 3)


DRAFTING = {
    "exit 1": (ExitPolicy.static(0, 3), 4),
    "exit 2": (ExitPolicy.static(1, 3), 1),
    "gate": (ExitPolicy("agreement", (0.45, 0.35, math.inf)), 3),
}


@pytest.mark.parametrize("how", DRAFTING)
@pytest.mark.parametrize("changes", [{}, ADAPTIVE])
def test_drafts_change_no_word_of_a_thousand_prompts(make_model, thousand, how, changes):
    policy, max_draft = DRAFTING[how]
    model = make_model(1, **changes).double()
    plain = model.generate(thousand, 10)[0]
    made = model.decode(thousand, 10, policy, max_draft=max_draft)
    assert torch.equal(made.ids, plain)
    assert torch.equal(model.predict(plain[:, :-1])[:, 2:], plain[:, 3:])  # by torch, all at once
    drafted, decided, stood, _ = made.drafts
    assert 0 < stood.sum() < decided.sum() <= drafted.sum()
    assert (made.exits[:, 2:] < 3).sum() == stood.sum()
    # The control: taken without being verified, the same drafts are other words.
    assert not torch.equal(model.generate(thousand, 10, policy)[0], plain)


def test_in_float32_words_differ_at_ties_alone(make_model, thousand):
    model = make_model(1)
    plain = model.generate(thousand, 10)[0]
    for policy, max_draft in DRAFTING.values():
        ids = model.generate(thousand, 10, policy, max_draft=max_draft)[0]
        rows = (ids != plain).any(dim=1).nonzero().flatten()
        for row in rows.tolist():
            at = (ids[row] != plain[row]).nonzero()[0].item()
            top = model(plain[row : row + 1, :at])[0, -1].topk(2)
            assert top.values.diff().abs() < 1e-5
            assert {ids[row, at].item(), plain[row, at].item()} == set(top.indices.tolist())
        assert len(rows) <= 2


def test_what_a_draft_ran_is_counted(make_model, make_tokens):
    model, prompt = make_model().double(), make_tokens(3, 2)
    for draft in (1, 3):
        made = model.decode(prompt, 8, ExitPolicy.static(0, 3), max_draft=draft)
        drafted, decided, _, rows = made.drafts.numpy()
        passes = rows[-1] // np.arange(1, draft + 2)
        assert drafted.sum() == (passes * np.arange(draft + 1)).sum() >= decided.sum()
        assert (rows.sum(axis=1) == rows[0, 0]).all()  # every row drafted by itself, then joined
        assert made.layers == pytest.approx(rows.sum() / 24)


# ---------------------------------------------------------------- drawn words


def shares(ids: torch.Tensor, first: int, vocabulary: int) -> np.ndarray:
    """How often each continuation by two words occurs."""
    return np.bincount(
        (ids[:, first] * vocabulary + ids[:, first + 1]).numpy(), minlength=vocabulary**2
    )


@torch.no_grad()
def exact(model, prompt: torch.Tensor, temperature: float, top_p: float) -> np.ndarray:
    """The probability of each continuation by two words, from the logits of whole sequences."""
    V = model.vocab_size

    def probabilities(x):
        p = (model(x)[:, -1].double() / temperature).softmax(dim=-1)
        ordered, order = p.sort(dim=-1, descending=True)
        kept = ordered * (ordered.cumsum(dim=-1) - ordered < top_p)
        return (kept / kept.sum(dim=-1, keepdim=True)).gather(1, order.argsort(dim=-1)).numpy()

    first = probabilities(prompt[:1])[0]
    both = torch.cat([prompt[:1].expand(V, -1), torch.arange(V)[:, None]], dim=1)
    return (first[:, None] * probabilities(both)).ravel()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 0.8)])
def test_drawn_drafts_are_distributed_as_full_depth(make_model, temperature, top_p):
    model = make_model(4, vocab_size=6, n_seq=4).double()
    prompt = torch.tensor([[2, 5]]).expand(20_000, -1)
    wanted = exact(model, prompt, temperature, top_p)
    likely = 20_000 * wanted > 10  # the others are counted together
    assert likely.sum() > 5

    def p_value(**options) -> float:
        generator = torch.Generator().manual_seed(0)
        ids, _ = model.generate(prompt, 2, options.pop("policy", None), temperature, generator,
                                top_p=top_p, **options)  # fmt: skip
        counted = shares(ids, 2, 6)
        if counted[wanted == 0].any():
            return 0.0
        pooled = [np.append(n[likely], n[~likely].sum()) for n in (counted, 20_000 * wanted)]
        keep = pooled[1] > 0
        return chisquare(pooled[0][keep], pooled[1][keep]).pvalue

    early = ExitPolicy.static(0, 3)
    assert p_value() > 1e-3
    assert p_value(policy=early, max_draft=2) > 1e-3
    assert p_value(policy=early) < 1e-9  # the control: drafts that are taken as they are


@pytest.mark.parametrize(("temperature", "top_p"), [*product((0.3, 1.0, 4.0), (0.2, 0.9, 1.0))])
def test_the_fewest_words_of_a_share_are_drawn(temperature, top_p):
    logits, p = np.random.default_rng(0).normal(size=40), np.empty(40)
    assert distribution(logits, temperature, top_p, p)
    soft = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    kept = np.sort(soft[p > 0])[::-1]
    assert kept.sum() >= top_p - 1e-12 and kept[:-1].sum() < top_p
    assert set(np.argsort(-soft)[: len(kept)]) == set(np.flatnonzero(p))
    np.testing.assert_allclose(p[p > 0], soft[p > 0] / kept.sum())
    levels = np.linspace(0, 1, 1000, endpoint=False)
    found = np.bincount([draw(p, u) for u in levels], minlength=40) / 1000
    assert np.abs(found - p).max() < 2e-3


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompt": torch.zeros(1, 0, dtype=torch.long)}, "expected token ids"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": [torch.tensor([1]), torch.tensor([], dtype=torch.long)]}, "prompt 1 is empty"),
        ({"prompt": torch.ones(1, 13, dtype=torch.long)}, "longer than n_seq"),
        ({"n_new": 11}, "3 \\+ 11 tokens exceed n_seq=12"),
        ({"n_new": -1}, "n_new=-1: must be ≥ 0"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0: must lie in \\(0, 1\\]"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"stop": [53]}, "stop=53"),
        ({"max_draft": -1}, "max_draft=-1"),
        ({"max_draft": 2}, "drafts need a policy"),
        ({"max_draft": 2, "policy": ExitPolicy.constant(0.5, 3)}, "drafts need a policy"),
        ({"policy": ExitPolicy.constant(0.5, 4)}, "4 thresholds"),
    ],
)
def test_what_cannot_be_decoded_is_refused(make_model, make_tokens, options, told):
    model = make_model()
    with pytest.raises(ValueError, match=told):
        model.generate(**{"prompt": make_tokens(1, 3), "n_new": 2} | options)
