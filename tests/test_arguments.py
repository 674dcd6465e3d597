"""Whatever a caller passes, the answer is right or an error of the package's own, in one sentence."""

from __future__ import annotations

import linecache
import math
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, fuzz
from hypothesis import example, given
from hypothesis import strategies as st

from earlyexit.calibration.certify import certify
from earlyexit.calibration.collect import collect_trace
from earlyexit.calibration.temperature import fit_temperatures
from earlyexit.calibration.thresholds import Unreachable, fit_policy, fit_policy_to_cost
from earlyexit.corpus.documents import CorpusConfig
from earlyexit.corpus.load import encode_texts
from earlyexit.corpus.windows import IGNORE, loader
from earlyexit.evaluation import evaluator as evaluating
from earlyexit.evaluation.evaluator import EarlyExitEvaluator
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models import ACTLanguageModel, MultiScaleLanguageModel, SparseBKLanguageModel
from earlyexit.nn.bk_core import BKCore, causal_action, causal_features, two_sided_features
from earlyexit.nn.config import ModelConfig
from earlyexit.nn.moe import SparseMoELayer
from earlyexit.runs.paths import PACKAGE
from earlyexit.training.config import GatesConfig, TrainingConfig
from earlyexit.training.gates import train_gates
from earlyexit.training.translators import fit_translators

OWN = (TypeError, ValueError, FloatingPointError)
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.bool),
    *(torch.uint8, torch.int8, torch.uint16, torch.int32, torch.int64),
)

numbers = st.one_of(
    st.integers(-3, 70), st.floats(), st.sampled_from([0.5, 1e-9, 1e30, 2**70, np.float32(0.5)])
)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple) | st.just((2, 3))


@st.composite
def tensors(draw, shapes=shapes, low=-2, high=VOCABULARY + 2) -> torch.Tensor:
    """Tensors of any type and shape, some not contiguous, some with NaN."""
    shape, dtype = draw(shapes), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 3)))
    values = torch.randint(low, high, shape, generator=generator)
    if draw(st.booleans()):
        values = values.clamp(0, VOCABULARY - 1)
    tensor = values.to(dtype)
    if tensor.is_floating_point() and tensor.numel() and draw(st.integers(0, 3)) == 0:
        tensor = torch.where(torch.rand(shape, generator=generator) < 0.3, torch.nan, tensor)
    return tensor.transpose(0, -1) if tensor.dim() > 1 and draw(st.booleans()) else tensor


other = st.one_of(st.none(), st.booleans(), st.text(max_size=3), st.lists(numbers, max_size=4))
anything = st.one_of(numbers, other, st.dictionaries(st.text(max_size=1), numbers, max_size=1))
batch = st.one_of(anything, tensors(), st.tuples(tensors(), tensors()), st.just((1, 2, 3)))
word_ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=3, max_size=3)


def outcome(call: Callable, *args, **kwargs):
    """What a call returns; None where the package raised an error of its own, on purpose."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(*args, **kwargs)
    except OWN as error:
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        file = trace.tb_frame.f_code.co_filename
        assert Path(file).is_relative_to(PACKAGE), repr(error)
        assert linecache.getline(file, trace.tb_lineno).lstrip().startswith("raise "), repr(error)
        assert len(str(error)) > 12 and "\n" not in str(error)
        return None


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def trace(model, corpus):
    return collect_trace(model, corpus.splits["fit"], corpus.eos_id)


# ---------------------------------------------------------------------- the compiled loops


@fuzz(120)
@given(
    st.lists(tensors(st.lists(st.integers(0, 6), max_size=4).map(tuple)), min_size=4, max_size=4),
    st.sampled_from(["auto", "cpu", "torch", "x", None, 1]),
    st.integers(0, 5),
    st.integers(0, 5),
    st.booleans(),
)
def test_nothing_unchecked_reaches_a_compiled_loop(given, backend, heads, values, fitting):
    v, b, eta, t = given
    if fitting:  # right shapes, of any type
        v = torch.ones(2, 3, heads, dtype=v.dtype)
        b = torch.ones(2, 3, heads, values, dtype=b.dtype)
        eta, t = (torch.ones(heads, dtype=x.dtype) for x in (eta, t))
    rows = torch.ones(2, 3, heads * (1 + values), dtype=v.dtype) if fitting else v
    rows.requires_grad_(rows.is_floating_point())
    for call in (
        lambda: causal_action(v, b, eta, t, backend)[1],
        lambda: causal_features(rows, eta, t, backend),
        lambda: two_sided_features(rows, eta, t, backend),
        lambda: BKCore(heads, n_values=values)(rows, backend),
        lambda: BKCore(heads, n_values=values).step(None, v)[1],
    ):
        found = outcome(call)
        if found is not None:
            assert found.is_floating_point() and found.numel() == 2 * found.shape[0] * (
                found[0].numel() // 2 if len(found) else 0
            )
            if found.requires_grad:
                found.sum().backward()


@fuzz(80)
@given(*[anything] * 5, tensors(st.lists(st.integers(0, 8), max_size=3).map(tuple)))
def test_experts_are_built_and_run_or_refused(d_model, experts, top_k, dropout, hidden, x):
    moe = outcome(SparseMoELayer, d_model, experts, top_k, dropout, expert_hidden=hidden)
    if moe is None:
        moe = SparseMoELayer(8, dropout_p=0.0)
    if x.dtype == torch.float32:
        found = outcome(moe, x)
        assert found is None or found.shape == x.shape


# ---------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    "kind",
    [ModelConfig, TrainingConfig, GatesConfig, CorpusConfig]
    + [m.config_type for m in (SparseBKLanguageModel, ACTLanguageModel, MultiScaleLanguageModel)],
)
def test_configurations_hold_what_their_fields_say(kind):
    required = {"vocab_size": 53} if issubclass(kind, ModelConfig) else {}

    @fuzz(120)
    @given(st.sampled_from([field.name for field in fields(kind)]), anything)
    def check(name, value):
        config = outcome(kind, **required | {name: value})
        if config is not None:
            found = getattr(config, name)
            assert found == value or (name == "tie_embeddings" and value is None)
            assert not isinstance(found, float) or math.isfinite(found)

    check()


# ---------------------------------------------------------------------- policies


@fuzz(150)
@given(anything, anything, anything)
def test_policies_are_whole_or_refused(criterion, thresholds, decay):
    for name in (criterion, "max_probability", "gate"):
        policy = outcome(ExitPolicy, name, thresholds, decay)
        if policy is not None:
            assert not any(math.isnan(t) for t in policy.thresholds) and policy.decay >= 0
    for policy in (
        outcome(ExitPolicy.constant, thresholds, decay, criterion),
        outcome(ExitPolicy.static, thresholds, decay),
    ):
        assert policy is None or len(policy.thresholds) == decay


# ---------------------------------------------------------------------- models


@fuzz(120)
@given(batch, batch, st.sampled_from(["compacted", "dense", "other", None, 1]), batch)
def test_models_run_ids_or_refuse_them(model, x, y, execution, policy):
    for use in (None, ExitPolicy.static(1, 3), policy):
        for call in (
            lambda use=use: model.nll(x, y, use, execution),
            lambda use=use: model.predict(x, use, execution),
            lambda use=use: model(x, use is not None, use, execution),
        ):
            found = outcome(call)
            if found is not None:
                assert x.dim() == 2 and not x.is_floating_point()
                first = found[0] if isinstance(found, tuple) else found
                assert first.isfinite().all() and first.shape[:2] == x.shape


@fuzz(60)
@given(word_ids, anything, anything)
def test_generation_goes_on_or_refuses(model, ids, n_new, temperature):
    found = outcome(model.generate, torch.tensor([ids]), n_new, None, temperature)
    if found is not None:
        assert (
            found[0].shape == (1, 3 + n_new) and 0 <= found[0].min() <= found[0].max() < VOCABULARY
        )
        assert temperature >= 0


@fuzz(60)
@given(batches=st.lists(batch, max_size=2) | batch)
@example(
    batches=[(torch.tensor([[5, 4]]).to(torch.uint16), torch.tensor([[4, 3]]).to(torch.uint8))]
)
def test_the_evaluator_takes_pairs_of_ids_and_targets(model, batches):
    evaluator = EarlyExitEvaluator(model, "cpu")
    found = outcome(evaluator.evaluate_policy, batches)
    assert found is None or found["perplexity"] >= 1
    with pytest.MonkeyPatch.context() as patch:  # no clock is read here
        patch.setattr(
            evaluating, "interleaved_times", lambda runs, *_, **__: {k: [1.0] for k in runs}
        )
        found = outcome(evaluator.benchmark_speedup, batches, 1)
    assert found is None or found["actual_speedup"] == 1


# ---------------------------------------------------------------------- texts and their windows


@fuzz(40)
@given(anything, anything, anything)
def test_loaders_have_whole_sizes(corpus, n_seq, batch_size, seed):
    data = outcome(loader, corpus.splits["test"], n_seq, batch_size, seed=seed)
    if data is not None:
        assert sum(int((y != IGNORE).sum()) for _, y in data) == corpus.splits["test"].n_tokens
    for cut in ("limit", "truncate"):
        split = outcome(getattr(corpus.splits["test"], cut), n_seq)
        assert split is None or 0 < split.n_tokens <= corpus.splits["test"].n_tokens


@fuzz(40)
@given(anything | st.lists(st.text(max_size=5), max_size=3))
def test_texts_are_encoded_or_refused(corpus, texts):
    split = outcome(encode_texts, corpus, texts, "other")
    assert split is None or split.n_tokens > 0


# ---------------------------------------------------------------------- fits


@fuzz(60)
@given(anything, anything, anything, anything)
def test_fits_keep_to_their_limits_or_refuse(trace, criterion, epsilon, thresholds, costs):
    for arguments in (
        (criterion, 0.05, "per_layer", None),
        ("gate", epsilon, "global", None),
        ("gate", 0.05, thresholds, None),
        ("gate", 0.05, "global", costs),
    ):
        policy = outcome(fit_policy, trace, *arguments)
        if policy is not None:
            assert trace.evaluate(policy)["quality_loss"] <= arguments[1]
    outcome(fit_policy_to_cost, trace, criterion, epsilon, costs)
    outcome(fit_policy_to_cost, trace, "gate", 2.0, costs)
    outcome(trace.sweep, criterion)
    outcome(trace.evaluate, thresholds)


@fuzz(12)
@given(anything, anything, anything)
def test_calibration_refuses_impossible_numbers(model, corpus, a, b, c):
    fit, train = (corpus.splits[name].limit(40) for name in ("fit", "train"))
    trace = outcome(collect_trace, model, fit, 1, temperatures=a, batch_size=8)
    assert trace is None or np.isfinite(trace.nll).all()
    found = outcome(fit_temperatures, model, fit, 1, max_tokens=b, precision=0.1)
    assert found is None or min(found) > 0
    outcome(fit_temperatures, model, fit, 1, precision=c)
    if not isinstance(c, int) or c < 1:
        outcome(train_gates, model, train, 1, steps=c)
    for wrong in ({"max_tokens": a}, {"batch_size": b}, {"learning_rate": c}):
        report = outcome(train_gates, model, train, 1, **{"max_tokens": 40, "steps": 1} | wrong)
        trained = all(p.isfinite().all() for p in model.gates.parameters())
        assert report is None or trained
        with torch.no_grad():
            for parameter in model.gates.parameters():
                parameter.nan_to_num_()


@pytest.mark.parametrize("rate", [1.01e6, 3.4e37, 10**400, np.float32(3e38), torch.tensor(3e38)])
def test_a_learning_rate_that_no_step_can_take_is_refused(model, corpus, rate):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for call in (train_gates, fit_translators):
        with pytest.raises(ValueError, match=r"learning_rate=.*: must be ≤ 1e"):
            call(model, corpus.splits["train"], 1, learning_rate=rate)
    assert all(before[name].equal(value) for name, value in model.state_dict().items())


@fuzz(20)
@given(*[anything] * 5)
def test_certificates_are_of_possible_risks(
    model, corpus, trace, epsilon, delta, unit, method, kind
):
    split = corpus.splits["certify"].limit(60)
    for wrong in (
        {"epsilon": epsilon}, {"delta": delta}, {"unit": unit}, {"method": method},
        {"criterion": unit}, {"thresholds": method}, {"costs": kind},
    ):  # fmt: skip
        try:
            certificate = outcome(certify, model, trace, split, 1, **{"epsilon": 0.5} | wrong)
        except Unreachable:
            continue
        assert certificate is None or 0 < certificate.delta < 1
