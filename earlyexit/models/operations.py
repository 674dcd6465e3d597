"""The operations of a ResNet-BK language model follow from its configuration alone.

Profilers count matrix products only, and no recurrences, softmax or normalisations; hence these
formulas. Their matrix products are checked against ``torch.utils.flop_counter`` in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence

from earlyexit.exits.operations import (
    FLOAT,
    LAYER_NORM,
    SOFTMAX,
    Operations,
    Parts,
    gate_flops,
    norm,
    projection,
)
from earlyexit.nn.config import ModelConfig

BK_STEP = 18  # FLOPs: one complex reciprocal and multiply-add, in real arithmetic
COMPLEX = 16  # bytes; BK-Core computes in double precision

# Shares of tokens for which the middle and the rare cluster of an adaptive softmax are computed, in
# English text with words numbered by frequency: to score the next word, to find the most probable
# word, and for the probabilities of all words. 01_build measures the first two.
OPENED = {"word": (0.14, 0.06), "top": (1 / 3, 1 / 5), "all": (1.0, 1.0)}


def operations(
    config: ModelConfig,
    *,
    kept: Sequence[float] = (),
    levels: Sequence[int] = (),
    halting: bool = False,
) -> Operations:
    """Return the operations of a model of this configuration.

    Args:
        kept: share of positions that each layer's sparse BK-Core computes; empty for dense layers.
        levels: how often each layer's positions were halved; empty for one scale.
        halting: whether halting units are the gates.
    """
    d, h, L = config.d_model, config.bk_heads, config.n_layers
    levels = tuple(levels) or (0,) * L
    scales = max(levels) > 0
    layers, propagation = [], []
    for layer in range(L):
        run = _block(config)
        passed = {
            "layer norm": {"elementwise_flops": LAYER_NORM * d},
            "potentials": {"flops": run["potentials"]["thin_flops"], "bytes": FLOAT * h},
            "BK-Core": run["BK-Core"],
        }
        both: dict = {"importance": {"thin_flops": 2 * d}} if kept else {}
        if layer and levels[layer] > levels[layer - 1]:  # at all positions, running or not
            both["pooling"] = {"flops": 4 * d * d}
        elif layer and levels[layer] < levels[layer - 1]:  # one product for two positions
            run["raising"] = {"flops": d * d}
        if halting and layer < L - 1:  # LayerNorm, w · h, two running sums
            run["halting"] = {"elementwise_flops": (LAYER_NORM + 2 + 4) * d}
        layers.append(run | both)
        propagation.append(passed | both)
    translated = config.exit_head == "translator"
    return Operations(
        width=d,
        layers=tuple(layers),
        propagation=tuple(propagation),
        projection={wanted: projection(d, _matrices(config, wanted)) for wanted in OPENED},
        translator={"flops": 2 * d * d, "bytes": FLOAT * 4 * d} if translated else {},
        gate=0.0 if halting else gate_flops(d, config.gate_hidden),
        levels=levels,
        skippable=("potentials", "BK-Core", "projection") if kept else (),
        kept=tuple(kept),
        # With several scales, a check reads the sum of the levels at a block's first token.
        reading=tuple(LAYER_NORM * d + level * 2 * d * d for level in levels)
        if scales and not halting
        else (),
        # A state is standardised once for all deeper layers, and raised by at most one product.
        leaving={"bytes": norm(d)["bytes"]} | ({"flops": 2 * d * d} if scales else {}),
        launches=6 + config.num_experts,
        parameters=_parameters(config),
    )


def _block(config: ModelConfig) -> Parts:
    d, h, e, k = config.d_model, config.bk_heads, config.num_experts, config.top_k
    hidden = config.expert_hidden or 2 * d
    expert = 2 * 2 * d * hidden + hidden + 2 * d  # with weights and sum
    expert_moves = 2 * d + 4 * hidden  # input, hidden, activation in and out, hidden, output
    dispatch = 8 * d  # gather, join, and put back in order, twice each; weigh
    return {
        "layer norm": norm(d),
        "potentials": {"thin_flops": 2 * d * h, "hidden_bytes": FLOAT * (d + h)},
        "BK-Core": {
            "elementwise_flops": (BK_STEP if config.causal else 3 * BK_STEP) * h,
            "hidden_bytes": FLOAT * 3 * h + 2 * COMPLEX * h,
            "steps": h,
        },
        "projection": {  # with sum and residual
            "thin_flops": 2 * 2 * h * d + 2 * d, "bytes": FLOAT * (2 * h + 6 * d),
        },
        "router": {"thin_flops": 2 * d * e + SOFTMAX * e, "bytes": FLOAT * (d + 3 * e)},
        "experts": {"expert_flops": k * expert, "bytes": FLOAT * k * (expert_moves + dispatch)},
    }  # fmt: skip


def _clusters(config: ModelConfig) -> list[tuple[int, int]]:
    """Return (words, width) of an adaptive head's clusters, frequent words at full width first."""
    d, v = config.d_model, config.vocab_size
    cuts = (0, v // 10, 4 * v // 10, v)
    return [(cuts[k + 1] - cuts[k], d // 2**k) for k in range(len(cuts) - 1)]


def _matrices(config: ModelConfig, wanted: str) -> list[tuple[float, float, bool]]:
    d = config.d_model
    if config.output_head == "linear":
        return [(config.vocab_size, d, True)]
    (frequent, _), *rare = _clusters(config)
    out: list[tuple[float, float, bool]] = [(frequent + len(rare), d, True)]
    for (words, width), share in zip(rare, OPENED[wanted], strict=True):
        out += [(share * width, d, False), (share * words, width, True)]
    return out


def _parameters(config: ModelConfig) -> dict[str, int]:
    d, h, e = config.d_model, config.bk_heads, config.num_experts
    hidden = config.expert_hidden or 2 * d
    unembedding = config.vocab_size * d + config.vocab_size
    if config.output_head == "adaptive":
        (frequent, _), *rare = _clusters(config)
        columns = frequent + len(rare)
        unembedding = columns * d + columns + sum(width * (d + words) for words, width in rare)
    return {
        "layer norm": 2 * d,
        "potentials": d * h + h,
        "BK-Core": 2 * h,
        "projection": 2 * h * d + d + 1,
        "router": d * e + e,
        "experts": e * (2 * d * hidden + hidden + d),
        "translator": d * d + d if config.exit_head == "translator" else 0,
        "head norm": 2 * d,
        "unembedding": unembedding,
        "softmax": 0,
    }
