"""The contract: what a model must offer to be run with exits.

Execution, traces, gates, costs and certificates know a model through :class:`ExitModel` alone. A kind
of model is one file that implements it; layers in which tokens decide one by one need nothing else.

A layer is three steps, so that a token that has left still takes part in the one that joins tokens:

* ``contribution``: what every token hands to those after it (BK potentials, keys and values), from what
  the layer reads of its state. Of exited tokens this is all that is ever computed again;
* ``mix``: what the running tokens take from everybody's contributions;
* ``update``: the new states of the running tokens.
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

Execution = Literal["compacted", "dense"]


class ExitModel(nn.Module, ABC):
    """A causal language model of L layers with an exit after each.

    Attributes:
        n_layers: layers L; n_seq: longest sequence; vocab_size: words V.
        gates: predictors that read a normed state, or None.
        can_step: whether :meth:`step` and ``embed(x, start)`` are there, for generation in O(1) state.
    """

    n_layers: int
    n_seq: int
    vocab_size: int
    can_step: bool = False

    def __init__(self):
        super().__init__()
        self.gates: nn.Module | None = None

    # ------------------------------------------------------------------ what a kind must say

    @abstractmethod
    def embed(self, x: Tensor, start: int = 0) -> Tensor:
        """Token ids ``(B, N)`` at positions ``start`` … → states ``(B, N, D)``; refuses bad ids."""

    @abstractmethod
    def normed(self, layer: int, h: Tensor) -> Tensor:
        """What ``layer`` reads of states ``(…, D)``; the gate of the exit before it reads the same."""

    @abstractmethod
    def contribution(self, layer: int, u: Tensor) -> Tensor:
        """What tokens hand to those after them, from normed states: ``(…, D)`` → ``(…, K)``."""

    @abstractmethod
    def mix(self, layer: int, u: Tensor, given: Tensor, rows: Tensor | None) -> Tensor:
        """What running tokens take from all contributions.

        Args:
            u: normed states of the running tokens ``(A, D)``.
            given: contributions of everybody ``(B, N, K)``.
            rows: which of the B·N tokens are running ``(A,)``, ascending; None: all.

        Returns:
            ``(A, M)``.
        """

    @abstractmethod
    def update(self, layer: int, h: Tensor, u: Tensor, mixed: Tensor) -> Tensor:
        """New states from states, normed states and :meth:`mix`: ``(A, D)``."""

    @abstractmethod
    def head(self, layer: int) -> ExitHead:
        """The exit's head: ``features`` of a state, and the ``unembedding`` that reads them."""

    @abstractmethod
    def operations(self) -> Operations:
        """What each part costs, for the account of :mod:`earlyexit.cost.parts`."""

    # ------------------------------------------------------------------ what follows from it

    def step(self, layer: int, u: Tensor, given: Tensor, memory) -> tuple[Tensor, object]:
        """:meth:`mix` of one position, from its own u and contribution ``(B, ·)`` and what is kept.

        Args:
            memory: of this layer, None at the first position.

        Returns:
            ``(B, M)``, and the memory for the next position.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no state from position to position")

    def layer(self, layer: int, h: Tensor) -> Tensor:
        """The whole layer for all tokens: ``(B, N, D)`` → ``(B, N, D)``."""
        u = self.normed(layer, h)
        given = self.contribution(layer, u)
        flat_h, flat_u = h.flatten(0, 1), u.flatten(0, 1)
        return self.update(layer, flat_h, flat_u, self.mix(layer, flat_u, given, None)).view_as(h)

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """States before the first and after every layer at full depth, L + 1 tensors ``(B, N, D)``."""
        states = [self.embed(x)]
        for layer in range(self.n_layers):
            states.append(self.layer(layer, states[-1]))
        return states

    def final_state(self, x: Tensor) -> Tensor:
        """States after the last layer at full depth ``(B, N, D)``."""
        mark, h = marker(), self.embed(x)
        mark("rest")
        for layer in range(self.n_layers):
            h = self.layer(layer, h)
        mark("blocks")
        return h

    def propagation(self) -> Callable[[Tensor, int], Tensor]:
        """A function that gives what exited states hand to all deeper layers.

        Returns:
            From frozen states ``(E, D)`` and the first of the L′ layers: ``(E, L′, K)``.
        """

        def contributions(hidden: Tensor, first: int) -> Tensor:
            layers = range(first, self.n_layers)
            return torch.stack(
                [self.contribution(k, self.normed(k, hidden)) for k in layers], dim=1
            )

        return contributions

    def auxiliary_loss(self) -> Tensor | float:
        """What training adds to the loss of the last batch, such as the imbalance of experts."""
        return 0.0

    def reset_auxiliary_loss(self) -> None:
        """Forget the batches so far."""

    def check_training(self, exit_sampling: str, layer_dropout: float) -> None:
        """Raise ValueError where the model cannot be trained so."""

    def prepare_step(self, progress: float) -> None:
        """Change what changes with the share of the training that is done."""

    def own_loss(self) -> Tensor | float:
        """What the kind of model adds to the loss of the last batch, weighted."""
        return 0.0

    def unit_size(self, layer: int) -> int:
        """How many neighbouring tokens are decided together at the exit after ``layer``."""
        return 1

    def walk(self, x: Tensor, execution: Execution, history: bool) -> Walk | None:
        """A :class:`Walk` of the model's own; None: tokens decide one by one.

        Args:
            history: whether the criterion looks at states of earlier exits.
        """
        return None


class Observation(NamedTuple):
    """What is judged at an exit.

    Attributes:
        state: of the judged tokens.
        tokens: their indices in the flattened batch ``(S,)``.
        row: for every running token, the row of ``tokens`` that decides for it ``(A,)``; None: its own.
    """

    state: ExitState
    tokens: Tensor
    row: Tensor | None = None


class Walk(ABC):
    """One batch on its way through the layers.

    Attributes:
        alive: indices of the tokens that are still running, in the flattened batch ``(A,)``, ascending.
    """

    alive: Tensor

    @abstractmethod
    def advance(self, layer: int) -> None:
        """Run a layer for the tokens that are left."""

    @abstractmethod
    def observe(self, layer: int) -> Observation:
        """What a check after ``layer`` looks at."""

    @abstractmethod
    def states(self, rows: Tensor) -> Tensor:
        """States ``(R, D)`` of rows of ``alive`` after the last layer that was run."""

    @abstractmethod
    def leave(self, layer: int, leaving: Tensor, staying: Tensor) -> None:
        """Let rows of ``alive`` go, and keep what they leave behind."""


def exit_state(model: ExitModel, layer: int, hidden: Tensor, previous: Tensor | None) -> ExitState:
    """What a criterion may look at, of states after and before ``layer`` ``(T, D)``."""
    last = layer == model.n_layers - 1
    normed = None if last else model.normed(layer + 1, hidden)
    return ExitState(layer, hidden, previous, normed, model.gates)
