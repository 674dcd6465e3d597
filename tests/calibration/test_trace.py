"""The trace against direct computation, and its read-outs against each other."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlyexit.calibration.collect import collect_trace
from earlyexit.calibration.temperature import fit_temperatures
from earlyexit.calibration.trace import ExitTrace
from earlyexit.corpus.windows import IGNORE, loader, windows
from earlyexit.exits.criteria import CRITERIA, ExitState
from earlyexit.exits.policy import ExitPolicy

STORED = [name for name in CRITERIA if name not in ("depth", "patience")]
READY = [*STORED, "patience"]  # which follows from the predictions


def bounds(criterion: str) -> tuple[float, float]:
    """Those of the criterion, or numbers of the size its scores have."""
    low, high = CRITERIA[criterion].bounds
    return low, min(high, 4.0)


@pytest.fixture(scope="module")
def traced(make_model, corpus) -> tuple:
    """A model, a split with a ragged last batch, and the trace of one over the other."""
    model, split = make_model(), corpus.splits["fit"]
    return model, split, collect_trace(model, split, corpus.eos_id, batch_size=5)


def random_trace(seed: int, tokens: int = 60, layers: int = 4, coarse: bool = False) -> ExitTrace:
    """Any numbers at all; ``coarse`` ones collide, with each other and with thresholds."""
    rng = np.random.default_rng(seed)
    scores = {}
    for name in STORED:
        low, high = bounds(name)
        score = rng.uniform(low, high, (tokens, layers))
        scores[name] = (np.round(score, 1) if coarse else score).astype(np.float32)
    return ExitTrace(
        split="fit",
        document=np.repeat(np.arange(6, dtype=np.int32), tokens // 6),
        position=np.tile(np.arange(tokens // 6, dtype=np.int32), 6),
        target=rng.integers(9, size=tokens).astype(np.int32),
        nll=rng.exponential(3, (tokens, layers)).astype(np.float32),
        kl=np.append(rng.exponential(1, (tokens, layers - 1)), np.zeros((tokens, 1)), 1).astype(
            np.float32
        ),
        prediction=rng.integers(3, size=(tokens, layers)).astype(np.int32),
        scores=scores,
        n_seq=16,
    )


def test_every_scored_token_is_judged_as_by_the_exit_alone(traced, corpus):
    model, split, trace = traced
    w = windows(split, model.n_seq, corpus.eos_id)
    scored = torch.as_tensor(w.targets) != IGNORE
    target = torch.as_tensor(w.targets)[scored]
    assert trace.n_tokens == split.n_tokens == int(scored.sum())
    assert trace.split == split.name
    np.testing.assert_array_equal(trace.target, split.ids)
    np.testing.assert_array_equal(trace.document, split.document)
    x = torch.as_tensor(w.inputs)
    with torch.no_grad():
        states = model.hidden_states(x)
        logits = [
            b.exit_classifier(h)[scored] for b, h in zip(model.blocks, states[1:], strict=True)
        ]
        torch.testing.assert_close(logits[-1], model(x)[scored])
    last = logits[-1].log_softmax(-1)
    for layer, here in enumerate(logits):
        log_p = here.log_softmax(-1)
        close = {"rtol": 1e-4, "atol": 1e-5}
        nll = torch.nn.functional.nll_loss(log_p, target, reduction="none")
        np.testing.assert_allclose(trace.nll[:, layer], nll, **close)
        np.testing.assert_allclose(
            trace.kl[:, layer], (last.exp() * (last - log_p)).sum(-1), **close
        )
        np.testing.assert_array_equal(trace.prediction[:, layer], here.argmax(-1))
        np.testing.assert_array_equal(trace.agreement[:, layer], here.argmax(-1) == last.argmax(-1))
        np.testing.assert_allclose(
            trace.score("max_probability")[:, layer], log_p.exp().amax(-1), **close
        )
    position = np.concatenate([np.arange(n) % model.n_seq for n in split.spans()[1]])
    np.testing.assert_array_equal(trace.position, position)


def test_temperatures_divide_the_logits(traced, corpus):
    model, split, cold = traced
    warm = collect_trace(model, split, corpus.eos_id, temperatures=[2.0, 1.0, 1.0])
    np.testing.assert_allclose(warm.nll[:, 1:], cold.nll[:, 1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(warm.prediction, cold.prediction)
    assert (warm.score("max_probability")[:, 0] < cold.score("max_probability")[:, 0]).all()
    with pytest.raises(ValueError, match="temperature"):
        collect_trace(model, split, corpus.eos_id, temperatures=[1.0, 1.0])


def test_full_depth_read_out_is_the_models_perplexity(traced, corpus):
    model, split, trace = traced
    total = count = 0
    for x, y in loader(split, model.n_seq, 4, corpus.eos_id):
        total, count = total + model.nll(x, y).sum().item(), count + int((y != IGNORE).sum())
    full = trace.read_out(np.full(trace.n_tokens, trace.n_layers))
    assert full["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert full["quality_loss"] == pytest.approx(0, abs=1e-12)
    assert (full["layers"], full["speedup_layers"], full["agreement"]) == (3, 1, 1)
    last = trace.read_out(np.full(trace.n_tokens, trace.n_layers - 1))
    assert last == full  # leaving at the last layer saves nothing


@pytest.mark.parametrize("criterion", READY)
def test_first_exits_predicted_by_the_trace_are_those_of_a_run(traced, corpus, criterion):
    """Until a token has left, states are those of full depth: there trace and run must agree."""
    model, split, trace = traced
    first = int(CRITERIA[criterion].streak)  # nothing can repeat itself before the second exit
    score = np.unique(trace.score(criterion)[:, first])
    middle = len(score) // 2
    thresholds = [CRITERIA[criterion].never] * 3
    thresholds[first] = float(score[middle - 1 : middle + 1].mean())
    policy = ExitPolicy(criterion, tuple(thresholds))
    exits = np.concatenate(
        [
            model.nll(x, y, policy)[1][y != IGNORE].numpy()
            for x, y in loader(split, model.n_seq, 32, corpus.eos_id)
        ]
    )
    np.testing.assert_array_equal(exits, trace.exit_layers(policy))
    assert set(exits.tolist()) == {first, 3}


def test_patience_counts_exits_in_a_row_that_agree():
    trace = random_trace(3)
    for prediction, found in zip(trace.prediction, trace.score("patience"), strict=True):
        for layer in range(trace.n_layers):
            row = 0
            while row < layer and prediction[layer - row - 1] == prediction[layer]:
                row += 1
            assert found[layer] == row


def test_decaying_thresholds_fall_with_the_position(traced, corpus):
    """CALM, eq. 5, in the trace as in a run."""
    model, split, trace = traced
    policy = ExitPolicy("max_probability", (0.5, math.inf, math.inf), decay=2.0)
    threshold = 0.9 * 0.5 + 0.1 * np.exp(-2.0 * trace.position / model.n_seq)
    leaves = trace.score("max_probability")[:, 0] >= threshold
    np.testing.assert_array_equal(trace.exit_layers(policy), np.where(leaves, 0, 3))
    assert leaves.any() and not leaves.all()
    x, y = next(iter(loader(split, model.n_seq, 10**6, corpus.eos_id)))
    _, exits = model.nll(x, y, policy)
    np.testing.assert_array_equal(exits[y != IGNORE].numpy(), trace.exit_layers(policy))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(READY), st.integers(2, 6), st.booleans(), st.data())
def test_sweeping_is_evaluating_each_threshold(seed, criterion, layers, coarse, data):
    trace, rule = random_trace(seed, layers=layers, coarse=coarse), CRITERIA[criterion]
    anything = st.floats(*bounds(criterion)) | st.sampled_from([*bounds(criterion), rule.never])
    on_a_score = st.sampled_from(trace.score(criterion).ravel().tolist())
    thresholds = data.draw(st.lists(anything | on_a_score, min_size=1, max_size=8))
    sweep = trace.sweep(criterion, thresholds)
    assert len(sweep) == len(thresholds)
    for threshold, (_, row) in zip(thresholds, sweep.iterrows(), strict=True):
        truth = trace.evaluate(ExitPolicy.constant(threshold, layers, criterion))
        assert {k: row[k] for k in truth} == pytest.approx(truth, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("criterion", READY)
def test_the_default_sweep_runs_from_the_first_exit_to_full_depth(traced, criterion):
    *_, trace = traced
    sweep = trace.sweep(criterion)
    assert sweep.layers.min() == 1 or CRITERIA[criterion].streak
    assert sweep.layers.max() == trace.n_layers
    assert (sweep.criterion == criterion).all()
    for row in sweep.iloc[::37].itertuples():  # a threshold of the table can be used as it stands
        policy = ExitPolicy.constant(row.threshold, trace.n_layers, criterion)
        assert trace.evaluate(policy)["layers"] == pytest.approx(row.layers)


def test_thresholds_of_a_sweep_are_always_valid():
    """In single precision a cosine and a normalised entropy may round to more than 1."""
    torch.manual_seed(0)
    uniform, h = torch.zeros(60, 10_000) + 3 * torch.randn(60, 1), torch.randn(60, 16)
    score = {
        "entropy": CRITERIA["entropy"].score(uniform),
        "saturation": CRITERIA["saturation"].score(ExitState(0, 1.01 * h, h)),
    }
    for criterion, column in score.items():
        trace = random_trace(0)
        trace.scores[criterion][:] = column[:, None]
        for threshold in trace.sweep(criterion).threshold:
            ExitPolicy.constant(threshold, trace.n_layers, criterion)


def test_a_single_layer_has_nothing_to_sweep_but_sweeps():
    trace = random_trace(0, layers=1)
    for criterion in READY:
        assert (trace.sweep(criterion).layers == 1).all()
    assert len(trace.static()) == 1


def test_static_exits_are_the_columns_of_the_trace(traced):
    *_, trace = traced
    static = trace.static()
    truth = np.exp(trace.nll.mean(axis=0, dtype=float))
    np.testing.assert_allclose(static.perplexity, truth)
    assert static.layers.tolist() == [1, 2, 3]
    np.testing.assert_allclose(static.speedup_layers, [3, 1.5, 1])
    np.testing.assert_allclose(static.agreement, trace.agreement.mean(axis=0))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(READY), st.data())
def test_no_policy_beats_the_oracle(seed, criterion, data):
    """At each λ the oracle has the least depth + λ · NLL, so no policy lies below its front."""
    trace, rule = random_trace(seed), CRITERIA[criterion]
    values = st.floats(*bounds(criterion)) | st.just(rule.never)
    thresholds = data.draw(st.lists(values, min_size=4, max_size=4))
    policy = trace.evaluate(ExitPolicy(criterion, tuple(thresholds)))
    oracle = trace.oracle("nll", n_points=20)
    best = oracle.layers + oracle.price * np.log(oracle.perplexity)
    found = policy["layers"] + oracle.price * np.log(policy["perplexity"])
    assert (found >= best * (1 - 1e-6) - 1e-6).all()


def test_the_kl_oracle_minimises_depth_and_divergence():
    trace = random_trace(0)
    for row in trace.oracle("kl", n_points=10).itertuples():
        cost = np.arange(1, 5) + row.price * trace.kl
        exits = cost.argmin(axis=1)
        assert row.layers == pytest.approx(exits.mean() + 1)
    assert row.agreement == 1  # a huge λ keeps the last layer's word
    with pytest.raises(ValueError, match="loss"):
        trace.oracle("regret")


def test_exit_distribution_sums_to_one(traced):
    *_, trace = traced
    exits = trace.exit_layers(ExitPolicy.constant(0.5, 3))
    share = trace.exit_distribution(exits)
    assert share.shape == (4,)
    assert share.sum() == pytest.approx(1)
    assert share[1] == pytest.approx((exits == 1).mean())


def test_a_trace_survives_its_file(traced, tmp_path):
    *_, trace = traced
    trace = dataclasses.replace(trace, model_hash="m", data_hash="d")
    trace.save(tmp_path / "trace.parquet")
    back = ExitTrace.load(tmp_path / "trace.parquet")
    for field in dataclasses.fields(ExitTrace):
        was, now = getattr(trace, field.name), getattr(back, field.name)
        if isinstance(was, np.ndarray):
            assert was.dtype == now.dtype
            np.testing.assert_array_equal(was, now)
        elif field.name == "scores":
            assert list(was) == list(now)
            for name in was:
                np.testing.assert_array_equal(was[name], now[name])
        else:
            assert was == now
    assert back.sweep("entropy").equals(trace.sweep("entropy"))


def test_files_that_are_no_trace_are_refused(traced, tmp_path):
    *_, trace = traced
    trace.to_frame().to_parquet(tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=r"table\.parquet is no exit trace"):
        ExitTrace.load(tmp_path / "table.parquet")
    trace.save(tmp_path / "trace.parquet")
    whole = (tmp_path / "trace.parquet").read_bytes()
    (tmp_path / "trace.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"trace\.parquet is no exit trace"):
        ExitTrace.load(tmp_path / "trace.parquet")


def test_a_flipped_bit_of_a_trace_is_found_wherever_it_is(traced, tmp_path):
    """Or changes nothing, and then what is saved again is what was saved first."""
    *_, trace = traced
    path, places = tmp_path / "trace.parquet", random.Random(0)
    trace.save(path)
    whole = path.read_bytes()
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[places.randrange(len(whole))] ^= 1 << places.randrange(8)
        path.write_bytes(flipped)
        try:
            back = ExitTrace.load(path)
        except ValueError as error:
            assert f"{path} is no exit trace" in str(error)
        else:
            back.save(path)
            assert path.read_bytes() == whole


def test_what_a_trace_does_not_hold_is_said(traced):
    *_, trace = traced
    poor = dataclasses.replace(trace, scores={})
    with pytest.raises(ValueError, match="entropy"):
        poor.evaluate(ExitPolicy.constant(0.5, 3, "entropy"))
    with pytest.raises(ValueError, match="thresholds"):
        trace.evaluate(ExitPolicy.constant(0.5, 4))


def test_nan_weights_give_no_trace(make_model, corpus):
    model = make_model()
    with torch.no_grad():
        model.blocks[0].layer_norm.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        collect_trace(model, corpus.splits["fit"], corpus.eos_id)


def test_tracing_leaves_the_model_as_it_was(make_model, corpus):
    model = make_model().train()
    collect_trace(model, corpus.splits["fit"], corpus.eos_id)
    assert model.training


def test_nothing_is_fitted_on_the_test_split(make_model, corpus):
    with pytest.raises(ValueError, match="test split"):
        fit_temperatures(make_model(), corpus.splits["test"], corpus.eos_id)
