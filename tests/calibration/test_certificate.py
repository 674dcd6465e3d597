"""The certificate: what it promises, what it covers, and what it refuses."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from earlyexit.calibration.bounds import METHODS
from earlyexit.calibration.certificate import COVERED, Certificate
from earlyexit.calibration.certify import PATH, Refused, certify, certify_losses, decide, propose
from earlyexit.calibration.collect import collect_trace
from earlyexit.calibration.power import ceilings, chosen_ceiling
from earlyexit.calibration.unit_losses import WindowLosses, traced_losses, window_losses
from earlyexit.corpus.splits import Split
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy

CEILING = 4.0  # B over log(1 + ε)
POLICIES = [ExitPolicy.constant(t, 3, "saturation") for t in (0.99, 0.9, 0.5)]


def losses(means, n=80, spread=0.01, seed=0):
    noise = np.random.default_rng(seed).normal(0, spread, (n, 1))
    gaps = (np.asarray(means)[None] + noise) * 10
    layers = np.linspace(2.5, 1.5, len(means))
    return WindowLosses(gaps, np.zeros(n), np.full(n, 10), np.arange(n) // 2, layers, 3, "m", "d")


def test_returns_the_riskiest_accepted_policy():
    found = decide(POLICIES, losses([0.0, 0.02, 0.2]), 0.05, 0.05, CEILING)
    assert found.policy == POLICIES[1] and found.accepted == 2 and found.candidates == 3
    assert found.n == 40 and found.unit == "document" and found.longest_unit == 20
    assert found.mean_gap <= found.bound <= math.log1p(0.05) < found.ceiling
    assert found.p_value <= 0.05 and found.speedup_layers == pytest.approx(3 / found.layers)
    by_window = decide(POLICIES, losses([0.0, 0.02, 0.2]), 0.05, 0.05, CEILING, "window")
    assert by_window.n == 80


def test_stops_at_the_first_failure():
    index, p = certify_losses(losses([0.0, 0.2, 0.0]).per_unit("document"), 0.05, 0.05, CEILING)
    assert index == 0 and p[2] <= 0.05


def test_refusal_says_what_would_be_needed():
    with pytest.raises(Refused, match="no test can certify less than"):
        decide(POLICIES, losses([0.1, 0.2, 0.3]), 0.05, 0.05, CEILING)


def test_clipping_is_from_above_only_and_reported():
    gaps = np.full((60, 1), -0.05)
    gaps[:3] = 5.0  # three documents far over the ceiling
    found = decide(
        POLICIES[:1],
        WindowLosses(gaps, np.zeros(60), np.ones(60), np.arange(60), np.array([2.0]), 3),
        0.05, 0.2, CEILING,
    )  # fmt: skip
    assert found.clipped_share == pytest.approx(3 / 60)
    assert found.ceiling == pytest.approx(CEILING * math.log1p(0.05))
    assert found.mean_gap > math.log1p(0.05) > found.bound, "the clipped mean is what is certified"


@pytest.mark.parametrize(
    ("epsilon", "delta", "n", "message"),
    [(0.0, 0.05, 9, "epsilon"), (-1, 0.05, 9, "epsilon"), (0.05, 0.0, 9, "delta"),
     (0.05, 1.0, 9, "delta"), (math.nan, 0.05, 9, "epsilon"), (0.05, 0.05, 1, "units")],
)  # fmt: skip
def test_bad_risk_is_refused(epsilon, delta, n, message):
    with pytest.raises(ValueError, match=message):
        certify_losses(np.zeros((n, 2)), epsilon, delta, CEILING)


@pytest.mark.parametrize("ceiling", [1.0, 0.5, math.nan])
def test_a_ceiling_that_guarantees_nothing_is_refused(ceiling):
    with pytest.raises(ValueError, match=r"ceiling=.* must be > 1"):
        certify_losses(np.zeros((9, 2)), 0.05, 0.05, ceiling)


def test_nan_and_tokens_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        certify_losses(np.array([[0.0], [np.nan]]), 0.05, 0.05, CEILING)
    with pytest.raises(ValueError, match="document"):
        losses([0.0]).per_unit("token")


TEXT = "d"
LENGTHS = (29, 30, 12, 3)  # of the documents of a text


@pytest.fixture
def model(make_model):
    return make_model()


def text(name="test", lengths=LENGTHS) -> Split:
    """Documents of these lengths, from the certified text."""
    document = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return Split(name, np.full(len(document), 2, np.int32), document, np.ones_like(document), TEXT)


def certificate_of(model, cut=0, **changes) -> Certificate:
    measured = replace(
        losses([0.0, 0.02, 0.2]),
        model_hash=model.fingerprint(), data_hash=TEXT, n_seq=model.n_seq, cut=cut, **changes,
    )  # fmt: skip
    return decide(POLICIES, measured, 0.05, 0.05, CEILING)


def test_it_covers_what_is_read_as_it_was_certified(model, corpus, caplog):
    found = certificate_of(model)
    assert found.check(model, text()) and found.check(model, text("certify"))
    assert found.check(model, text(), policy=found.policy, n_seq=model.n_seq) is True
    assert found.check(model, replace(corpus, data_hash=TEXT)) is True
    assert not caplog.text
    for other in ("other", ""):
        assert found.check(model, replace(text(), data_hash=other)) is False
        assert "nothing is certified" in caplog.text
    nowhere = replace(found, data_hash="", digest="")
    assert nowhere.check(model, replace(text(), data_hash="")) is False


def test_another_model_is_refused(model):
    found = certificate_of(model)
    with torch.no_grad():
        model.gates.gates[0].bias += 1e-3
    with pytest.raises(ValueError, match="certify again"):
        found.check(model, text())


@pytest.mark.parametrize("name", ["train", "fit", "valid", "unheard of"])
def test_a_split_that_was_fitted_to_is_refused(model, name):
    with pytest.raises(ValueError, match=f"split '{name}'.* give 'certify' or 'test'"):
        certificate_of(model).check(model, text(name))
    with pytest.raises(ValueError, match=f"losses on '{name}'"):
        certificate_of(model, split=name)


@pytest.mark.parametrize(
    ("certified", "given", "covered"),
    [(0, 0, True), (16, 16, True), (64, 64, True),
     (0, 64, True), (64, 0, True),  # no document is so long: both read whole documents
     (0, 16, False), (16, 0, False), (16, 8, False), (8, 16, False), (0, 30, False)],
)  # fmt: skip
def test_documents_are_cut_as_they_were_certified(model, certified, given, covered):
    found, part = certificate_of(model, certified), text().truncate(given)
    if covered:
        assert found.check(model, part) is True
        return
    with pytest.raises(
        ValueError, match=f"truncate\\({certified}\\)" if certified else "are whole"
    ):
        found.check(model, part)


def test_a_limited_split_tells_whether_documents_were_cut(model):
    found, many = certificate_of(model), text(lengths=(30,) * 20)
    assert many.limit(300).cut == 0 and found.check(model, many.limit(300))
    assert many.truncate(20).limit(300).cut == 20 and many.limit(80).truncate(25).cut == 10
    with pytest.raises(ValueError, match="documents cut to 10 tokens"):
        found.check(model, many.limit(80))


@pytest.mark.parametrize("certified", [0, 12, 16])
@pytest.mark.parametrize("name", ["train", "fit", "certify", "valid", "test"])
@pytest.mark.parametrize("given", [0, 8, 12, 16, 64])
@pytest.mark.parametrize("longer", [-1, 0, 1])
def test_of_all_ways_to_read_the_text_only_the_certified_is_covered(
    model, name, certified, given, longer
):
    """Every split, length of documents and of windows; documents of up to 30 tokens."""
    found, part = certificate_of(model, certified), text(name).truncate(given)
    alike = min(given or 64, 30) == min(certified or 64, 30)
    if name in COVERED and alike and not longer:
        assert found.check(model, part, n_seq=model.n_seq + longer) is True
        return
    with pytest.raises(ValueError):
        found.check(model, part, n_seq=model.n_seq + longer)


def test_another_policy_and_other_windows_are_refused(model):
    found = certificate_of(model)
    moved = replace(found.policy, thresholds=(0.89, *found.policy.thresholds[1:]))
    with pytest.raises(ValueError, match=r"0\.89.* is not certified"):
        found.check(model, text(), policy=moved)
    for n_seq in (model.n_seq - 1, model.n_seq + 1, 0):
        with pytest.raises(ValueError, match=f"n_seq={n_seq}: .* windows of {model.n_seq} tokens"):
            found.check(model, text(), n_seq=n_seq)


def test_what_was_measured_is_bound(model, corpus):
    """The certificate gets windows, cut and text from the split that was run."""
    part = replace(corpus.splits["certify"], data_hash=TEXT).truncate(np.int64(12))
    measured = window_losses(model, part, 1, [ExitPolicy.static(model.n_layers, model.n_layers)])
    assert (measured.n_seq, measured.cut, measured.split) == (model.n_seq, 12, "certify")
    found = decide([ExitPolicy.static(model.n_layers, model.n_layers)], measured, 2.0, 0.3, CEILING)
    assert found.check(model, part) is True
    with pytest.raises(ValueError, match=r"truncate\(12\)"):
        found.check(model, replace(corpus.splits["certify"], data_hash=TEXT))


@st.composite
def certificates(draw) -> Certificate:
    rule = CRITERIA[draw(st.sampled_from(sorted(CRITERIA)))]
    number = st.floats(-1e9, 1e9)
    threshold = st.floats(*(max(-5, min(5, b)) for b in rule.bounds)) | st.just(rule.never)
    thresholds = draw(st.lists(threshold, min_size=1, max_size=5))
    layers, candidates = len(thresholds), draw(st.integers(1, 99))
    delta = draw(st.floats(0.001, 0.999))
    return Certificate(
        policy=ExitPolicy(rule.name, tuple(thresholds)),
        epsilon=draw(st.floats(1e-12, 1e12)), delta=delta,
        unit=draw(st.sampled_from(["document", "window"])), n=draw(st.integers(2, 10**9)),
        longest_unit=draw(st.integers(1, 10**9)), ceiling=draw(st.floats(1e-12, 1e12)),
        clipped_share=draw(st.floats(0, 1)), method=draw(st.sampled_from(sorted(METHODS))),
        p_value=draw(st.floats(0, delta)), bound=draw(number), mean_gap=draw(number),
        token_gap=draw(number), layers=draw(st.floats(1, layers)), n_layers=layers,
        smallest_level=draw(number), candidates=candidates,
        accepted=draw(st.integers(1, candidates)), model_hash=draw(st.text()),
        data_hash=draw(st.text()), n_seq=draw(st.integers(0, 10**6)), cut=draw(st.integers(0, 99)),
    )  # fmt: skip


ONE_FOLDER = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@ONE_FOLDER
@given(found=certificates())
def test_a_certificate_survives_its_file(tmp_path, found):
    found.save(tmp_path / "c.json")
    assert Certificate.load(tmp_path / "c.json") == found
    text = (tmp_path / "c.json").read_text()
    json.loads(text, parse_constant=lambda s: pytest.fail(f"{s} is not JSON"))


WRONG = (
    "x", "", -3, -0.5, 0.5, 1e-9, 10**400, math.nan, math.inf, None, True, [], [1], {}, {"a": 1},
)  # fmt: skip


@ONE_FOLDER
@given(found=certificates(), data=st.data())
def test_a_file_that_was_edited_is_refused_in_one_line(tmp_path, found, data):
    path, edited = tmp_path / "c.json", json.loads(found.to_json())
    place = edited["policy"] if data.draw(st.booleans()) else edited
    key, value = data.draw(st.sampled_from(sorted(place))), data.draw(st.sampled_from(WRONG))
    if isinstance(place[key], list) and data.draw(st.booleans()):
        place, key = place[key], 0
    before, place[key] = place[key], value
    path.write_text(json.dumps(edited))
    if type(before) is not bool and before == value and type(value) is not bool:
        assert Certificate.load(path) == found
        return
    with pytest.raises(ValueError, match=r"c\.json: ") as refused:
        Certificate.load(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("edit", "told"),
    [({"epsilon": "x"}, "epsilon='x': must be a number"), ({"epsilon": 1e-9}, "a field was changed"),
     ({"layers": -3}, "layers=-3: must be ≥ 1"), ({"bound": math.nan}, "must be a finite number"),
     ({"n": 2.5}, "n=2.5: must be a whole number"), ({"unit": "token"}, "must be 'document' or"),
     ({"method": "guess"}, "method='guess': known are"), ({"digest": ""}, "digest=''"),
     ({"p_value": 0.5}, "p_value=0.5 above delta=0.05"), ({"more": 1}, "unknown: more"),
     ({"accepted": 9}, "accepted=9 of candidates=3"), ({"layers": 9.0}, "layers=9.0 of n_layers=3"),
     ({"policy": 3}, "3 is not a JSON object"), ({"digest": "0" * 16}, "has digest '0000"),
     ({"policy": ExitPolicy.constant(0.9, 99).to_dict()}, "99 thresholds for n_layers=3"),
     ({"policy": ExitPolicy.constant(0.91, 3, "saturation").to_dict()}, "a field was changed")],
)  # fmt: skip
def test_a_wrong_field_is_named(model, edit, told):
    given = json.loads(certificate_of(model).to_json()) | edit
    with pytest.raises(ValueError) as refused:
        Certificate.from_dict(given)
    assert told in str(refused.value)


def test_no_certificate_at_all_is_refused(model, tmp_path):
    given = json.loads(certificate_of(model).to_json())
    for name in given:
        with pytest.raises(ValueError, match=f"missing: {name}"):
            Certificate.from_dict({k: v for k, v in given.items() if k != name})
    for text in ("", "3", "[]", "null", "{", "[" * 100_000, "\ufeff{}"):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ValueError, match=r"c\.json: "):
            Certificate.load(tmp_path / "c.json")


def test_a_changed_copy_is_refused_unless_made_on_purpose(model):
    found = certificate_of(model)
    for change in ({"epsilon": 1e-9}, {"policy": POLICIES[2]}, {"cut": 8}):
        with pytest.raises(ValueError, match="a field was changed"):
            replace(found, **change)
        assert replace(found, **change, digest="").digest != found.digest
    object.__setattr__(found, "epsilon", 1e-9)
    with pytest.raises(ValueError, match="a field was changed"):
        found.check(model, text())


def test_splits_keep_to_their_roles(make_model, corpus):
    model, splits = make_model(), corpus.splits
    traces = {name: collect_trace(model, splits[name], 1) for name in splits}
    call = {"epsilon": 0.05, "criterion": "saturation"}
    with pytest.raises(ValueError, match="certification part"):
        certify(model, traces["fit"], splits["test"], 1, **call)
    with pytest.raises(ValueError, match="may not propose"):
        certify(model, traces["certify"], splits["certify"], 1, **call)
    with pytest.raises(ValueError, match="test split"):
        certify(model, traces["test"], splits["certify"], 1, **call)
    with pytest.raises(ValueError, match="trace is of model"):
        certify(make_model(seed=1), traces["fit"], splits["certify"], 1, **call)


def test_gaps_are_those_of_the_real_run(make_model, corpus):
    model, split = make_model(), corpus.splits["certify"]
    policies = [ExitPolicy.static(layer, model.n_layers) for layer in (0, model.n_layers)]
    found = window_losses(model, split, 1, policies)
    assert np.abs(found.gaps[:, 1]).max() == 0, "full depth has no gap to itself"
    assert found.layers.tolist() == [1.0, float(model.n_layers)]
    assert found.tokens.sum() == split.n_tokens
    documents = found.per_unit("document")
    weights = np.bincount(np.unique(found.document, return_inverse=True)[1], found.tokens)
    assert np.average(documents[:, 0], weights=weights) == pytest.approx(found.per_token[0])
    trace = collect_trace(model, split, 1)
    gap = trace.nll[:, 0] - trace.nll[:, -1]  # leaving at exit 0 there is no propagation
    assert found.per_token[0] == pytest.approx(gap.mean(dtype=float), rel=1e-4)


def test_the_ceiling_is_chosen_without_a_look_at_the_certification_part(make_model, corpus):
    """Certified on two parts of equal shape, of which one loses far more: the same ceiling."""
    model, part = make_model(), corpus.splits["certify"]
    trace = collect_trace(model, corpus.splits["fit"], 1)
    other = replace(part, ids=np.roll(part.ids, 11))
    call = {"epsilon": 2.0, "delta": 0.3, "criterion": "saturation"}
    found = [certify(model, trace, split, 1, **call) for split in (part, other)]
    assert found[0].mean_gap != found[1].mean_gap and found[0].ceiling == found[1].ceiling
    path = propose(trace, 2.0 * np.array(PATH), "saturation")
    expected = traced_losses(trace, path, 0)
    assert found[0].ceiling / math.log1p(2.0) == pytest.approx(
        chosen_ceiling(ceilings(expected, 2.0, 0.3, found[0].n))
    )


def test_it_says_in_a_sentence_what_is_guaranteed_and_what_is_not(model):
    certificate = certificate_of(model)
    told = str(certificate)
    assert told.startswith("Except with probability") and told.endswith(".") and "\n" not in told
    for number in (f"{certificate.epsilon:.1%}", f"{certificate.speedup_layers:.2f}×"):
        assert number in told
    assert f"{certificate.n} documents" in told and f"{certificate.ceiling:.3g} nats" in told
    windows = str(replace(certificate, unit="window", digest=""))
    assert "guarantees nothing" in windows and "Except" not in windows
