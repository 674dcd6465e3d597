"""Each kind of model states the operations of its parts, from which the cost of a run follows.

The amounts of a part are a dictionary from kind of work to amount. Kinds that end in ``flops`` are
floating-point operations, one multiply-add counting two: ``expert_flops`` (wide products),
``thin_flops`` (products with few columns), ``flops`` (other products) and ``elementwise_flops``.
Kinds that end in ``bytes`` count every tensor that an operation reads or writes once, in float32,
without caches: ``bytes``, and ``hidden_bytes`` if other work of the same part takes longer. ``steps``
are the steps of a recursion, ``logits`` the numbers that a projection returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from torch.nn import functional as F

Amounts = Mapping[str, float]  # kind of work → amount
Parts = Mapping[str, Amounts]  # part → its amounts
FLOAT = 4  # bytes

# FLOPs per element of operations that are not matrix products.
LAYER_NORM = 8  # two moments, scale, shift
SOFTMAX = 5  # maximum, subtraction, exponential, sum, comparison or division


def flops(amounts: Amounts) -> float:
    """Return the sum of all floating-point operations among the amounts."""
    return sum(n for kind, n in amounts.items() if kind.endswith("flops"))


def weighted_sum(terms: Iterable[tuple[float, Amounts]]) -> dict[str, float]:
    """Return kind → Σ weight · amount, over pairs of a weight and amounts."""
    out: dict[str, float] = {}
    for weight, amounts in terms:
        for kind, n in amounts.items():
            out[kind] = out.get(kind, 0.0) + weight * n
    return out


def norm(width: int) -> Amounts:
    """Return the amounts of a LayerNorm of one state."""
    return {"elementwise_flops": LAYER_NORM * width, "bytes": FLOAT * 2 * width}


def projection(width: int, matrices: Sequence[tuple[float, float, bool]]) -> Parts:
    """Return the amounts of unembedding one state of ``width``, and of the softmax of its logits.

    Args:
        matrices: (rows, columns) that the state is multiplied with, rows as an expected number, and
            whether the result is a part of the vocabulary.
    """
    logits = sum(rows for rows, _, words in matrices if words)
    product = sum(2 * rows * columns for rows, columns, _ in matrices)
    return {
        "unembedding": {
            "flops": product, "logits": logits, "hidden_bytes": FLOAT * (width + logits),
        },
        "softmax": {"elementwise_flops": SOFTMAX * logits, "hidden_bytes": FLOAT * 2 * logits},
    }  # fmt: skip


def gate_flops(width: int, hidden: int | None) -> float:
    """Return the FLOPs of one learned gate, without the norm that it shares with a layer."""
    return 2 * hidden * (width + 2) if hidden else 2 * 2 * width


@dataclass(frozen=True)
class Operations:
    """The operations of a model are its amounts per token, by the parts of a run with exits.

    Attributes:
        width: width D of the state that exits read.
        layers: parts of each layer at a position that it transforms, L entries.
        propagation: parts of each layer at a position whose tokens have left, L entries.
        projection: ``"word"`` (to score one given word), ``"top"`` (to find the most probable word) and
            ``"all"`` (for the probabilities of all words) → see :func:`projection`.
        translator: amounts of an exit's head before its norm; the last layer's head has none.
        gate: FLOPs of one learned gate.
        levels: how often each layer's positions were halved: it has one position for 2^level tokens.
        skippable: parts that a layer executes only at its share ``kept`` of the positions.
        kept: share of positions of each layer's skippable parts, L entries.
        reading: FLOPs of a check at each exit, beside its criterion and the layers.
        leaving: amounts of a token that leaves early, beside its head and its propagation.
        handed_on: numbers K that a token hands to those after it in one layer.
        launches: number of operations that one layer starts, for any number of positions.
        parameters: part → number of parameters, in a layer and in an exit's head.

    Raises:
        ValueError: the number of entries differs from the number of layers.
    """

    width: int
    layers: tuple[Parts, ...]
    propagation: tuple[Parts, ...]
    projection: Mapping[str, Parts]
    translator: Amounts = field(default_factory=dict)
    gate: float = 0.0
    levels: tuple[int, ...] = ()
    skippable: tuple[str, ...] = ()
    kept: tuple[float, ...] = ()
    reading: tuple[float, ...] = ()
    leaving: Amounts = field(default_factory=dict)
    handed_on: int = 0
    launches: int = 1
    parameters: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self):
        n = self.n_layers
        for name, usual in (("propagation", {}), ("levels", 0), ("kept", 1.0), ("reading", 0.0)):
            entries = tuple(getattr(self, name)) or (usual,) * n
            if len(entries) != n:
                raise ValueError(f"{name} has {len(entries)} entries for {n} layers: give {n}")
            object.__setattr__(self, name, entries)

    @classmethod
    def plain(
        cls,
        *,
        n_layers: int,
        d_model: int,
        vocab_size: int,
        block: Mapping[str, float],
        propagated: Mapping[str, float],
        translator: float = 0.0,
        gate_hidden: int = 0,
    ) -> Operations:
        """Make the operations, in FLOPs alone, of a model of equal layers and a linear unembedding.

        Args:
            block: part of a layer → FLOPs at a running token.
            propagated: part of a layer → FLOPs at a token that has left.
        """
        layer, passed = ({k: {"flops": n} for k, n in p.items()} for p in (block, propagated))
        linear = projection(d_model, [(vocab_size, d_model, True)])
        return cls(
            d_model,
            (layer,) * n_layers,
            (passed,) * n_layers,
            {"word": linear, "top": linear, "all": linear},
            {"flops": translator},
            gate_flops(d_model, gate_hidden),
        )

    def operations(self) -> Operations:
        """Return itself, so that a caller can pass a model or its operations."""
        return self

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def positions(self) -> np.ndarray:
        """Return the positions per token of every layer at full depth ``(L,)``."""
        return 0.5 ** np.asarray(self.levels, dtype=float)

    @property
    def cheap_top(self) -> bool:
        """Tell whether finding the most probable word needs fewer logits than all."""
        return self.logits("top") < self.logits("all")

    def logits(self, wanted: str) -> float:
        """Return the logits per token for ``wanted``, a key of ``projection``."""
        return self.projection[wanted]["unembedding"]["logits"]

    def layer(self, layer: int) -> dict[str, float]:
        """Return the amounts of a layer at a position that it transforms."""
        return self._done(self.layers[layer], layer)

    def passed(self, layer: int) -> dict[str, float]:
        """Return the amounts of a layer at a position whose tokens have left."""
        return self._done(self.propagation[layer], layer)

    def _done(self, parts: Parts, layer: int) -> dict[str, float]:
        kept = self.kept[layer]
        return weighted_sum(
            (kept if name in self.skippable else 1.0, amounts) for name, amounts in parts.items()
        )

    def head(self, wanted: str) -> dict[str, float]:
        """Return the amounts of norm, unembedding and softmax for ``wanted``."""
        parts = (norm(self.width), *self.projection[wanted].values())
        return weighted_sum((1.0, amounts) for amounts in parts)

    def run_positions(self, exit_layers: Tensor) -> np.ndarray:
        """Return the positions per token that each layer transforms ``(L,)``, given all exits.

        A position runs while one of its tokens runs. The sum is the "layers executed": a layer at a
        quarter of the positions counts a quarter.

        Args:
            exit_layers: exit layer of each token ``(B, N)``, n_layers if it did not exit.
        """
        runs = []
        for layer, level in enumerate(self.levels):
            running = F.pad(exit_layers >= layer, (0, -exit_layers.shape[1] % 2**level))
            runs.append(running.view(len(running), -1, 2**level).any(dim=-1).sum().item())
        return np.array(runs) / exit_layers.numel()
