"""A Hugging Face decoder drafts words with its first layers, and verifies a draft in one pass.

The words are those of the decoder as it is (self-speculation; Zhang et al. 2024, *Draft & Verify*;
LayerSkip, Elhoushi et al. 2024), up to rounding, by which nearly equal logits change places: hardly ever
in float32, often in half precision. The first stages and an exit's head propose words one by one, as
long as the exit's gate expects the last layer to agree, and the remaining stages run all of them at
once. Going back is cutting keys and values off. Full depth, without a draft, is decoded in the same way,
so that both can be timed against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from earlyexit.checked import real, whole
from earlyexit.corpus.windows import IGNORE
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.generation import Generated
from earlyexit.exits.protocol import exit_state
from earlyexit.models.decoder_layers import Attending, call_layer
from earlyexit.models.pretrained import Cache, PretrainedModel
from earlyexit.nn.borrowed import borrowed
from earlyexit.nn.decode_loops import distribution, draw
from earlyexit.nn.unembedding import finite_words


@dataclass(frozen=True)
class Drafts:
    """What proposes words, and how many at once.

    Attributes:
        exit_layer: exit whose head drafts, 0-based, before the last.
        longest: words of a draft, at most; 0: none, words are decoded at full depth.
        agreement: a word is drafted while the exit's gate sees the last layer agree with at least this
            probability; 0 asks no gate.
    """

    exit_layer: int = 0
    longest: int = 0
    agreement: float = 0.0


@torch.no_grad()
def decode_with_drafts(
    model: PretrainedModel,
    prompt: Tensor,
    n_new: int,
    drafts: Drafts,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    *,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
) -> Generated:
    """Continue prompts as the last layer would, one after another.

    Args:
        prompt: token ids ``(B, N)``.
        temperature: 0 takes the most probable word; otherwise words of a draft are kept or replaced by
            the rule that leaves the last layer's distribution as it is (Leviathan et al. 2023, §2.3).
        generator: of the random numbers that words are drawn with, on the CPU.
        top_p: words are drawn among the fewest whose share reaches it.
        stop: words at which a sequence ends; they are its last.

    Returns:
        The words, and counts of what was drafted; see :class:`~earlyexit.exits.generation.Generated`.

    Raises:
        TypeError: a number is no number, or ids are no tensor of whole numbers.
        ValueError: a prompt is empty, prompt and continuation exceed n_seq, a number lies outside its
            range, a gate is asked that was not fitted, or logits are not finite.
    """
    drafts = _checked(model, drafts)
    temperature, top_p = real("temperature", temperature, least=0), real("top_p", top_p, above=0)
    if top_p > 1:
        raise ValueError(f"top_p={top_p}: must lie in (0, 1]")
    stops = {whole("stop", word, 0, model.vocab_size - 1) for word in stop}
    model.embed(prompt)  # refuses ids that it cannot read
    known, n_new = prompt.shape[1], whole("n_new", n_new)
    if known + n_new > model.n_seq + 1:
        raise ValueError(
            f"{known} + {n_new} tokens exceed n_seq={model.n_seq}: shorten prompt or n_new"
        )
    words = _Words(temperature, top_p, generator)
    with borrowed(model):
        texts = [_Text(model, row, drafts, words, stops) for row in prompt]
        for text in texts:
            while len(text.ids) < known + n_new and not text.ended:
                text.advance(known + n_new - len(text.ids))
    return _generated(texts, known, model.n_layers, prompt.device)


def _checked(model: PretrainedModel, drafts: Drafts) -> Drafts:
    if model.n_layers < 2:
        raise ValueError("exits=1: no exit before the last can draft; attach with two or more")
    exit_layer = whole("exit_layer", drafts.exit_layer, 0, model.n_layers - 2)
    agreement = real("agreement", drafts.agreement, least=0)
    if agreement > 1:
        raise ValueError(f"agreement={agreement}: must be a probability, at most 1")
    if agreement and not model.gates.trained:
        raise ValueError(f"agreement={agreement} asks gates, which are not fitted: train_gates")
    return Drafts(exit_layer, whole("longest", drafts.longest, 0, model.n_seq), agreement)


@dataclass(frozen=True)
class _Words:
    """How words are chosen of logits."""

    temperature: float
    top_p: float
    generator: torch.Generator | None

    def choose(self, logits: Tensor) -> tuple[int, np.ndarray | None]:
        """Return a word of logits ``(V,)``, and with what probabilities it was drawn ``(V,)``.

        At temperature 0 it is the most probable one, and there are no probabilities.

        Raises:
            ValueError: a logit is not finite.
        """
        if not self.temperature:
            return int(finite_words(*logits.max(dim=-1, keepdim=True))), None
        p = self.probabilities(logits)
        return int(draw(p, self.uniform())), p

    def probabilities(self, logits: Tensor) -> np.ndarray:
        """Return what words are drawn with ``(V,)``."""
        finite_words(*logits.max(dim=-1, keepdim=True))
        p = np.empty(len(logits))
        distribution(logits.double().cpu().numpy(), self.temperature, self.top_p, p)
        return p

    def uniform(self) -> float:
        """Return a number in [0, 1)."""
        return torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def verified(self, word: int, q: np.ndarray | None, logits: Tensor) -> tuple[int, bool]:
        """Return the word that stands in the place of one drafted with ``q``, and whether it is that."""
        if q is None:
            chosen, _ = self.choose(logits)
            return chosen, chosen == word
        p = self.probabilities(logits)
        if self.uniform() * q[word] < p[word]:
            return word, True
        return int(draw(np.maximum(p - q, 0), self.uniform())), False


class _Text:
    """One sequence: its words, and keys and values of the first ``cached`` of them.

    Attributes:
        seen: counts as those of :class:`~earlyexit.exits.generation.Generated`; of a prompt only the
            last word counts, as of one that was said.
        proposed: positions whose next word was drafted and stood.
    """

    def __init__(
        self, model: PretrainedModel, prompt: Tensor, drafts: Drafts, words: _Words, stops: set[int]
    ):
        self.model, self.drafts, self.words, self.stops = model, drafts, words, stops
        self.ids, self.ended, self.proposed = prompt.tolist(), False, set()
        self.cached, self.caches = 0, [[] for _ in range(model.n_layers)]
        self.seen = np.zeros((4, model.n_layers, drafts.longest + 1), dtype=np.int64)

    def _run(self, h: Tensor, stages: range) -> Tensor:
        """Run stages for the positions that follow: states ``(n, D)`` → ``(n, D)``."""
        for stage in stages:
            self.before = h
            h, self.caches[stage] = run_on(self.model, stage, h, self.caches[stage])
        return h

    def advance(self, room: int) -> None:
        """Draft words, verify them, and add those that stand and one more, at most ``room``."""
        model, exit_layer = self.model, self.drafts.exit_layer
        first, longest = range(exit_layer + 1), min(self.drafts.longest, room - 1)
        new, at, drafted, q, states = self.ids[self.cached :], self.cached, [], [], []
        while True:
            row = torch.tensor([new], device=model.decoder.device)
            states.append(self._run(model.embed(row, at)[0], first))
            self.seen[3, first, 0] += 1
            if len(drafted) == longest or self._doubts(states[-1][-1:]):
                break
            word, probabilities = self.words.choose(model.head(exit_layer)(states[-1][-1:])[0])
            self.seen[0, exit_layer, len(drafted)] += 1
            drafted.append(word)
            q.append(probabilities)
            if word in self.stops:
                break  # no word comes after it
            new, at = [word], at + len(new)
        rest = range(exit_layer + 1, model.n_layers)
        self.seen[3, rest, len(states) - 1] += len(states)
        verified = self._run(torch.cat(states), rest)[-len(states) :]
        self._take(drafted, q, model.head(model.n_layers - 1)(verified))
        self.cached = len(self.ids) - 1
        self.caches = [
            [tuple(t[:, :, : self.cached] for t in layer) for layer in stage]
            for stage in self.caches
        ]

    def _doubts(self, state: Tensor) -> bool:
        """Tell whether the exit's gate does not expect the last layer to agree."""
        if not self.drafts.agreement:
            return False
        at = exit_state(self.model, self.drafts.exit_layer, state, self.before[-1:])
        return CRITERIA["agreement"].score(at).item() < self.drafts.agreement

    def _take(self, drafted: list[int], q: list[np.ndarray | None], logits: Tensor) -> None:
        """Add the words that stand, and the word that the last layer chooses after them."""
        exit_layer = self.drafts.exit_layer
        for place, word in enumerate(drafted):
            chosen, stands = self.words.verified(word, q[place], logits[place])
            self.seen[1, exit_layer, place] += 1
            if stands:
                self.seen[2, exit_layer, place] += 1
                self.proposed.add(len(self.ids) - 1)
            self._add(chosen)
            if self.ended or not stands:
                return
        self._add(self.words.choose(logits[len(drafted)])[0])

    def _add(self, word: int) -> None:
        self.ids.append(word)
        self.ended = word in self.stops


def run_on(model: PretrainedModel, stage: int, h: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    """Run a stage for positions of one sequence that follow those in its cache.

    Args:
        h: states ``(n, D)``; cache: keys and values of earlier positions, empty at the first.

    Returns:
        New states ``(n, D)``, and the cache with these positions.
    """
    past, rows = cache[0][0].shape[2] if cache else 0, torch.arange(len(h), device=h.device)
    attending = Attending((1, len(h)), None, rows[:0], past)
    if past and len(h) > 1:
        attending.mask = torch.arange(past + len(h), device=h.device) <= past + rows[:, None]
    turned, made = model._rotary(h, past + rows), []
    first = stage * model.config.stage_layers
    for index, block in enumerate(model.blocks[first : first + model.config.stage_layers]):
        attending.cache = cache[index] if cache else None
        h = call_layer(block, h, turned, attending)
        made.append(attending.cache)
    return h, made


def _generated(texts: list[_Text], known: int, n_layers: int, device: torch.device) -> Generated:
    longest = max(len(text.ids) for text in texts)
    ids = torch.full((len(texts), longest), IGNORE)
    exits = torch.full((len(texts), longest - 1), IGNORE)
    for b, text in enumerate(texts):
        ids[b, : len(text.ids)] = torch.tensor(text.ids)
        exits[b, : len(text.ids) - 1] = n_layers
        exits[b, sorted(text.proposed)] = text.drafts.exit_layer
    new = torch.tensor([len(text.ids) - known for text in texts])
    seen = torch.from_numpy(sum(text.seen for text in texts))
    layers = seen[3].sum().item() / max(1, int(new.sum()))
    return Generated(ids.to(device), exits.to(device), new.to(device), layers, seen)
