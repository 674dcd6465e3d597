"""Text is generated with exits: in O(1) state per layer where a model can, else by running again.

There are three ways, and :func:`decode` takes the fastest that is right for the model:

* compiled loops (:mod:`earlyexit.exits.fused`) for plain ResNet-BK blocks on a CPU. The prompt is run in
  one pass, then every word takes O(1);
* step by step through the contract, for all that keep a state from position to position;
* running everything again for each word, in O(N²), for any causal model.

A policy is used in one of two ways. Without drafts it decides where a word leaves, and the words are
those of its exits. With drafts (self-speculation; LayerSkip, Elhoushi et al. 2024, which drafts with a
fixed exit) the exits only propose, as long as the policy lets words go, and the last layer verifies a
whole draft in one pass: the words are those of full depth, and drawn ones are distributed as its.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from earlyexit.checked import real, whole
from earlyexit.corpus.windows import IGNORE
from earlyexit.exits.execution import DenseWalk, run
from earlyexit.exits.fused import FusedDecoder, Texts, rule_of
from earlyexit.exits.policy import ExitPolicy, check_policy
from earlyexit.exits.protocol import ExitModel
from earlyexit.exits.readers import Reader
from earlyexit.exits.statistics import layers_executed
from earlyexit.exits.tally import ExitRun, Tally
from earlyexit.nn.borrowed import borrowed
from earlyexit.nn.decode_loops import Choice, Weights, distribution, draw
from earlyexit.nn.unembedding import finite_words

Prompts = Tensor | Sequence[Tensor]
Told = Callable[[int, list[int]], None]
# Maps the ids so far and a position to the run of the tokens at that position, one per sequence.
NextRun = Callable[[Tensor, int], ExitRun]


@dataclass(frozen=True, eq=False)
class Generated:
    """These are continued sequences.

    Attributes:
        ids: words ``(B, M)``, ``IGNORE`` behind the end of a sequence.
        exits: 0-based exit of every word run ``(B, M − 1)``, n_layers where there was none. With drafts:
            the exit that proposed the word after it, if that stood.
        new: new words of each sequence ``(B,)``.
        layers: layers that the new words took, divided by their number: what was run for a draft that
            did not stand counts, the prompt does not.
        drafts: counts ``(4, L, max_draft + 1)`` by exit and place in the draft of words that were
            drafted, decided upon, and that stood; and of rows that each layer ran, by how many ran at
            once. None without drafts.
    """

    ids: Tensor
    exits: Tensor
    new: Tensor
    layers: float
    drafts: Tensor | None = None


@torch.no_grad()
def decode(
    model: ExitModel,
    prompt: Prompts,
    n_new: int,
    policy: ExitPolicy | None = None,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    *,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    max_draft: int = 0,
    told: Told | None = None,
    weights: Weights | None = None,
) -> Generated:
    """Continue prompts by ``n_new`` words each, or up to a stop word.

    A continuation ends with the window. The state alone could go on, but a position has a learned
    embedding, and there is none beyond n_seq: what came next would not be what the model was trained
    for, so it is refused rather than made.

    Args:
        prompt: token ids ``(B, N)``, or a list of ids ``(N_b,)`` of unequal lengths.
        policy: None runs full depth.
        temperature: 0 takes the most probable word; otherwise a word is drawn.
        generator: of the random numbers that words are drawn with.
        top_p: words are drawn among the fewest whose share reaches it.
        stop: words at which a sequence ends; they are its last.
        max_draft: longest draft of words that the policy lets go, verified by the last layer; 0: none.
        told: called with the number of a sequence and its new words, as they come.
        weights: what :func:`earlyexit.exits.fused.pack` made of the model, for compiled loops; None goes
            through the contract.

    Raises:
        TypeError: a number is no number, or the policy is none.
        ValueError: a prompt is empty, prompt and continuation exceed n_seq, ``n_new`` or the
            temperature is negative, top_p is outside (0, 1], a stop word is outside the vocabulary, the
            policy is for another depth, drafts are asked of what cannot make them, logits are not
            finite, or ``embed`` refuses the prompt.
    """
    policy, full = policy or ExitPolicy.static(model.n_layers, model.n_layers), policy is None
    check_policy(policy, model.n_layers)
    choice = Choice(real("temperature", temperature, least=0), real("top_p", top_p))
    if not 0 < choice.top_p <= 1:
        raise ValueError(f"top_p={choice.top_p}: must lie in (0, 1]")
    stops = [whole("stop", word, 0, model.vocab_size - 1) for word in stop]
    texts = _texts(model, prompt, whole("n_new", n_new), choice, stops, generator)
    rule = None if weights is None else rule_of(model, policy)
    if whole("max_draft", max_draft) and (rule is None or full):
        raise ValueError(
            f"max_draft={max_draft}: drafts need a policy by depth, gate or agreement, and a model of"
            " plain ResNet-BK blocks on a CPU: leave out max_draft for others"
        )
    with borrowed(model) if rule is None else nullcontext():
        if rule is None:
            decoder = ContractDecoder(model, texts, policy)
        else:
            decoder = FusedDecoder(weights, texts, rule, max_draft)
        while (texts.length < texts.end).any():
            known = texts.length.copy()
            decoder.advance(1 if told else texts.ids.shape[1])
            for b in (texts.length > known).nonzero()[0].tolist() if told else ():
                told(b, texts.ids[b, known[b] : texts.length[b]].tolist())
    return _generated(texts, model, getattr(decoder, "seen", None) if max_draft else None)


def _texts(
    model: ExitModel, prompt: Prompts, n_new: int, choice: Choice, stops: list[int], generator
) -> Texts:
    """Return checked prompts with room for their continuations."""
    prompts = _checked(model, prompt)
    lengths = np.array([len(one) for one in prompts])
    if lengths.max() + n_new > model.n_seq + 1:
        raise ValueError(
            f"{lengths.max()} + {n_new} tokens exceed n_seq={model.n_seq}: shorten prompt or n_new"
        )
    ids = np.full((len(prompts), lengths.max() + n_new), IGNORE)
    for row, one in zip(ids, prompts, strict=True):
        row[: len(one)] = one.cpu().numpy()

    def uniform(shape: tuple[int, ...]) -> np.ndarray:
        if choice.temperature == 0:
            return np.zeros(shape)
        device = "cpu" if generator is None else generator.device
        made = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
        return made.cpu().numpy()

    exits, stop = np.full_like(ids, IGNORE), np.array(stops, dtype=np.int64)
    return Texts(ids, exits, lengths, lengths.copy(), lengths + n_new, choice, uniform, stop)


def _checked(model: ExitModel, prompt: Prompts) -> list[Tensor]:
    """Return prompts ``(N_b,)`` that ``embed`` does not refuse."""
    if isinstance(prompt, Tensor):
        model.embed(prompt)
        return list(prompt)
    if not len(prompt):
        raise ValueError("there is no prompt: give one or more")
    for b, one in enumerate(prompt):
        if not len(one):
            raise ValueError(f"prompt {b} is empty: give it a word or more, such as <eos>")
        model.embed(torch.as_tensor(one)[None])
    return list(map(torch.as_tensor, prompt))


def _generated(texts: Texts, model: ExitModel, seen: np.ndarray | None) -> Generated:
    longest, new = int(texts.length.max()), texts.length - texts.start
    places = np.arange(longest)
    ids = np.where(places < texts.length[:, None], texts.ids[:, :longest], IGNORE)
    ran = places[:-1] < texts.length[:, None] - 1
    exits = np.where(ran, texts.exits[:, : longest - 1], IGNORE)
    fresh = ran & (places[:-1] >= texts.start[:, None] - 1)
    layers = layers_executed(exits[fresh], model.n_layers).sum()
    if seen is not None:
        layers = seen[3].sum()
    device = next(model.parameters()).device
    ids, exits, new = (torch.from_numpy(part).to(device) for part in (ids, exits, new))
    drafts = None if seen is None else torch.from_numpy(seen)
    return Generated(ids, exits, new, layers / max(1, int(new.sum())), drafts)


class ContractDecoder:
    """This decoder continues texts position by position, through the contract or by running again."""

    def __init__(self, model: ExitModel, texts: Texts, policy: ExitPolicy):
        self.model, self.texts, self.position = model, texts, 0
        self.device = next(model.parameters()).device
        self.uniforms = texts.uniform((texts.ids.shape[1], len(texts.ids)))
        made = _stepping if model.can_step else _running_again
        self.next_run = made(model, policy)
        common = texts.length if (texts.length < texts.end).any() else texts.length.max()
        for _ in range(np.min(common) - 1):  # all but the last word that every prompt has
            self._run()

    def _run(self) -> None:
        t, at = self.texts, self.position
        ids = torch.from_numpy(np.maximum(t.ids[:, : at + 1], 0)).to(self.device)
        result = self.next_run(ids, at)
        t.exits[:, at], self.position = result.exit_layers.cpu().numpy(), at + 1
        if (rows := (t.length == at + 1) & (t.length < t.end)).any():
            words = _choose(result.outputs, t.choice, self.uniforms[at])
            t.ids[rows, at + 1] = words[rows]
            t.length[rows] += 1
            ended = rows & np.isin(t.ids[:, at + 1], t.stop)
            t.end[ended] = t.length[ended]

    def advance(self, words: int) -> None:
        """Run ``words`` more positions, or fewer: a sequence gets a word where its prompt has ended."""
        for _ in range(words):
            if not (self.texts.length < self.texts.end).any():
                return
            self._run()


def _choose(logits: Tensor, choice: Choice, uniforms: np.ndarray) -> np.ndarray:
    """Return a word for each row of logits ``(B, V)``."""
    word = finite_words(*logits.max(dim=-1)).cpu().numpy()
    if choice.temperature == 0:
        return word
    p = np.empty(logits.shape[1])
    for b, row in enumerate(logits.double().cpu().numpy()):
        distribution(row, choice.temperature, choice.top_p, p)
        word[b] = draw(p, uniforms[b])
    return word


def _running_again(model: ExitModel, policy: ExitPolicy) -> NextRun:
    """At every position run all that precedes it, in O(N²): this is right for any causal model."""

    def next_run(ids: Tensor, position: int) -> ExitRun:
        x = ids[:, : position + 1]
        result = run(model, x, policy, Reader())
        last = slice(position, None, position + 1)  # the last token of each sequence
        return ExitRun(result.outputs[last], result.exit_layers[last], result.scores[last])

    return next_run


def _stepping(model: ExitModel, policy: ExitPolicy) -> NextRun:
    memories = [None] * model.n_layers

    def next_run(ids: Tensor, position: int) -> ExitRun:
        walk = StepWalk(model, ids[:, position : position + 1], position, memories)
        progress = torch.full((len(ids),), position / model.n_seq, device=ids.device)
        tally = Tally(model, walk, progress.to(walk.h.dtype), policy, Reader())
        for layer in range(model.n_layers):
            walk.advance(layer)  # also when all have left: the memory of deeper layers goes on
            tally.judge(layer)
        return tally.finish()

    return next_run


class StepWalk(DenseWalk):
    """This walk runs one position of every sequence; exited rows only feed deeper layers' memory.

    Args:
        x: token ids ``(B, 1)`` at ``position``.
        memories: what :meth:`ExitModel.step` keeps of each layer; changed in place.
    """

    def __init__(self, model: ExitModel, x: Tensor, position: int, memories: list):
        self.model, self.memories = model, memories
        self.h = model.embed(x, start=position).squeeze(1)
        self.given: Tensor | None = None
        self.alive = torch.arange(len(x), device=x.device)

    def advance(self, layer: int) -> None:
        model, alive = self.model, self.alive
        u = model.normed(layer, self.h)
        given = handed = model.contribution(layer, u)
        if self.given is not None:
            exited = self.exited()[:, None]
            handed = torch.where(exited, model.handed_on(given, self.given), given)
            given = torch.where(exited, self.given, given)
        self.given = given
        mixed, self.memories[layer] = model.step(layer, u, handed, self.memories[layer])
        if len(alive):
            self.before = self.h[alive]
            self.after = model.update(layer, self.before, u[alive], mixed[alive])
            self.h = self.h.index_copy(0, alive, self.after)
