"""The one account against torch's own count of matrix products, and against what it gave before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from earlyexit.cost.breakdown import part_functions
from earlyexit.cost.parts import (
    EXIT_HEAD,
    Load,
    break_even_depth,
    check_flops,
    cost_table,
    exit_costs,
    part_flops,
    policy_flops,
    run_flops,
    total,
    work,
)
from earlyexit.cost.synthetic import policy_for_shares
from earlyexit.exits.criteria import CRITERIA, Criterion
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.statistics import exit_shares
from earlyexit.models.operations import OPENED, operations
from earlyexit.nn.config import ModelConfig

CHANGES = [
    {},
    {"top_k": 3},
    {"expert_hidden": 5, "bk_heads": 7},
    {"exit_head": "full", "tie_embeddings": False},
    {"gate_hidden": 6},
    {"bk_values": 0},
    {"bk_values": 3, "left_behind": "potentials"},
    {"left_behind": "kept"},
    {"causal": False},
    {"mixing": "attention"},
    {"mixing": "none"},
]


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def products(model) -> dict[str, float]:
    """The matrix products of ``part_flops``: what is left without the element-wise operations."""
    parts, config = part_flops(model), model.config
    d, values = config.d_model, config.bk_heads * config.bk_values
    hidden = config.expert_hidden or 2 * d
    weights = 2 * d if config.top_k == 1 else 0  # of several experts: a product of its own
    projection = parts["projection"] - 2 * d  # residuals
    if config.mixing == "resolvent" and values:  # combined, normalised, and gated
        projection -= (3 + 3 + 4 + 1) * values
    found = {
        "contribution": parts.get("contribution", 0),
        "projection": projection,
        "router": parts["router"] - 5 * config.num_experts,  # softmax
        "experts": parts["experts"] - config.top_k * hidden - weights,  # activation
        "translator": parts["translator"],
        "unembedding": parts["unembedding"],
    }
    if (
        config.mixing == "attention"
    ):  # torch counts the query's product, and no attention on the CPU
        found["attention"] = 2 * d * d
    return found


def block_products(model) -> float:
    return sum(n for part, n in products(model).items() if part in model.operations().layers[0])


def handed_on(model) -> float:
    """The products of one token that has left, for one deeper layer, counted by hand."""
    config = model.config
    made = {"recomputed": config.bk_heads * (1 + config.bk_values), "potentials": config.bk_heads}
    width = made.get(config.left_behind, 0)
    width = {"attention": 2 * config.d_model, "none": 0}.get(config.mixing, width)
    return 2 * config.d_model * width


@pytest.mark.parametrize("change", CHANGES)
def test_matrix_products_are_those_that_torch_counts(make_model, make_tokens, change):
    model, x = make_model(**change), make_tokens(4, 11)
    parts, h = products(model), model.embed(x)
    block = block_products(model)
    assert counted(lambda: model.blocks[0].hidden(h)) == 44 * block
    head = parts["translator"] + parts["unembedding"]
    assert counted(lambda: model.blocks[0].exit_classifier(h)) == 44 * head
    assert counted(lambda: model(x)) == 44 * (3 * block + parts["unembedding"])


@pytest.mark.parametrize("criterion", ["saturation", "gate", "agreement"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_run_costs_the_matrix_products_it_is_said_to(
    make_model, make_tokens, make_policy, change, criterion
):
    """Layers, state propagation, checks by a gate, and one projection per token."""
    model, x = make_model(**change), make_tokens(8, 11)
    policy = make_policy(model, x, criterion)
    parts, exits = products(model), model.predict(x, policy)[1].flatten()
    executed = (exits + 1).clamp_max(3).double().mean().item()
    early = (exits < 2).double().mean().item()
    block = block_products(model)
    checks = 0.0
    if criterion != "saturation":  # a cosine has no matrix product
        each = check_flops(model, criterion)
        checks = each * (exits + 1).clamp_max(2).double().mean().item()
    truth = (
        executed * block
        + (3 - executed) * handed_on(model)
        + checks
        + early * parts["translator"]
        + parts["unembedding"]
    )
    assert counted(lambda: model.predict(x, policy)) == pytest.approx(88 * truth, rel=1e-6)


@pytest.mark.parametrize("criterion", ["agreement", "entropy"])
@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_a_layer_where_no_token_may_leave_is_not_checked(
    make_model, make_tokens, make_policy, criterion, skipped
):
    model, x = make_model(), make_tokens(8, 11)
    thresholds = list(make_policy(model, x, criterion).thresholds)
    thresholds[skipped] = CRITERIA[criterion].never
    policy = ExitPolicy(criterion, tuple(thresholds))
    exits = model.predict(x, policy)[1].flatten()
    shares = np.bincount(exits, minlength=4) / len(exits)
    executed = (exits + 1).clamp_max(3).double().mean().item()
    cost, everywhere = (policy_flops(model, shares, p) for p in (policy, criterion))
    parts = products(model)
    truth = layers(model, executed) + parts["unembedding"]
    alive = 1 - np.append(0, np.cumsum(shares))[:3]
    seen = sum(alive[i] for i in {0, 1} - {skipped})
    if criterion == "agreement":
        truth += cost["checks"] + (1 - shares[2:].sum()) * parts["translator"]
    else:  # the exit's own word is read from the check
        gone = shares[:2].sum()
        truth += seen * (parts["translator"] + parts["unembedding"]) - gone * parts["unembedding"]
    assert counted(lambda: model.predict(x, policy)) == pytest.approx(88 * truth, rel=1e-6)
    assert cost["checks"] == pytest.approx(seen * check_flops(model, criterion))
    assert (cost["total"] < everywhere["total"]) == (skipped < 2)


ADAPTIVE = {"output_head": "adaptive", "tie_embeddings": False, "vocab_size": 500}


LOGITS = [c for c in CRITERIA if CRITERIA[c].reads == "logits"]
NEED_ALL = [c for c in LOGITS if CRITERIA[c].of_top is None]


@pytest.mark.parametrize(
    "change, criterion",
    [*((c, name) for c in CHANGES for name in LOGITS), *((ADAPTIVE, name) for name in NEED_ALL)],
)
def test_a_check_by_logits_costs_the_whole_distribution(
    make_model, make_tokens, make_policy, change, criterion
):
    """Thresholds at every layer, the last too: nothing is projected but for checks."""
    model, x = make_model(**change), make_tokens(64, 11)  # exits of their own rarely agree in a row
    policy = make_policy(model, x, criterion)
    exits = model.predict(x, policy)[1].flatten()
    shares = np.bincount(exits, minlength=4) / len(exits)
    assert shares[2] > 0
    cost = policy_flops(model, shares, criterion)
    vocabulary = 502 if change is ADAPTIVE else model.config.vocab_size
    executed = (exits + 1).clamp_max(3).double().mean().item()
    truth = layers(model, executed)
    truth += cost["checks"] + cost["head"] - executed * elementwise(model, vocabulary)
    assert counted(lambda: model.predict(x, policy)) == pytest.approx(x.numel() * truth, rel=1e-6)


def layers(model, executed: float) -> float:
    """Products per token of the layers that run, and of propagation in those that do not."""
    block = block_products(model)
    return executed * block + (3 - executed) * handed_on(model)


def elementwise(model, logits: float) -> float:
    """LayerNorm and softmax of one token, which count as no product."""
    return 8 * model.config.d_model + 5 * logits


@pytest.mark.parametrize("criterion", [c for c in LOGITS if CRITERIA[c].of_top])
def test_a_check_of_the_most_probable_word_costs_the_clusters_that_it_opens(
    make_model, make_tokens, make_policy, monkeypatch, criterion
):
    """With the shares that were opened in the place of the usual ones, products agree exactly."""
    model, x = make_model(3, **ADAPTIVE), make_tokens(8, 11)
    with torch.no_grad():  # the scores of clusters vary more than those of words: some are opened
        model.blocks[0].exit_classifier.unembedding.softmax.head.weight[-2:] *= 3
    y = x.flip(0)
    policy = make_policy(model, x, criterion)
    exits = model.predict(x, policy)[1].flatten()
    shares = np.bincount(exits, minlength=4) / len(exits)
    executed = (exits + 1).clamp_max(3).double().mean().item()
    assert shares[2] > 0 and executed < 3
    clusters = ((y >= 50) & (y < 200), y >= 200)
    opened = [0, 0]

    def count(cluster, rows):
        opened[cluster] += len(rows)

    for k, tail in enumerate(model.blocks[0].exit_classifier.unembedding.softmax.tail):
        tail.register_forward_pre_hook(lambda module, inputs, k=k: count(k, *inputs))
    greedy = counted(lambda: model.predict(x, policy))
    assert 0 < opened[0] < 88 * executed
    top = tuple(rows / (88 * executed) for rows in opened)
    monkeypatch.setitem(OPENED, "top", top)
    monkeypatch.setitem(OPENED, "word", tuple(c.double().mean().item() for c in clusters))
    said = policy_flops(model, shares, criterion)
    truth = layers(model, executed) + said["checks"] + said["head"]
    truth -= executed * elementwise(model, model.operations().logits("top"))
    truth -= 5 * model.operations().logits(
        "word"
    )  # softmax of the scoring; its norm was the check's
    assert counted(lambda: model.nll(x, y, policy)) == pytest.approx(88 * truth, rel=1e-6)
    scoring = part_flops(model)["unembedding"]  # a greedy prediction is the check's own word
    assert greedy == pytest.approx(88 * (truth - scoring), rel=1e-6)


@pytest.mark.parametrize("change", CHANGES)
def test_the_table_has_the_modules_own_parameters(make_model, change):
    model = make_model(**change)
    table = cost_table(model).set_index("part")
    block, head = model.blocks[0], model.blocks[0].exit_classifier

    def count(*modules) -> int:
        return sum(p.numel() for m in modules for p in m.parameters())

    layer = block.bk_layer
    mixing, of_mixing = layer.mixing, {}
    if model.config.mixing != "none":
        of_mixing["contribution"] = count(mixing.contribution)
    if model.config.mixing == "resolvent":
        of_mixing["BK-Core"] = count(mixing.bk_core)
    if model.config.mixing == "attention":
        of_mixing["attention"] = count(mixing.query)
    assert table.parameters.to_dict() == {
        "layer norm": count(block.layer_norm),
        **of_mixing,
        "projection": count(mixing) - sum(of_mixing.values()),
        "router": count(layer.moe.gating_network),
        "experts": count(layer.moe.experts),
        "translator": count(head.translator) if head.translator is not None else 0,
        "head norm": count(head.layer_norm),
        "unembedding": count(head.unembedding),
        "softmax": 0,
    }
    inside = table[table.group == "block"]
    assert inside.parameters.sum() == count(block.layer_norm, layer)
    assert inside.share_of_block.sum() == pytest.approx(1)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_full_depth_is_full_price_plus_the_checks(make_model, criterion):
    model = make_model()
    for distribution in ([0, 0, 1, 0], [0, 0, 0, 1]):
        cost = policy_flops(model, distribution, criterion)
        assert cost["checks"] == 2 * check_flops(model, criterion)
        assert cost["propagation"] == 0
        # A check that projects is wasted at the exits before the last; the last is paid as ever.
        assert cost["total"] == cost["full_depth"] + cost["checks"]
        assert cost["speedup_flops"] == pytest.approx(cost["full_depth"] / cost["total"])
    assert (check_flops(model, criterion) == 0) == (criterion == "depth")
    free = policy_flops(model, [0, 0, 0, 1], "depth")
    assert free["speedup_flops"] == 1.0


def test_leaving_at_once_pays_one_layer_one_head_and_the_propagation(make_model):
    model = make_model()
    parts = part_flops(model)
    block = total(parts, model.operations().layers[0])
    cost = policy_flops(model, [1, 0, 0, 0], "depth")  # nobody is left: nothing is propagated
    assert cost["total"] == block + total(parts, EXIT_HEAD)
    on = policy_flops(model, [1, 0, 0, 0], "depth", stops=False)
    passed = total(parts, ("layer norm", "contribution", "BK-Core"))
    assert on["total"] == cost["total"] + 2 * passed
    projected = policy_flops(model, [1, 0, 0, 0], "max_probability")
    assert projected["head"] == 0  # the exit reads the check's own logits
    assert projected["checks"] == total(parts, EXIT_HEAD)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_policy_costs_the_mean_of_its_exits(make_model, criterion):
    model = make_model()
    each = exit_costs(model, criterion)
    assert each.shape == (3,)
    assert (np.diff(each) > 0).all()
    mixed = policy_flops(model, [0.5, 0.2, 0.1, 0.2], criterion)
    assert mixed["total"] == pytest.approx(each @ [0.5, 0.2, 0.3])


def test_checking_with_a_full_head_caps_the_speedup(make_model):
    """The bound (L + r) / (1 + r): everybody leaves at the first exit and pays for one check."""
    for layers, ratio in ((4, 39.0), (12, 0.5)):
        assert break_even_depth(layers, ratio) == pytest.approx((layers + ratio) / (1 + ratio))
    assert break_even_depth(4, 39.0) == pytest.approx(1.075)
    model = make_model(exit_head="full")
    parts = part_flops(model)
    ratio = total(parts, EXIT_HEAD) / total(parts, model.operations().layers[0])
    best = policy_flops(model, [1, 0, 0, 0], "max_probability")["speedup_flops"]
    assert best == pytest.approx(break_even_depth(3, ratio))


def test_an_adaptive_head_is_cheaper_and_counted_whole(make_model):
    model = make_model(**ADAPTIVE)
    table = cost_table(model).set_index("part")
    head = model.blocks[-1].exit_classifier.unembedding
    assert table.parameters["unembedding"] == sum(p.numel() for p in head.parameters())
    full = cost_table(make_model(vocab_size=500)).set_index("part")
    for part in ("unembedding", "softmax"):
        assert 0 < table.flops_per_token[part] < full.flops_per_token[part]
        assert 0 < table.bytes_per_token[part] < full.bytes_per_token[part]
    # A check by logits opens every cluster; scoring opens that of the word alone.
    check = check_flops(model, "entropy")
    exit_head = total(part_flops(model), EXIT_HEAD)
    assert check > 1.5 * exit_head
    assert policy_flops(model, [1, 0, 0, 0], "entropy")["checks"] == check


def test_bytes_are_at_least_what_goes_in_and_comes_out(make_model):
    model = make_model()
    moved = cost_table(model).set_index("part").bytes_per_token
    d, v = model.d_model, model.vocab_size
    assert moved["layer norm"] == 4 * 2 * d
    assert moved["unembedding"] == 4 * (d + v)
    assert (moved > 0).all()


def test_static_policies_check_nothing(make_model, make_tokens):
    model, x = make_model(), make_tokens(4, 11)
    parts = products(model)
    block = block_products(model)
    once = block + parts["translator"] + parts["unembedding"]
    assert counted(lambda: model.predict(x, ExitPolicy.static(0, 3))) == 44 * once


# ------------------------------------------------------------------------------------------ new criteria


def test_a_new_criterion_of_the_state_is_one_entry(make_model, make_tokens, monkeypatch):
    """How large a state is, in a criterion that nothing has ever heard of."""
    size = Criterion(
        "size", "length of the state", "state", lambda s: s.hidden.norm(dim=-1), True, (0, 1e9)
    )
    monkeypatch.setitem(CRITERIA, "size", size)
    model, x = make_model(), make_tokens(4, 11)
    assert check_flops(model, "size") == 2 * model.d_model
    assert (np.diff(exit_costs(model, "size")) > 0).all()
    policy = policy_for_shares(model, x, [0.5, 0.25, 0.25, 0], "size")
    shares = exit_shares(model, x, x, policy)
    assert shares[:2] == pytest.approx([0.5, 0.25], abs=0.05)
    cost = policy_flops(model, shares, policy)
    assert cost["checks"] == pytest.approx((2 - shares[0]) * 2 * model.d_model)
    assert cost["speedup_flops"] > 1
    amounts = work(Load(model.config, 4, 11, "size", tuple(shares)))
    assert amounts["check"]["bytes"] == pytest.approx(44 * (2 - shares[0]) * 4 * model.d_model)
    assert ("check", "length of the state") in part_functions(model, x)


# --------------------------------------------------------------------------------- what it gave before

# The same configurations as those that the numbers in account.json are of: they were written by the
# three accounts that this one replaced, when models had no values.
BEFORE_CONFIGS = {
    "linear": ModelConfig(1000, 64, 4, gate_hidden=0, bk_values=0),
    "adaptive": ModelConfig(1000, 64, 4, gate_hidden=16, output_head="adaptive", bk_values=0),
    "full": ModelConfig(1000, 64, 3, gate_hidden=8, exit_head="full", top_k=2, bk_values=0),
    "small": ModelConfig(500, 32, n_seq=32, bk_heads=4, bk_values=0),
}
BEFORE = json.loads((Path(__file__).parent / "account.json").read_text())


def differences(found: dict, expected: dict) -> list[str]:
    keys = set(found) | set(expected)
    return [k for k in keys if found.get(k, 0) != pytest.approx(expected.get(k, 0), rel=1e-9)]


@pytest.mark.parametrize("case", BEFORE["policy"], ids=lambda c: f"{c['criterion']}-{c['head']}")
def test_policies_cost_what_they_did(case):
    model = operations(BEFORE_CONFIGS[case["head"]])
    policy = case["criterion"]
    if case["thresholds"]:
        never = CRITERIA[policy].never
        policy = ExitPolicy(policy, tuple(never if t is None else t for t in case["thresholds"]))
    assert not differences(policy_flops(model, case["shares"], policy), case["flops"])


@pytest.mark.parametrize("case", BEFORE["work"], ids=lambda c: f"{c['criterion']}-{c['head']}")
def test_runs_do_the_work_that_they_did(case, monkeypatch):
    monkeypatch.setattr("earlyexit.cost.parts.CHUNK_ELEMENTS", 2_560_000)  # of those accounts
    load = Load(BEFORE_CONFIGS[case["head"]], 8, 64, case["criterion"], tuple(case["shares"]))
    found = work(load)
    assert set(found) == set(case["work"])
    for part, amounts in case["work"].items():
        assert not differences(found[part], amounts), part


@pytest.mark.parametrize("case", BEFORE["systems"], ids=lambda c: f"{c['system']}-{c['criterion']}")
def test_systems_cost_what_they_did(case):
    layers = case["n_layers"]
    levels = [min(k, layers - 1 - k) for k in range(layers)] if "scales" in case["system"] else ()
    config = replace(BEFORE_CONFIGS["small"], n_layers=layers, gate_hidden=case["gate_hidden"])
    model = operations(config, kept=case["kept"], levels=levels, halting="act" in case["system"])
    found = run_flops(model, np.array(case["positions"]), case["criterion"])
    # A sparse layer shared the projections of states then; now every position reads by its own gate.
    skipped = 1 - np.array(case["kept"] or [1.0] * layers)
    shared = part_flops(model)["projection"] * (skipped @ case["positions"])
    assert found["total"] == pytest.approx(case["total"] + shared, rel=1e-9)
    assert found["total"] - found["head"] == pytest.approx(case["layers"] + shared, rel=1e-9)
