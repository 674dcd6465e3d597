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

from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy
from earlyexit.nn.config import ModelConfig

# FLOPs per element of what is not a matrix product.
LAYER_NORM = 8  # two moments, scale, shift


BK_STEP = 18  # one complex reciprocal and multiply-add, in real arithmetic


SOFTMAX = 5  # maximum, subtraction, exponential, sum, comparison or division


COSINE = 6  # three inner products


FLOAT, COMPLEX = 4, 16  # bytes; BK-Core computes in double precision


# Shares of tokens for which the middle and the rare cluster of an adaptive softmax are opened, as they
# are in English text with words numbered by frequency: to score the word that comes, to find the most
# probable word, and for the probabilities of all words. 01_build measures the first two.
OPENED = {"word": (0.14, 0.06), "top": (1 / 3, 1 / 5), "all": (1.0, 1.0)}


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


def _projections(config: ModelConfig, wanted: str) -> list[tuple[float, float, bool]]:
    """Matrices ``(rows, columns)`` that one token is multiplied with, rows as an expected number.

    The third entry says whether the result is a part of the vocabulary.
    """
    d, v = config.d_model, config.vocab_size
    if config.output_head == "linear":
        return [(v, d, True)]
    cuts, shares = (v // 10, 4 * v // 10, v), OPENED[wanted]
    out: list[tuple[float, float, bool]] = [(cuts[0] + len(shares), d, True)]
    for k, share in enumerate(shares):
        width = d // 2 ** (k + 1)
        out += [(share * width, d, False), (share * (cuts[k + 1] - cuts[k]), width, True)]
    return out


def unembedding_flops(config: ModelConfig, wanted: str = "word") -> float:
    """Products per token for what is ``wanted``, a key of ``OPENED``: alike with a linear head."""
    return sum(2 * rows * width for rows, width, _ in _projections(config, wanted))


def vocabulary_width(config: ModelConfig, wanted: str = "word") -> float:
    """Logits per token behind :func:`unembedding_flops`: V, or fewer with an adaptive softmax."""
    return sum(rows for rows, _, words in _projections(config, wanted) if words)


def wanted_by(criterion: str) -> str:
    """What a check that reads logits wants of them: a key of ``OPENED``."""
    return "top" if CRITERIA[criterion].of_top else "all"


def read_by_check(config: ModelConfig, criterion: str) -> bool:
    """Whether checks make all logits, so that an exit's prediction is read from them."""
    rule = CRITERIA[criterion]
    return rule.reads == "logits" and (config.output_head == "linear" or rule.of_top is None)


def _reading_flops(config: ModelConfig, criterion: str) -> float:
    """FLOPs per token of a LayerNorm, logits and softmax, as many as a check by ``criterion`` wants."""
    wanted = wanted_by(criterion)
    softmax = SOFTMAX * vocabulary_width(config, wanted)
    return LAYER_NORM * config.d_model + unembedding_flops(config, wanted) + softmax


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
        return part_flops(config)["translator"] + _reading_flops(config, criterion)
    if criterion in ("gate", "agreement"):  # the next block's LayerNorm is shared
        hidden = config.gate_hidden or 0
        return 2 * hidden * (d + 2) if hidden else 2 * 2 * d
    return {"depth": 0, "saturation": COSINE * d}[criterion]


def policy_flops(
    config: ModelConfig,
    distribution: Sequence[float],
    policy: ExitPolicy | str,
    stops: bool = True,
) -> dict[str, float]:
    """FLOPs per token of a compacted run that scores one word per token, by part.

    A check at the last layer costs nothing but for an adaptive softmax and a check of its logits. With
    such a head, a check that wants the most probable word alone leaves the scoring to do.

    Args:
        distribution: share of tokens per exit layer ``(L + 1,)``, the last for "no early exit".
        policy: whose checks are paid; or a criterion, checked after every layer but the last, and there
            too where tokens count as exited at it.
        stops: whether a run ends where nobody is left, so that nothing is propagated any further.

    Returns:
        ``blocks``, ``checks``, ``propagation`` (potentials of exited tokens), ``head``, ``total``,
        ``full_depth`` and ``speedup_flops`` = full_depth / total.
    """
    parts, layers = part_flops(config), config.n_layers
    share = np.asarray(distribution, dtype=float)
    executed = np.minimum(np.arange(layers + 1) + 1, layers)
    mean_layers = float(share @ executed)
    early = float(share[: layers - 1].sum())
    block, head = total(parts, BLOCK), total(parts, FINAL_HEAD)
    if isinstance(policy, ExitPolicy):
        criterion, checked = policy.criterion, [policy.checks(i) for i in range(layers)]
    else:
        last_too = CRITERIA[policy].streak or share[layers - 1] > 0
        criterion, checked = policy, [True] * (layers - 1) + [last_too]
    rule, alive = CRITERIA[criterion], 1 - np.append(0, np.cumsum(share))[:layers]
    ran = alive > 1e-9 if stops else np.ones(layers, dtype=bool)
    checks = float(alive[:-1] @ np.asarray(checked[:-1], dtype=float))
    checked_at_last = rule.reads == "logits" and checked[-1]
    last_check = _reading_flops(config, criterion) if checked_at_last else 0.0
    if read_by_check(config, criterion):  # the exit reads the check's own logits
        heads = (1 - early) * (last_check or head)
    elif rule.reads == "logits":  # scoring starts from the check's features
        known = 1.0 if checked_at_last else early
        heads = head - known * parts["head norm"] + (1 - early) * last_check
    else:
        heads = head + early * parts["translator"]
    out = {
        "blocks": mean_layers * block,
        "checks": checks * check_flops(config, criterion),
        "propagation": float((1 - alive) @ ran) * total(parts, PROPAGATION),
        "head": heads,
    }
    out["total"] = sum(out.values())
    out["full_depth"] = layers * block + head
    return out | {"speedup_flops": out["full_depth"] / out["total"]}


def exit_costs(config: ModelConfig, criterion: str) -> np.ndarray:
    """FLOPs per token of leaving at exit 0 … L − 1 in a compacted run that goes on ``(L,)``."""
    rows = np.eye(config.n_layers, config.n_layers + 1)
    rows[-1] = np.roll(rows[-1], 1)  # leaving at the last layer is not leaving early
    return np.array([policy_flops(config, row, criterion, stops=False)["total"] for row in rows])


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
    clusters = [(d // 2 ** (k + 1), cuts[k + 1] - cuts[k]) for k in range(len(cuts) - 1)]
    head = cuts[0] + len(clusters)
    return head * d + head + sum(width * d + size * width for width, size in clusters)


def break_even_depth(layers: int, head_ratio: float) -> float:
    """Mean depth below which a full-vocabulary check after each block pays: (L + r) / (1 + r)."""
    return (layers + head_ratio) / (1 + head_ratio)
