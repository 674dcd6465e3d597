"""This contract says what a model must offer to be run with exits.

Execution, traces, gates, costs and certificates know a model through :class:`ExitModel` alone. A kind
of model is one file that implements it; layers in which tokens decide one by one need nothing else.

A layer has three steps, so that a token that has left still takes part in the one that joins tokens:

* ``contribution`` makes what every token hands to those after it (BK-Core's potentials and values, or
  keys and values) from what the layer reads of its state. Of exited tokens this is
  all that is ever computed again;
* ``mix`` makes what the running tokens take from the contributions of all;
* ``update`` makes the new states of the running tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from earlyexit.exits.clock import marker
from earlyexit.exits.criteria import ExitState
from earlyexit.exits.operations import Operations
from earlyexit.nn.heads import ExitHead
from earlyexit.nn.record import BatchRecord

Execution = Literal["compacted", "dense"]


class ExitModel(nn.Module, ABC):
    """This is a causal language model of L layers with an exit after each.

    Attributes:
        n_layers: layers L; n_seq: longest sequence; vocab_size: words V.
        gates: predictors that read a normed state, or None.
        trained_on: hash of the text whose words the model knows; "" where that is not known.
        can_step: whether the model has :meth:`step` and ``embed(x, start)``, to generate in O(1) state.
    """

    n_layers: int
    n_seq: int
    vocab_size: int
    trained_on: str = ""
    can_step: bool = False

    def __init__(self):
        super().__init__()
        self.gates: nn.Module | None = None

    # ------------------------------------------------------------------ what a kind must say

    @abstractmethod
    def embed(self, x: Tensor, start: int = 0) -> Tensor:
        """Return states ``(B, N, D)`` of token ids ``(B, N)`` at positions ``start`` …

        Raises:
            ValueError: the model cannot run such ids.
        """

    @abstractmethod
    def normed(self, layer: int, h: Tensor) -> Tensor:
        """Return what ``layer``, and the gate of the exit before it, read of states ``(…, D)``."""

    @abstractmethod
    def contribution(self, layer: int, u: Tensor) -> Tensor:
        """Return what tokens hand to those after them ``(…, K)``, from normed states ``(…, D)``."""

    @abstractmethod
    def mix(self, layer: int, u: Tensor, given: Tensor, rows: Tensor | None) -> Tensor:
        """Return what running tokens take from the contributions of all, ``(A, M)``.

        Args:
            u: normed states of the running tokens ``(A, D)``.
            given: contributions of all tokens ``(B, N, K)``.
            rows: which of the B·N tokens are running ``(A,)``, ascending; None if all are.
        """

    @abstractmethod
    def update(self, layer: int, h: Tensor, u: Tensor, mixed: Tensor) -> Tensor:
        """Return new states ``(A, D)`` from states, normed states and what :meth:`mix` gave."""

    @abstractmethod
    def head(self, layer: int) -> ExitHead:
        """Return the exit's head, with ``features`` and the ``unembedding`` that reads them."""

    @abstractmethod
    def operations(self) -> Operations:
        """Return what each part costs, for the account of :mod:`earlyexit.cost.parts`."""

    # ------------------------------------------------------------------ what follows from it

    def step(self, layer: int, u: Tensor, given: Tensor, memory) -> tuple[Tensor, object]:
        """Do :meth:`mix` for one position, from its u and contribution ``(B, ·)`` and a memory.

        Args:
            memory: what the layer kept of earlier positions; None at the first one.

        Returns:
            What the tokens take ``(B, M)``, and the memory for the next position.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no state from position to position")

    def layer(self, layer: int, h: Tensor) -> Tensor:
        """Run the whole layer for all tokens: ``(B, N, D)`` → ``(B, N, D)``."""
        u = self.normed(layer, h)
        return self._mixed(layer, h, u, self.contribution(layer, u))

    def _mixed(self, layer: int, h: Tensor, u: Tensor, given: Tensor) -> Tensor:
        flat_h, flat_u = h.flatten(0, 1), u.flatten(0, 1)
        return self.update(layer, flat_h, flat_u, self.mix(layer, flat_u, given, None)).view_as(h)

    def layer_around(
        self, layer: int, h: Tensor, exited: Tensor, given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the whole layer for all tokens, and put the states of exited ones back.

        Args:
            exited: whether a token has left ``(B, N)``.
            given: what this method returned for the layer before; None at the first.

        Returns:
            States ``(B, N, D)``, and what every token contributed in the last layer that it ran
            ``(B, N, K)``.
        """
        u, exited = self.normed(layer, h), exited[..., None]
        now = self.contribution(layer, u)
        handed = now
        if given is not None:
            handed = torch.where(exited, self.handed_on(now, given), now)
            now = torch.where(exited, given, now)
        return torch.where(exited, h, self._mixed(layer, h, u, handed)), now

    def handed_on(self, now: Tensor, then: Tensor) -> Tensor:
        """Return what exited tokens hand to a layer that they do not run ``(…, K)``.

        Args:
            now: what the layer makes of their frozen states.
            then: what they contributed in the last layer that they ran.
        """
        return now

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """Return the states before the first and after every layer, L + 1 tensors ``(B, N, D)``."""
        states = [self.embed(x)]
        for layer in range(self.n_layers):
            states.append(self.layer(layer, states[-1]))
        return states

    def final_state(self, x: Tensor) -> Tensor:
        """Return the states after the last layer at full depth ``(B, N, D)``."""
        mark, h = marker(), self.embed(x)
        mark("rest")
        for layer in range(self.n_layers):
            h = self.layer(layer, h)
        mark("blocks")
        return h

    def propagation(self) -> Callable[[Tensor, Tensor, int], Tensor]:
        """Return a function that gives what exited tokens hand to all deeper layers.

        It maps frozen states ``(X, D)``, what they contributed in the last layer that they ran
        ``(X, K)``, and the first of L′ deeper layers to ``(X, L′, K)``.
        """

        def handed_on(hidden: Tensor, then: Tensor, first: int) -> Tensor:
            layers = range(first, self.n_layers)
            now = [self.contribution(k, self.normed(k, hidden)) for k in layers]
            return torch.stack([self.handed_on(given, then) for given in now], dim=1)

        return handed_on

    def auxiliary_loss(self, record: BatchRecord) -> Tensor | float:
        """Return what training may add to the loss of a recorded batch: the imbalance of experts."""
        return 0.0

    def check_training(self, exit_sampling: str, layer_dropout: float) -> None:
        """Raise ValueError if the model cannot be trained in this way."""

    def prepare_step(self, progress: float) -> None:
        """Change what depends on ``progress``, the share of the training that is done."""

    def own_loss(self, record: BatchRecord) -> Tensor | float:
        """Return what the kind of model adds to the loss of a recorded batch, weighted."""
        return 0.0

    def check_text(self, text: object) -> None:
        """Raise ValueError if a split, or a loader's data, is of another text than the model knows."""
        found = getattr(text, "data_hash", "")
        if found and self.trained_on and found != self.trained_on:
            raise ValueError(
                f"the ids are of text {found[:16]}, where words have other numbers than in"
                f" {self.trained_on[:16]}, on which the model was trained: load that corpus, and"
                " encode_texts of other texts with it"
            )

    def unit_size(self, layer: int) -> int:
        """Return how many neighbouring tokens are decided together at the exit after ``layer``."""
        return 1

    def walk(self, x: Tensor, execution: Execution, history: bool) -> Walk | None:
        """Return a :class:`Walk` of the model's own, or None if tokens decide one by one.

        Args:
            history: whether the criterion looks at states of earlier exits.
        """
        return None


class Observation(NamedTuple):
    """An observation is what a check at an exit looks at.

    Attributes:
        state: what the criterion may look at, for the judged tokens.
        tokens: their indices in the flattened batch ``(S,)``.
        row: for every running token, the row of ``tokens`` that decides for it ``(A,)``; None if each
            decides for itself.
    """

    state: ExitState
    tokens: Tensor
    row: Tensor | None = None


class Walk(ABC):
    """A walk takes one batch through the layers.

    Attributes:
        alive: indices of the running tokens in the flattened batch ``(A,)``, ascending.
    """

    alive: Tensor

    @abstractmethod
    def advance(self, layer: int) -> None:
        """Run a layer for the running tokens."""

    @abstractmethod
    def observe(self, layer: int) -> Observation:
        """Return what a check after ``layer`` looks at."""

    @abstractmethod
    def states(self, rows: Tensor) -> Tensor:
        """Return the states ``(R, D)`` of rows of ``alive`` after the last layer that was run."""

    @abstractmethod
    def leave(self, layer: int, leaving: Tensor, staying: Tensor, hidden: Tensor) -> None:
        """Let rows of ``alive`` go, of states ``hidden`` ``(X, D)``; keep what they leave behind."""


def exit_state(model: ExitModel, layer: int, hidden: Tensor, previous: Tensor | None) -> ExitState:
    """Return what a criterion may look at, from states ``(T, D)`` after and before ``layer``."""
    last = layer == model.n_layers - 1
    normed = None if last else model.normed(layer + 1, hidden)
    return ExitState(layer, hidden, previous, normed, model.gates)
