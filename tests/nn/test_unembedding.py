"""The chunked vocabulary loss is torch's cross-entropy, without its memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from earlyexit.corpus.windows import IGNORE
from earlyexit.cost.memory import peak_tensor_bytes
from earlyexit.exits.readers import Predictions, Reader, Scores
from earlyexit.nn.cross_entropy import Teacher, linear_cross_entropy, logit_chunks, softmax_
from earlyexit.nn.unembedding import AdaptiveUnembedding, LinearUnembedding, token_nll

CPU = torch.device("cpu")


def set_chunk(monkeypatch, elements: int) -> None:
    for module in ("cross_entropy", "unembedding"):
        monkeypatch.setattr(f"earlyexit.nn.{module}.CHUNK_ELEMENTS", elements)


@pytest.fixture(params=[1, 7 * 30, 10**9], ids=["row by row", "7 rows", "one chunk"])
def chunked(request, monkeypatch):
    """Chunks of one row, of seven rows (the last one ragged), and no chunks at all."""
    set_chunk(monkeypatch, request.param)


def problem(bias: bool, tokens: int = 37, vocabulary: int = 30, dtype=torch.float32):
    torch.manual_seed(0)
    features = torch.randn(tokens, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, 8, dtype=dtype, requires_grad=True)
    offset = torch.randn(vocabulary, dtype=dtype, requires_grad=True) if bias else None
    targets = torch.randint(vocabulary, (tokens,))
    targets[::5] = IGNORE
    return features, weight, offset, targets


def grads(loss, *args):
    return torch.autograd.grad(3 * loss, [a for a in args if a is not None])


@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_those_of_cross_entropy(chunked, bias):
    *args, targets = problem(bias)
    truth = F.cross_entropy(F.linear(*args), targets, ignore_index=IGNORE)
    found = linear_cross_entropy(*args, targets)
    torch.testing.assert_close(found, truth)
    for a, b in zip(grads(found, *args), grads(truth, *args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_is_close():
    *args, targets = problem(True, tokens=200)
    truth = F.cross_entropy(F.linear(*args), targets, ignore_index=IGNORE)
    found = linear_cross_entropy(*args, targets, bf16=True)
    assert found.dtype == torch.float32
    assert abs(found - truth) < 0.02 * truth
    for a, b in zip(grads(found, *args), grads(truth, *args), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.03 * b.norm()


def test_nothing_scored_is_no_loss_and_no_gradient():
    *args, targets = problem(True)
    loss = linear_cross_entropy(*args, torch.full_like(targets, IGNORE))
    assert loss == 0
    assert all(not g.any() for g in grads(loss, *args))


@pytest.mark.parametrize("bias", [True, False])
def test_token_nll_is_cross_entropy_per_token(chunked, bias):
    *args, targets = problem(bias)
    truth = F.cross_entropy(F.linear(*args), targets, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(token_nll(*args, targets), truth.detach())


@torch.no_grad()
@pytest.mark.parametrize("reuse", [False, True])
def test_chunks_cover_every_row_once(chunked, reuse):
    features, weight, bias, _ = problem(True)
    chunks = logit_chunks(features, weight, bias, reuse)
    parts = [(part, logits.clone() if reuse else logits) for part, logits in chunks]
    rows = torch.cat([torch.arange(len(features))[part] for part, _ in parts])
    assert rows.tolist() == list(range(len(features)))
    torch.testing.assert_close(
        torch.cat([logits for _, logits in parts]), F.linear(features, weight, bias)
    )


def test_softmax_in_place_survives_large_logits():
    logits = torch.tensor([[1e4, 0.0], [-1e4, -1e4], [1.0, 2.0]])
    probability, log_total = logits.softmax(-1), logits.logsumexp(-1)
    in_place, found = softmax_(logits)
    assert in_place.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(in_place, probability)
    torch.testing.assert_close(found, log_total)


@pytest.mark.slow
def test_the_logits_of_a_batch_are_never_held(monkeypatch):
    *args, targets = problem(True, tokens=2000, vocabulary=1000)
    whole = 2000 * 1000 * 4
    set_chunk(monkeypatch, 50 * 1000)

    def ours():
        grads(linear_cross_entropy(*args, targets), *args)

    def theirs():
        grads(F.cross_entropy(F.linear(*args), targets, ignore_index=IGNORE), *args)

    assert peak_tensor_bytes(ours, CPU) < whole / 4
    assert peak_tensor_bytes(lambda: token_nll(*args, targets), CPU) < whole / 4
    assert peak_tensor_bytes(theirs, CPU) >= 2 * whole  # the control: logits and their gradient


def unembedding(kind) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    features, targets = torch.randn(90, 8, requires_grad=True), torch.randint(60, (90,))
    targets[::7] = IGNORE
    return kind(8, 60), 3 * features.detach().requires_grad_(), targets


KINDS = [LinearUnembedding, AdaptiveUnembedding]


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_gives_exact_normalised_probabilities(chunked, kind):
    head, features, targets = unembedding(kind)
    log_p = head(features).log_softmax(dim=-1)
    if kind is AdaptiveUnembedding:
        torch.testing.assert_close(head(features).exp().sum(dim=-1), torch.ones(90))
    truth = F.nll_loss(log_p, targets, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(head.nll(features, targets), truth.detach())
    assert torch.equal(head.predict(features), log_p.argmax(dim=-1))
    rows = torch.cat([logits for _, logits in head.chunks(features)])
    torch.testing.assert_close(rows.log_softmax(dim=-1), log_p)


def test_a_teacher_of_an_adaptive_head_predicts_frequent_words_and_clusters(chunked):
    """Truth: cross-entropy to a mixture in the head's columns, and to the word inside a cluster."""
    head, features, targets = unembedding(AdaptiveUnembedding)
    other, inputs = AdaptiveUnembedding(8, 60), [features, *head.parameters()]
    found = head.loss(features, targets, teacher=Teacher(features.detach(), other, 0.3))
    scored, (first, *_) = targets != IGNORE, head.softmax.cutoffs
    log_p, y = head(features)[scored], targets[scored]
    column = torch.where(y < first, y, first + (y >= head.softmax.cutoffs[1]).long())
    columns = head.softmax.head(features[scored]).log_softmax(-1)
    taught = other.softmax.head(features.detach()[scored]).softmax(-1)
    hard = columns.gather(1, column[:, None]).squeeze(1)
    inside = log_p.gather(1, y[:, None]).squeeze(1) - hard
    truth = -(0.7 * hard + 0.3 * (taught * columns).sum(-1) + inside).mean()
    torch.testing.assert_close(found, truth)
    for a, b in zip(grads(found, *inputs), grads(truth, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_heads_loss_is_cross_entropy_with_its_gradients(kind):
    head, features, targets = unembedding(kind)
    inputs = [features, *head.parameters()]
    truth = F.cross_entropy(head(features), targets, ignore_index=IGNORE)
    found = head.loss(features, targets)
    torch.testing.assert_close(found, truth)
    for a, b in zip(grads(found, *inputs), grads(truth, *inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    nothing = head.loss(features, torch.full_like(targets, IGNORE))
    assert nothing == 0 and not torch.autograd.grad(nothing, features)[0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_readers_take_the_same_from_logits_and_from_features(chunked, kind):
    head, features, targets = unembedding(kind)
    tokens = torch.randperm(90)[:33]
    for read in (Reader(), Scores(targets, len(head(features)[0])), Predictions()):
        from_logits = read(head(features[tokens]), tokens)
        found = read.from_features(head, features[tokens], tokens)
        torch.testing.assert_close(found, from_logits)
        assert len(read.from_features(head, features[:0], tokens[:0])) == 0
        word = read.from_top(head.predict(features[tokens]))
        assert word is None or torch.equal(word, from_logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0])
def test_the_most_probable_word_is_that_of_all_words(chunked, kind, sharpness):
    head, features, _ = unembedding(kind)
    features = sharpness * features
    log_p, word = head.top(features)
    truth = head(features).log_softmax(dim=-1).max(dim=-1)
    torch.testing.assert_close(log_p, truth.values)
    assert torch.equal(word, truth.indices)
    assert torch.equal(word, head.predict(features))
    if head.cheap_top and sharpness == 5.0:  # rare words are among them
        assert (word >= head.softmax.shortlist_size).any()


def test_an_adaptive_head_scores_without_the_vocabulary():
    torch.manual_seed(0)
    head, features = AdaptiveUnembedding(16, 5000).eval(), torch.randn(400, 16)
    targets = torch.randint(450, (400,))  # frequent words: no cluster is opened
    peak = peak_tensor_bytes(lambda: head.nll(features, targets), CPU)
    assert peak < 400 * 5000 * 4 / 3


@pytest.mark.parametrize(("width", "words"), [(2, 60), (8, 2)])
def test_an_adaptive_head_that_cannot_be_is_refused(width, words):
    with pytest.raises(ValueError, match="output_head='linear'"):
        AdaptiveUnembedding(width, words)
