"""The model: its interface, the same answer whichever way it runs, and every operation paid once."""

from __future__ import annotations

import inspect
import math
import warnings
from contextlib import ExitStack, contextmanager

import pytest
import torch
from conftest import exit_state, future_jacobian
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from earlyexit.corpus.windows import IGNORE
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models.resnet_bk import EarlyExitLanguageModel

READY = [name for name in CRITERIA if name != "depth"]
ADAPTIVE = {"output_head": "adaptive", "tie_embeddings": False}
HEADS = ("translator", "own", "full")
MIXINGS = [
    {},
    {"bk_values": 0},
    {"causal": False},
    {"causal": False, "bk_values": 0},
    {"mixing": "attention"},
    {"mixing": "none"},
]


class VocabularyRows(TorchDispatchMode):
    """Counts the rows of every matrix product whose result is as wide as the vocabulary.

    In inference mode a product is seen whole, before torch makes it of the others.
    """

    PRODUCTS = tuple(
        f"aten::{name}" for name in ("addmm", "mm", "bmm", "baddbmm", "linear", "matmul")
    )

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if operation._schema.name in self.PRODUCTS:
            self.rows += out.numel() // out.shape[-1] * (out.shape[-1] == self.vocabulary)
        return out


@contextmanager
def counted(model):
    """Rows seen meanwhile: ``vocabulary``, ``experts`` per layer, ``exits`` (heads before the last)."""
    seen = {"experts": [0] * model.n_layers, "exits": 0}

    def count(key, layer=None):
        def hook(module, inputs, output):
            rows = inputs[0].numel() // inputs[0].shape[-1]
            if layer is None:
                seen[key] += rows
            else:
                seen[key][layer] += rows

        return hook

    with ExitStack() as stack:
        for layer, block in enumerate(model.blocks):
            handles = [block.bk_layer.moe.register_forward_hook(count("experts", layer))]
            if layer < model.n_layers - 1:
                norm = block.exit_classifier.layer_norm  # every head passes through it once
                handles.append(norm.register_forward_hook(count("exits")))
            for handle in handles:
                stack.callback(handle.remove)
        rows = stack.enter_context(VocabularyRows(model.vocab_size))
        yield seen
        seen["vocabulary"] = rows.rows


def close(a, b) -> bool:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, equal_nan=True)
    return True


# ---------------------------------------------------------------- interface


def test_constructor_has_the_original_positions_and_defaults():
    parameters = list(inspect.signature(EarlyExitLanguageModel).parameters.values())
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional[1:]] == [
        ("d_model", 64),
        ("n_layers", 4),
        ("n_seq", 128),
        ("num_experts", 4),
        ("top_k", 1),
        ("dropout_p", 0.1),
        ("confidence_threshold", 0.9),
    ]
    assert positional[0].name == "vocab_size"
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[len(positional) :])
    model = EarlyExitLanguageModel(31, 8, 2, 10, 3, 2, 0.2, 0.8)
    assert (model.config.n_seq, model.config.num_experts, model.config.top_k) == (10, 3, 2)
    assert (model.config.dropout_p, model.confidence_threshold) == (0.2, 0.8)
    assert len(model.blocks) == 2
    assert (model.blocks[0].bk_layer.moe.top_k, model.blocks[0].bk_layer.n_seq) == (2, 10)


@pytest.mark.parametrize("exit_head", HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_forward_returns_logits_and_with_exits_what_left_where(
    make_model, make_tokens, exit_head, tied
):
    model, x = make_model(exit_head=exit_head, tie_embeddings=tied), make_tokens(3, 7)
    assert model(x).shape == (3, 7, model.vocab_size)
    logits, info = model(x, use_early_exit=True)
    assert logits.shape == (3, 7, model.vocab_size)
    assert set(info) == {"exit_layers", "exit_confidences", "exited_mask"}
    assert all(v.shape == (3, 7) for v in info.values())
    assert info["exited_mask"].dtype == torch.bool
    assert torch.equal(info["exited_mask"], info["exit_layers"] < model.n_layers)
    # The confidence reported is that of the logits returned.
    torch.testing.assert_close(info["exit_confidences"], logits.softmax(-1).amax(-1))
    blocks = model.blocks
    shared = blocks[0].exit_classifier.unembedding is blocks[-1].exit_classifier.unembedding
    assert shared == (exit_head == "translator")
    assert (blocks[-1].exit_classifier.unembedding.weight is model.token_embedding.weight) == tied


def test_exits_obey_the_threshold_in_force(make_model, make_tokens):
    model, x = make_model(), make_tokens(4, 12)
    before = model.n_layers + 1
    for threshold in (0.9, 0.6, 0.3, 0.0):
        model.confidence_threshold = threshold
        _, info = model(x, use_early_exit=True)
        left = info["exited_mask"]
        assert (info["exit_confidences"][left] >= threshold).all()
        assert (info["exit_confidences"][~left] < threshold).all()
        mean = info["exit_layers"].double().mean()
        assert mean <= before
        before = mean
    assert before == 0  # at threshold 0 everything leaves at once


def test_a_policy_given_to_the_call_wins(make_model, make_tokens):
    model, x = make_model(confidence_threshold=0.0), make_tokens(2, 5)
    for layer in range(model.n_layers):
        policy = ExitPolicy.static(layer, model.n_layers)
        _, info = model(x, use_early_exit=True, policy=policy)
        assert (info["exit_layers"] == layer).all()


@pytest.mark.parametrize("bad", [-0.1, 1.0001, math.nan, math.inf, -math.inf])
def test_a_threshold_outside_its_range_is_refused(make_model, bad):
    with pytest.raises(ValueError, match="threshold"):
        make_model(confidence_threshold=bad)
    model = make_model()
    with pytest.raises(ValueError, match="threshold"):
        model.confidence_threshold = bad
    assert model.confidence_threshold == 0.9


def test_statistics_count_every_token_run_with_exits(make_model, make_tokens):
    model = make_model(confidence_threshold=0.5)
    assert model.get_exit_statistics()["speedup_estimate"] == 1.0
    layers = []
    for seed, shape in enumerate([(3, 12), (1, 5)]):
        x = make_tokens(*shape, seed)
        layers.append(model(x, use_early_exit=True)[1]["exit_layers"].flatten())
        model(x)  # full depth is not counted
    layers = torch.cat(layers)
    statistics = model.get_exit_statistics()
    assert set(statistics) == {
        "avg_exit_layer", "exit_distribution", "speedup_estimate", "total_tokens_processed"
    }  # fmt: skip
    assert statistics["total_tokens_processed"] == 41 == model.exit_layer_counts.sum()
    share = [100 * (layers == k).double().mean().item() for k in range(model.n_layers + 1)]
    assert statistics["exit_distribution"] == pytest.approx(share)
    assert len({round(s) for s in share} - {0}) > 1, "the test needs exits at several layers"
    assert statistics["avg_exit_layer"] == pytest.approx(layers.double().mean().item())
    assert model.avg_exit_layer.item() == pytest.approx(statistics["avg_exit_layer"], rel=1e-6)
    executed = (layers + 1).clamp_max(model.n_layers).double().mean().item()
    assert statistics["speedup_estimate"] == pytest.approx(model.n_layers / executed)
    model.reset_exit_statistics()
    assert model.get_exit_statistics()["total_tokens_processed"] == 0
    assert not model.avg_exit_layer and not model.exit_layer_counts.any()


def test_when_nothing_exits_the_user_is_told_once_and_the_speedup_is_one(make_model, make_tokens):
    model, x = make_model(confidence_threshold=1.0), make_tokens(2, 5)
    with pytest.warns(UserWarning, match="no token exits") as told:
        model(x, use_early_exit=True)
    assert told[0].filename == __file__, "the warning should point at the caller's line"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, use_early_exit=True)
    assert model.get_exit_statistics()["speedup_estimate"] == 1.0
    assert model.get_exit_statistics()["exit_distribution"] == [0, 0, 0, 100]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change", [{"top_k": 5}, {"top_k": 0}, {"n_layers": 0}, {"exit_head": "other"}]
)
def test_impossible_models_are_refused(make_model, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        make_model(**change)


@pytest.mark.parametrize("use", ["forward", "exits", "nll", "predict", "generate"])
@pytest.mark.parametrize(
    "x, what",
    [
        (torch.zeros(2, 13, dtype=torch.long), "n_seq"),
        (torch.zeros(0, 5, dtype=torch.long), "B, N"),
        (torch.zeros(2, 0, dtype=torch.long), "B, N"),
        (torch.zeros(5, dtype=torch.long), "B, N"),
        (torch.full((1, 3), 53), "token id 53"),
        (torch.full((1, 3), -1), "token id -1"),
    ],
)
def test_impossible_inputs_are_refused(make_model, x, what, use):
    model = make_model()
    calls = {
        "forward": lambda: model(x),
        "exits": lambda: model(x, use_early_exit=True),
        "nll": lambda: model.nll(x, x.clamp(0, 52)),
        "predict": lambda: model.predict(x),
        "generate": lambda: model.generate(x, 1),
    }
    with pytest.raises(ValueError, match=what):
        calls[use]()


def test_impossible_runs_are_refused(make_model, make_tokens):
    model, x = make_model(), make_tokens(1, 3)
    with pytest.raises(ValueError, match="thresholds"):
        model(x, use_early_exit=True, policy=ExitPolicy.constant(0.5, 4))
    with pytest.raises(ValueError, match="execution"):
        model(x, use_early_exit=True, execution="sparse")
    with pytest.raises(ValueError, match="use_early_exit"):
        model(x, policy=ExitPolicy.constant(0.5, 3))


@pytest.mark.parametrize("criterion", READY)
def test_nan_weights_are_found_by_any_criterion(make_model, make_tokens, criterion):
    model = make_model()
    with torch.no_grad():
        model.blocks[1].layer_norm.weight[0] = math.nan
    never = CRITERIA[criterion].never
    policy = ExitPolicy(criterion, (never, 1.0, never))
    for execution in ("compacted", "dense"):
        with pytest.raises(ValueError, match="NaN"):
            model.predict(make_tokens(2, 4), policy, execution)


def test_nan_weights_do_not_generate(make_model, make_tokens):
    model = make_model()
    with torch.no_grad():
        model.blocks[1].layer_norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        model.generate(make_tokens(2, 4), 2)


# ---------------------------------------------------------------- the same answer


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("exit_head", HEADS)
def test_without_exits_every_way_of_running_agrees(make_model, make_tokens, exit_head, mixing):
    model, x = make_model(exit_head=exit_head, **mixing).double(), make_tokens(3, 9)
    plain = model(x)
    policies = [ExitPolicy.static(k, 3) for k in (2, 3)]
    policies += [ExitPolicy.constant(CRITERIA[c].never, 3, c) for c in READY]
    for policy in policies:
        for execution in ("compacted", "dense"):
            logits, info = model(x, use_early_exit=True, policy=policy, execution=execution)
            close(logits, plain)
            assert (info["exit_layers"] >= 2).all()


@settings(max_examples=60, deadline=None)
@given(
    criterion=st.sampled_from(READY),
    head=st.sampled_from([*({"exit_head": h} for h in HEADS), ADAPTIVE]),
    top_k=st.integers(1, 4),
    mixing=st.sampled_from(MIXINGS),
    batch=st.integers(1, 4),
    length=st.integers(1, 12),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_compacted_equals_dense(
    make_model, make_tokens, make_policy, criterion, head, top_k, mixing, batch, length, share, seed
):  # fmt: skip
    model = make_model(seed, top_k=top_k, **mixing, **head).double()
    x = make_tokens(batch, length, seed)
    policy = make_policy(model, x, criterion, share)
    runs = [
        model(x, use_early_exit=True, policy=policy, execution=e) for e in ("compacted", "dense")
    ]
    (logits, info), (dense_logits, dense_info) = runs
    assert torch.equal(info["exit_layers"], dense_info["exit_layers"])
    close(info["exit_confidences"], dense_info["exit_confidences"])
    close(logits, dense_logits)


@torch.no_grad()
@pytest.mark.parametrize("values", [4, 0])
def test_a_two_sided_layer_reads_both_ways_alike(make_model, values):
    """Its resolvent is symmetric: what it mixes of a reversed window is the reverse."""
    u = torch.randn(2, 9, 16).double()
    for causal in (False, True):
        layer = make_model(causal=causal, bk_values=values).double().blocks[0].bk_layer
        same = torch.allclose(layer(u.flip(1)).flip(1), layer(u), rtol=1e-9, atol=1e-11)
        assert same == (not causal)


@pytest.mark.parametrize("values", [4, 0])
def test_a_two_sided_model_reads_the_future(make_model, make_tokens, values):
    x = make_tokens(1, 7)
    for causal in (False, True):
        model = make_model(causal=causal, bk_values=values).double()
        future, past = future_jacobian(model, x, model)
        assert (future == 0) == causal and past > 0
    with pytest.raises(RuntimeError, match="future"):
        make_model(causal=False, bk_values=values).blocks[0].bk_layer.mixing.bk_core.step(None, x)


@pytest.mark.parametrize("criterion", READY)
def test_exits_really_happen_at_several_layers(make_model, make_tokens, make_policy, criterion):
    model, x = make_model(), make_tokens(8, 12)
    _, info = model(x, use_early_exit=True, policy=make_policy(model, x, criterion))
    assert len(info["exit_layers"].unique()) >= 3 - CRITERIA[criterion].streak


def naive_run(model, x, policy):
    """A token at a time is alive or frozen; layers are applied as in the block's own formula."""
    rule, h = CRITERIA[policy.criterion], model.embed(x)
    exits = torch.full_like(x, model.n_layers)
    logits = torch.zeros(*x.shape, model.vocab_size, dtype=h.dtype)
    alive, streak, before = torch.ones_like(x, dtype=torch.bool), torch.zeros_like(x), None
    for layer, block in enumerate(model.blocks):
        after = torch.where(alive[..., None], block.hidden(h), h)
        here = block.exit_classifier(after)
        if rule.streak:
            same = here.argmax(-1) == before if layer else torch.zeros_like(alive)
            streak, before = torch.where(same, streak + 1, 0), here.argmax(-1)
            score = streak
        elif rule.reads == "logits":
            score = rule.score(here)
        else:
            state = exit_state(model, layer, after.flatten(0, 1), h.flatten(0, 1))
            score = rule.score(state).view_as(x)
        leaving = alive & rule.passes(score, policy.thresholds[layer])
        exits[leaving] = layer
        read = alive if layer == model.n_layers - 1 else leaving
        logits[read] = here[read]
        alive = alive & ~leaving
        h = after
    return logits, exits


@pytest.mark.parametrize("head", [{}, ADAPTIVE])
@pytest.mark.parametrize("criterion", READY)
def test_both_equal_a_run_written_out_naively(
    make_model, make_tokens, make_policy, criterion, head
):
    model, x = make_model(2, top_k=2, **head).double(), make_tokens(4, 11)
    policy = make_policy(model, x, criterion)
    logits, exits = naive_run(model, x, policy)
    for execution in ("compacted", "dense"):
        found, info = model(x, use_early_exit=True, policy=policy, execution=execution)
        assert torch.equal(info["exit_layers"], exits)
        close(found, logits)


@pytest.mark.parametrize("head", [{}, ADAPTIVE])
@pytest.mark.parametrize("execution", ["compacted", "dense"])
@pytest.mark.parametrize("criterion", [None, *READY])
def test_nll_and_predictions_are_those_of_forward(
    make_model, make_tokens, make_policy, criterion, execution, head
):
    model, x, y = make_model(**head).double(), make_tokens(3, 10), make_tokens(3, 10, 1)
    y[:, 7:] = IGNORE
    if criterion is None:
        logits, nll, predicted = model(x), model.nll(x, y), model.predict(x)
    else:
        policy = make_policy(model, x, criterion)
        logits, info = model(x, use_early_exit=True, policy=policy, execution=execution)
        nll, exits = model.nll(x, y, policy, execution)
        predicted, exits_again = model.predict(x, policy, execution)
        assert torch.equal(exits, info["exit_layers"])
        assert torch.equal(exits_again, exits)
    close(nll, F.cross_entropy(logits.transpose(1, 2), y, ignore_index=IGNORE, reduction="none"))
    assert torch.equal(predicted, logits.argmax(-1))


@pytest.mark.parametrize(
    "criterion, mixing",
    [
        *((c, {}) for c in (None, "depth", *READY)),
        *(("gate", m) for m in MIXINGS[1:] if m.get("causal", True)),
    ],
)
def test_generating_is_choosing_on_the_growing_prefix(
    make_model, make_tokens, make_policy, criterion, mixing
):
    model, prompt = make_model(4, **mixing).double(), make_tokens(3, 3, 4)
    if criterion == "depth":
        policy = ExitPolicy.static(1, 3)
    else:
        policy = criterion and make_policy(model, make_tokens(3, 12), criterion)
    ids, exits = model.generate(prompt, 10, policy)  # fills n_seq, and one more
    assert ids.shape == (3, 13) and exits.shape == (3, 12)
    prefix = prompt
    for _ in range(10):
        if policy is None:
            new = model.predict(prefix)
        else:
            new, prefix_exits = model.predict(prefix, policy)
            assert torch.equal(exits[:, : prefix.shape[1]], prefix_exits)
        prefix = torch.cat([prefix, new[:, -1:]], dim=1)
    assert torch.equal(ids, prefix)


def test_generation_refuses_what_does_not_fit_and_leaves_the_mode(make_model, make_tokens):
    model = make_model().train()
    with pytest.raises(ValueError, match="n_seq"):
        model.generate(make_tokens(1, 3), 11)
    model.generate(make_tokens(1, 3), 2)
    assert model.training
    with pytest.raises(ValueError, match="thresholds"):
        model.generate(make_tokens(1, 3), 2, ExitPolicy.constant(0.5, 7))
    assert model.training, "a refused call must not change the model"


def test_sampling_depends_on_the_generator_alone(make_model, make_tokens):
    model, prompt = make_model(), make_tokens(4, 2)
    a, b, c = (
        model.generate(prompt, 9, temperature=2.0, generator=torch.Generator().manual_seed(s))[0]
        for s in (0, 0, 1)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


# ---------------------------------------------------------------- paid once


@pytest.mark.parametrize("exit_head", HEADS)
def test_full_depth_runs_no_exit_head_and_projects_each_token_once(
    make_model, make_tokens, exit_head
):
    model, x = make_model(exit_head=exit_head), make_tokens(4, 9)
    for call in (lambda: model(x), lambda: model.nll(x, x), lambda: model.predict(x)):
        with counted(model) as seen, torch.no_grad():
            call()
        assert seen == {"experts": [36, 36, 36], "exits": 0, "vocabulary": 36}


@pytest.mark.parametrize("exit_head", HEADS)
@pytest.mark.parametrize("criterion", READY)
def test_a_token_pays_for_its_layers_and_its_checks_only(
    make_model, make_tokens, make_policy, criterion, exit_head
):
    model, x = make_model(exit_head=exit_head), make_tokens(6, 11)
    policy = make_policy(model, x, criterion)
    with counted(model) as seen:
        _, exits = model.nll(x, x, policy)
    alive = [int((exits >= layer).sum()) for layer in range(model.n_layers)]
    assert seen["experts"] == alive
    assert alive[0] > alive[2] > 0 or CRITERIA[criterion].streak
    if CRITERIA[criterion].reads == "state":
        assert seen["vocabulary"] == x.numel()
        assert seen["exits"] == int((exits < model.n_layers - 1).sum())
    else:  # a check is a projection, and the prediction is read from the same one
        assert seen["vocabulary"] == sum(alive)
        assert seen["exits"] == sum(alive[:-1])


def test_dense_execution_is_the_control_that_saves_nothing(make_model, make_tokens, make_policy):
    model, x = make_model(), make_tokens(6, 11)
    policy = make_policy(model, x, "saturation")
    with counted(model) as seen:
        model.nll(x, x, policy, "dense")
    assert seen["experts"] == [66, 66, 66]
    assert seen["vocabulary"] == 66


def test_nobody_waits_when_all_leave_at_once(make_model, make_tokens):
    model, x = make_model(), make_tokens(5, 7)
    with counted(model) as seen:
        _, exits = model.nll(x, x, ExitPolicy.static(0, 3))
    assert not exits.any()
    assert seen == {"experts": [35, 0, 0], "exits": 35, "vocabulary": 35}
