"""What each part of the model costs: analytic FLOPs and bytes.

One multiply-add counts two FLOPs. Profilers count matrix products only (recurrences, softmax and
normalisations count as zero there), hence this table; its matrix products are checked against
``torch.utils.flop_counter`` in the tests. Bytes count every tensor that an operation reads or writes
once, in float32, whatever a cache may save.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from earlyexit.exits import CRITERIA
from earlyexit.model import ModelConfig

# FLOPs per element of what is not a matrix product.
LAYER_NORM = 8  # two moments, scale, shift
BK_STEP = 18  # one complex reciprocal and multiply-add, in real arithmetic
SOFTMAX = 5  # maximum, subtraction, exponential, sum, comparison or division
COSINE = 6  # three inner products
FLOAT, COMPLEX = 4, 16  # bytes; BK-Core computes in double precision
# Shares of tokens whose word is in the middle and in the rare cluster of an adaptive softmax, as they
# are in English text with words numbered by frequency.
TAIL_SHARES = (0.15, 0.05)


def part_flops(config: ModelConfig) -> dict[str, float]:
    """FLOPs per token of every part of one layer and of the heads."""
    d, h = config.d_model, config.bk_heads
    hidden = config.expert_hidden or 2 * d
    return {
        "layer norm": LAYER_NORM * d,
        "potentials": 2 * d * h,
        "BK-Core": (BK_STEP if config.causal else 3 * BK_STEP) * h,
        "projection": 2 * 2 * h * d + 2 * d,
        "router": 2 * d * config.num_experts + SOFTMAX * config.num_experts,
        "experts": config.top_k * (2 * 2 * d * hidden + hidden + 2 * d),  # with weights and sum
        "translator": 2 * d * d if config.exit_head == "translator" else 0.0,
        "head norm": LAYER_NORM * d,
        "unembedding": unembedding_flops(config),
        "softmax": SOFTMAX * vocabulary_width(config),
    }


def _projections(config: ModelConfig, whole: bool) -> list[tuple[float, float, bool]]:
    """Matrices ``(rows, columns)`` that one token is multiplied with, rows as an expected number.

    The third entry says whether the result is a part of the vocabulary.
    """
    d, v = config.d_model, config.vocab_size
    if config.output_head == "linear":
        return [(v, d, True)]
    cuts = (v // 10, 4 * v // 10, v)
    out: list[tuple[float, float, bool]] = [(cuts[0] + len(TAIL_SHARES), d, True)]
    for k, share in enumerate((1.0,) * len(TAIL_SHARES) if whole else TAIL_SHARES):
        width = d // 2 ** (k + 1)
        out += [(share * width, d, False), (share * (cuts[k + 1] - cuts[k]), width, True)]
    return out


def unembedding_flops(config: ModelConfig, whole: bool = False) -> float:
    """Products per token of scoring its word, or of the ``whole`` distribution over all words.

    The two differ with an adaptive softmax, where scoring opens the cluster of the word alone.
    """
    return sum(2 * rows * width for rows, width, _ in _projections(config, whole))


def vocabulary_width(config: ModelConfig, whole: bool = False) -> float:
    """Logits per token behind :func:`unembedding_flops`: V, or fewer with an adaptive softmax."""
    return sum(rows for rows, _, words in _projections(config, whole) if words)


def distribution_flops(config: ModelConfig) -> float:
    """FLOPs per token of a LayerNorm and the probabilities of all words."""
    norm, softmax = LAYER_NORM * config.d_model, SOFTMAX * vocabulary_width(config, whole=True)
    return norm + unembedding_flops(config, whole=True) + softmax


def part_bytes(config: ModelConfig) -> dict[str, float]:
    """Bytes of activations per token that the parts of :func:`part_flops` read and write."""
    d, h, e, v = config.d_model, config.bk_heads, config.num_experts, vocabulary_width(config)
    hidden = config.expert_hidden or 2 * d
    expert = 2 * d + 4 * hidden  # in, hidden, activation in and out, hidden, out
    dispatch = 8 * d  # gather, join, and put back in order, twice each; weigh
    return {
        "layer norm": FLOAT * 2 * d,
        "potentials": FLOAT * (d + h),
        "BK-Core": FLOAT * 3 * h + 2 * COMPLEX * h,
        "projection": FLOAT * (2 * h + 6 * d),  # with sum and residual
        "router": FLOAT * (d + 3 * e),
        "experts": FLOAT * config.top_k * (expert + dispatch),
        "translator": FLOAT * 4 * d if config.exit_head == "translator" else 0.0,
        "head norm": FLOAT * 2 * d,
        "unembedding": FLOAT * (d + v),
        "softmax": FLOAT * 2 * v,
    }


BLOCK = ("layer norm", "potentials", "BK-Core", "projection", "router", "experts")
PROPAGATION = ("layer norm", "potentials", "BK-Core")
FINAL_HEAD = ("head norm", "unembedding", "softmax")
EXIT_HEAD = ("translator", *FINAL_HEAD)


def total(parts: dict[str, float], names: Sequence[str]) -> float:
    return sum(parts[name] for name in names)


def check_flops(config: ModelConfig, criterion: str) -> float:
    """FLOPs per token of one exit check, beyond what the exit itself costs."""
    d = config.d_model
    if CRITERIA[criterion].reads == "logits":
        return part_flops(config)["translator"] + distribution_flops(config)
    if criterion in ("gate", "agreement"):  # the next block's LayerNorm is shared
        hidden = config.gate_hidden or 0
        return 2 * hidden * (d + 2) if hidden else 2 * 2 * d
    return {"depth": 0, "saturation": COSINE * d}[criterion]


def policy_flops(
    config: ModelConfig, distribution: Sequence[float], criterion: str
) -> dict[str, float]:
    """FLOPs per token of a compacted run, by part.

    Args:
        distribution: share of tokens per exit layer ``(L + 1,)``, the last for "no early exit".
        criterion: what is checked after every layer but the last; there too where tokens are counted
            as exited at it, which costs nothing but for an adaptive softmax and a check of its logits.

    Returns:
        ``blocks``, ``checks``, ``propagation`` (potentials of exited tokens), ``head``, ``total``,
        ``full_depth`` and ``speedup_flops`` = full_depth / total.
    """
    parts, layers = part_flops(config), config.n_layers
    share = np.asarray(distribution, dtype=float)
    executed = np.minimum(np.arange(layers + 1) + 1, layers)
    mean_layers = float(share @ executed)
    checks = float(share @ np.minimum(executed, layers - 1))
    early = float(share[: layers - 1].sum())
    block, head = total(parts, BLOCK), total(parts, FINAL_HEAD)
    rule = CRITERIA[criterion]
    paid_by_check = rule.reads == "logits"  # the exit reads the check's own logits
    checked_at_last = paid_by_check and (rule.streak or share[layers - 1] > 0)
    last_head = distribution_flops(config) if checked_at_last else head
    out = {
        "blocks": mean_layers * block,
        "checks": checks * check_flops(config, criterion),
        "propagation": (layers - mean_layers) * total(parts, PROPAGATION),
        "head": (1 - early) * last_head if paid_by_check else head + early * parts["translator"],
    }
    out["total"] = sum(out.values())
    out["full_depth"] = layers * block + head
    return out | {"speedup_flops": out["full_depth"] / out["total"]}


def exit_costs(config: ModelConfig, criterion: str) -> np.ndarray:
    """FLOPs per token of leaving at exit 0 … L − 1 in a compacted run ``(L,)``."""
    rows = np.eye(config.n_layers, config.n_layers + 1)
    rows[-1] = np.roll(rows[-1], 1)  # leaving at the last layer is not leaving early
    return np.array([policy_flops(config, row, criterion)["total"] for row in rows])


def cost_table(config: ModelConfig) -> pd.DataFrame:
    """Parts with parameters, FLOPs and bytes of activations per token, FLOPs as a share of one block."""
    parts, moved = part_flops(config), part_bytes(config)
    d, h, v = config.d_model, config.bk_heads, config.vocab_size
    hidden = config.expert_hidden or 2 * d
    parameters = {
        "layer norm": 2 * d,
        "potentials": d * h + h,
        "BK-Core": 2 * h,
        "projection": 2 * h * d + d + 1,
        "router": d * config.num_experts + config.num_experts,
        "experts": config.num_experts * (2 * d * hidden + hidden + d),
        "translator": d * d + d if config.exit_head == "translator" else 0,
        "head norm": 2 * d,
        "unembedding": v * d + v if config.output_head == "linear" else _adaptive_parameters(d, v),
        "softmax": 0,
    }
    block = total(parts, BLOCK)
    rows = [
        {
            "part": name,
            "group": "block" if name in BLOCK else "head",
            "parameters": parameters[name],
            "flops_per_token": flops,
            "bytes_per_token": moved[name],
            "share_of_block": flops / block,
        }
        for name, flops in parts.items()
    ]
    return pd.DataFrame(rows)


def _adaptive_parameters(d: int, v: int) -> int:
    cuts = (v // 10, 4 * v // 10, v)
    head = cuts[0] + len(TAIL_SHARES)
    clusters = [(d // 2 ** (k + 1), cuts[k + 1] - cuts[k]) for k in range(len(TAIL_SHARES))]
    return head * d + head + sum(width * d + size * width for width, size in clusters)


def break_even_depth(layers: int, head_ratio: float) -> float:
    """Mean depth below which a full-vocabulary check after each block pays: (L + r) / (1 + r)."""
    return (layers + head_ratio) / (1 + head_ratio)
