"""State propagation keeps what exited tokens still hand to deeper layers."""

from __future__ import annotations

from torch import Tensor

from earlyexit.exits.protocol import ExitModel


class LeftBehind:
    """This store holds what exited tokens contribute to the layers after their exit.

    Args:
        model: its layers read the contributions.
        n_tokens: number of tokens T in the batch.
    """

    def __init__(self, model: ExitModel, n_tokens: int):
        self.n_tokens = n_tokens
        self._propagate = model.propagation()
        self._left: list[tuple[int, Tensor, Tensor]] = []  # an exit, its tokens, what they hand on

    def add(self, layer: int, tokens: Tensor, hidden: Tensor, then: Tensor) -> None:
        """Keep what ``tokens`` ``(X,)`` hand on, which left ``layer``.

        Args:
            hidden: their states ``(X, D)``.
            then: what they contributed in that layer ``(X, K)``.
        """
        self._left.append((layer, tokens, self._propagate(hidden, then, layer + 1)))

    def join(self, layer: int, alive: Tensor, given: Tensor) -> Tensor:
        """Complete the contributions of the running tokens ``(A, K)`` to those of all ``(T, K)``.

        Every row is written once, to where its token stands.
        """
        if not self._left:
            return given
        joined = given.new_empty(self.n_tokens, given.shape[1]).index_copy_(0, alive, given)
        for exit_layer, tokens, later in self._left:
            joined.index_copy_(0, tokens, later[:, layer - exit_layer - 1])
        return joined
