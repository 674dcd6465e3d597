"""Hugging Face decoders of every family, tiny and random: logits, exits, stepping, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_decoders import decoder, gated
from torch.utils.flop_counter import FlopCounterMode

from earlyexit import attach
from earlyexit.cost.parts import policy_flops
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.statistics import exit_shares
from earlyexit.models.attach import FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def made(request):
    """(the model, the model with two exits, tokens, its own logits before it was attached)."""
    model = decoder(request.param)
    x = torch.randint(3, 61, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = model(x).logits
    return model, gated(model), x, own


def halfway(attached, x) -> ExitPolicy:
    """A policy by which about four of ten tokens leave at every exit."""
    with torch.no_grad():
        states = [h.flatten(0, 1) for h in attached.hidden_states(x)]
    cuts = [
        attached.gates(k, states[k + 1])[:, 0].exp().quantile(0.4).item()
        for k in range(attached.n_layers - 1)
    ]
    return ExitPolicy("gate", (*cuts, float("-inf")))


def test_full_depth_is_the_model_s_own(made):
    model, attached, x, own = made
    for logits in (attached(x), model(x).logits):
        torch.testing.assert_close(logits.detach(), own, rtol=1e-4, atol=1e-4)
    stages = attach(model, exits=2)
    torch.testing.assert_close(stages(x).detach(), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exits", [2, 4])
@pytest.mark.parametrize("left_behind", ["mapped", "copied", "zeroed"])
def test_compacted_is_dense(made, exits, left_behind):
    model, _, x, _ = made
    attached = gated(model, exits=exits, left_behind=left_behind)
    policy, y = halfway(attached, x), x.roll(-1, 1)
    fast, slow = (attached.nll(x, y, policy, e) for e in ("compacted", "dense"))
    assert (fast[1] == slow[1]).all() and fast[1].unique().numel() > 1
    torch.testing.assert_close(fast[0], slow[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("left_behind", ["mapped", "copied"])
def test_a_token_that_left_is_read_as_it_left(made, left_behind):
    """By hand, from the model itself: after each layer the states of exited tokens are put back."""
    model, _, x, _ = made
    attached = gated(model, left_behind=left_behind)
    policy = halfway(attached, x)
    logits, info = attached(x, use_early_exit=True, policy=policy)
    exits, h = info["exit_layers"], attached.embed(x)
    base, positions = model.base_model, torch.arange(x.shape[1])[None]
    turned = base.rotary_emb(h, positions) if hasattr(base, "rotary_emb") else None
    for layer, block in enumerate(attached.blocks):
        after = block(h, attention_mask=None, position_embeddings=turned)
        if left_behind == "mapped" and 0 < layer < len(attached.blocks) - 1:
            h = h + attached.shortcuts[layer - 1](h)
        h = torch.where((exits < layer)[..., None], h, after)
    full = exits == attached.n_layers
    wanted = attached.head(attached.n_layers - 1)(h)
    torch.testing.assert_close(logits[full], wanted[full], rtol=1e-3, atol=1e-3)
    bad, again = gated(model, left_behind="zeroed")(x, use_early_exit=True, policy=policy)
    late = full & (again["exit_layers"] == attached.n_layers)
    assert late.any() and not torch.allclose(bad[late], wanted[late], atol=0.05)


def test_stepping_is_the_whole_sequence(made):
    _, attached, x, _ = made
    policy = halfway(attached, x)
    ids, exits = attached.generate(x[:, :6], 5, policy)
    again, whole = attached.predict(ids[:, :-1], policy)
    assert (again[:, 5:] == ids[:, 6:]).all() and (whole == exits).all()
    assert exits.unique().numel() > 1


def test_its_cost_is_counted(made):
    _, attached, x, _ = made
    never = ExitPolicy.static(4, 4)
    assert policy_flops(attached, [0.0] * 4 + [1.0], never)["speedup_flops"] == pytest.approx(1)
    policy = halfway(attached, x)
    shares = exit_shares(attached, x, x.roll(-1, 1), policy)
    cost = policy_flops(attached, shares, policy)
    assert 0 < cost["propagation"] < cost["blocks"] < cost["full_depth"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_products_are_those_that_run(family):
    attached = attach(decoder(family), exits=2, n_seq=20)
    x = torch.randint(3, 61, (1, 20))
    with FlopCounterMode(display=False) as counter:
        attached.layer(0, attached.embed(x))
    parts = attached.operations().layers[0]
    counted = sum(parts[name]["flops"] for name in ("projections", "feed-forward"))
    attention = 2 * 2 * 2 * 20 * 20 * 32  # two layers, two products, all pairs
    assert counter.get_total_flops() in (20 * counted, 20 * counted + attention)


def test_the_state_of_the_model_is_not_touched(made):
    model, attached, x, _ = made
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attached.nll(x, x, halfway(attached, x))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------------- refusals


def test_what_is_not_known_is_refused():
    gemma = decoder("gemma2", head_dim=8, num_key_value_heads=2)
    with pytest.raises(ValueError, match=r"'gemma2' is a family .* known are gpt2"):
        attach(gemma)
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="BertForMaskedLM predicts no next word"):
        attach(bert)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=61, **sizes))
    with pytest.raises(ValueError, match="'t5' reads with an encoder: give a decoder alone"):
        attach(t5)
    with pytest.raises(TypeError, match=r"no Hugging Face model.*earlyexit\[hf\]"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"weights in torch.bfloat16 .* model.float"):
        attach(decoder("llama").bfloat16())


def test_a_model_that_does_something_else_is_refused_by_its_logits():
    model = decoder("llama")
    usual = model.config._attn_implementation
    model.register_forward_hook(lambda m, x, out: setattr(out, "logits", out.logits.tanh()) or out)
    with pytest.raises(ValueError, match="full depth differs from the model's own logits by"):
        attach(model)
    assert model.config._attn_implementation == usual


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"exits": 3}, "exits=3 does not divide the model's 4 layers: choose one of 1, 2, 4"),
        ({"n_seq": 65}, "n_seq=65: the model has 64 positions"),
        ({"tokenizer": SimpleNamespace(eos_token_id=None)}, "no end, start or padding token"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        attach(decoder("llama"), **arguments)


def test_attention_over_less_than_a_window_is_refused():
    model = decoder("mistral", sliding_window=16)
    with pytest.raises(ValueError, match="slides over 16 tokens, and n_seq=64: give n_seq=16"):
        attach(model)
    assert attach(model, n_seq=16).n_seq == 16
    model = decoder("llama")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="attention of the kind linear_attention"):
        attach(model)
