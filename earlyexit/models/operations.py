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
    gate_flops,
    norm,
    projection,
)
from earlyexit.nn.config import ModelConfig
from earlyexit.nn.mixing import HEAD_WIDTH

# FLOPs of one step of BK-Core in real arithmetic, causal and two-sided: of g, a complex reciprocal and
# multiply-add; of one value, g (b − t y), and two-sided G (b − t (y + y′)) after two such.
BK_STEP, VALUE_STEP = {True: 18, False: 3 * 18}, {True: 9, False: 2 * 9 + 12}
# FLOPs per value: two products and a sum; square, sum and scale; x / (1 + e⁻ˣ).
COMBINE, RMS, SILU = 3, 3, 4

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
    d, L = config.d_model, config.n_layers
    levels = tuple(levels) or (0,) * L
    scales, made = max(levels) > 0, _recomputed(config, sparse=len(kept) > 0)
    layers, propagation = [], []
    for layer in range(L):
        run, passed = _block(config), _passed(config, made)
        both = {}
        if kept:
            run["importance"] = {"thin_flops": 2 * d}
            passed |= {"importance": {"thin_flops": 2 * d}} if made else {}
        if layer and levels[layer] > levels[layer - 1]:  # at all positions, running or not
            both["pooling"] = {"flops": 4 * d * d}
        elif layer and levels[layer] < levels[layer - 1]:  # one product for two positions
            run["raising"] = {"flops": d * d}
        if halting and layer < L - 1:  # LayerNorm, w · h, two running sums
            run["halting"] = {"elementwise_flops": (LAYER_NORM + 2 + 4) * d}
        layers.append(run | both)
        propagation.append(passed | both)
    translated = config.exit_head != "full"
    return Operations(
        width=d,
        layers=tuple(layers),
        propagation=tuple(propagation),
        projection={wanted: projection(d, _matrices(config, wanted)) for wanted in OPENED},
        translator={"flops": 2 * d * d, "bytes": FLOAT * 4 * d} if translated else {},
        gate=0.0 if halting else gate_flops(d, config.gate_hidden),
        levels=levels,
        skippable=("contribution", "BK-Core") if kept else (),
        kept=tuple(kept),
        # With several scales, a check reads the sum of the levels at a block's first token.
        reading=tuple(LAYER_NORM * d + level * 2 * d * d for level in levels)
        if scales and not halting
        else (),
        # A state is standardised once for all deeper layers, and raised by at most one product.
        leaving={"bytes": norm(d)["bytes"] if made else 0}
        | ({"flops": 2 * d * d} if scales else {}),
        handed_on=_handed_on(config),
        launches=_launches(config) + config.num_experts,
        parameters=_parameters(config) | {"importance": d + 1, "halting": d + 1},
    )


def _values(config: ModelConfig) -> int:
    """Return the value channels H·P of a layer."""
    return config.bk_heads * config.bk_values


def _handed_on(config: ModelConfig) -> int:
    """Return the width K of what a token hands to those after it."""
    widths = {"attention": 2 * config.d_model, "none": 0}
    return widths.get(config.mixing, config.bk_heads + _values(config))


def _recomputed(config: ModelConfig, sparse: bool) -> int:
    """Return how much of K every deeper layer makes anew from the state of an exited token."""
    if config.left_behind == "kept":
        return 0
    only_potentials = config.left_behind == "potentials" and not sparse
    return config.bk_heads if only_potentials else _handed_on(config)


def _launches(config: ModelConfig) -> int:
    """Return the operations that a layer starts beside its experts: norm, mixing, router, sum."""
    resolvent = 6 if not config.bk_values else 6 + COMBINE + 4  # RMS, gate, SiLU, product
    return {"attention": 7, "none": 4}.get(config.mixing, resolvent)


def _passed(config: ModelConfig, made: int) -> dict[str, dict[str, float]]:
    """Return the parts of a layer at a position whose token has left, which makes ``made`` numbers."""
    d, mixing, out = config.d_model, _mixing(config), {}
    if made:
        out["layer norm"] = {"elementwise_flops": LAYER_NORM * d}
    if config.mixing != "none":
        out["contribution"] = {"flops": 2 * d * made, "bytes": FLOAT * _handed_on(config)}
    if config.mixing == "resolvent":
        out["BK-Core"] = mixing["BK-Core"]
    if config.mixing == "attention":  # it attends in vain, but without the product of its query
        out["attention"] = mixing["attention"] | {"flops": mixing["attention"]["flops"] - 2 * d * d}
    return out


def _mixing(config: ModelConfig) -> dict[str, dict[str, float]]:
    """Return the parts of a layer's mixing at a running position."""
    d, h, values, width = config.d_model, config.bk_heads, _values(config), _handed_on(config)
    contribution = {"thin_flops": 2 * d * width, "hidden_bytes": FLOAT * (d + width)}
    # What mixing adds to the stream is summed with u, and the experts' output with the state.
    sums = {"thin_flops": 2 * d, "bytes": FLOAT * 6 * d}
    if config.mixing == "none":
        return {"projection": sums}
    if config.mixing == "attention":  # on average half of the longest sequence is seen
        return {
            "contribution": contribution,
            "attention": {
                "flops": 2 * d * d + 2 * d * (config.n_seq + 1),
                "elementwise_flops": SOFTMAX * max(1, d // HEAD_WIDTH) * (config.n_seq + 1) / 2,
                "bytes": FLOAT * (d + 2 * d + width),
            },
            "projection": {
                "flops": 2 * d * d, "thin_flops": 2 * d, "bytes": FLOAT * (d + 6 * d),
            },
        }  # fmt: skip
    if values:
        projection = {
            "thin_flops": 2 * 2 * values * d + 2 * d,  # the gate's product, and that of the values
            "elementwise_flops": (COMBINE + RMS + SILU + 1) * values,
            # Combined (7 rows of H·P), normalised (2), gated (1 + 2 + 3) and projected (1); the gate
            # reads one more row of D.
            "bytes": FLOAT * (16 * values + 7 * d),
        }
    else:
        projection = {
            "thin_flops": 2 * 2 * h * d + 2 * d, "bytes": FLOAT * (2 * h + 6 * d),
        }  # fmt: skip
    return {
        "contribution": contribution,
        "BK-Core": {
            "elementwise_flops": BK_STEP[config.causal] * h + VALUE_STEP[config.causal] * values,
            "hidden_bytes": FLOAT * 3 * width,
            "steps": width,
        },
        "projection": projection,
    }


def _block(config: ModelConfig) -> dict[str, dict[str, float]]:
    """Return the parts of a layer at a running position."""
    d, e, k = config.d_model, config.num_experts, config.top_k
    hidden = config.expert_hidden or 2 * d
    expert = 2 * 2 * d * hidden + hidden + 2 * d  # with weights and sum
    expert_moves = 2 * d + 4 * hidden  # input, hidden, activation in and out, hidden, output
    dispatch = 8 * d  # gather, join, and put back in order, twice each; weigh
    return {
        "layer norm": norm(d),
        **_mixing(config),
        "router": {"thin_flops": 2 * d * e + SOFTMAX * e, "bytes": FLOAT * (d + 3 * e)},
        "experts": {"expert_flops": k * expert, "bytes": FLOAT * k * (expert_moves + dispatch)},
    }


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
    d, e = config.d_model, config.num_experts
    hidden = config.expert_hidden or 2 * d
    unembedding = config.vocab_size * d + config.vocab_size
    if config.output_head == "adaptive":
        (frequent, _), *rare = _clusters(config)
        columns = frequent + len(rare)
        unembedding = columns * d + columns + sum(width * (d + words) for words, width in rare)
    return {
        "layer norm": 2 * d,
        **_mixing_parameters(config),
        "router": d * e + e,
        "experts": e * (2 * d * hidden + hidden + d),
        "translator": d * d + d if config.exit_head != "full" else 0,
        "head norm": 2 * d,
        "unembedding": unembedding,
        "softmax": 0,
    }


def _mixing_parameters(config: ModelConfig) -> dict[str, int]:
    d, h, values, width = config.d_model, config.bk_heads, _values(config), _handed_on(config)
    if config.mixing == "none":
        return {"projection": 0}
    if config.mixing == "attention":
        return {"contribution": (d + 1) * width, "attention": d * d, "projection": d * d + d}
    # The product and a scale; with values also the gate's product, and two weights that combine them.
    projection = (values or 2 * h) * d + d + 1 + values * (d + 2)
    return {"contribution": (d + 1) * width, "BK-Core": 2 * h, "projection": projection}
