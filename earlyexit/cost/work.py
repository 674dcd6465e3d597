"""How much work a run does, part by part: launches, FLOPs, bytes, recursion steps, logits.

From these amounts and a machine's price for each, :mod:`earlyexit.cost.time_model` predicts time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from earlyexit.cost.parts import (
    part_bytes,
    part_flops,
    read_by_check,
    unembedding_flops,
    vocabulary_width,
    wanted_by,
)
from earlyexit.exits.criteria import CRITERIA
from earlyexit.nn.config import ModelConfig
from earlyexit.nn.cross_entropy import CHUNK_ELEMENTS

FULL_DEPTH = "full depth"


Work = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Load:
    """A configuration to be run.

    Attributes:
        config: the model.
        batch, length: windows B and tokens N of each.
        criterion: what is checked after every layer but the last; ``FULL_DEPTH`` runs no exit.
        shares: of tokens per exit layer ``(L + 1,)``; not used at full depth.

    Raises:
        ValueError: shares of another length, negative, or not summing to 1; sizes below 1; an unknown
            criterion.
    """

    config: ModelConfig
    batch: int
    length: int
    criterion: str = FULL_DEPTH
    shares: tuple[float, ...] = ()

    def __post_init__(self):
        if min(self.batch, self.length) < 1:
            raise ValueError(f"batch={self.batch} and length={self.length} must be at least 1")
        if self.criterion == FULL_DEPTH:
            return
        if self.criterion not in CRITERIA:
            known = ", ".join(CRITERIA)
            raise ValueError(f"unknown criterion {self.criterion!r}; known: {known}")
        shares, layers = np.asarray(self.shares, dtype=float), self.config.n_layers
        if shares.shape != (layers + 1,) or not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-3:
            raise ValueError(
                f"{layers} layers need {layers + 1} exit shares ≥ 0 that sum to 1 (the last: no early"
                f" exit), got {list(self.shares)}"
            )

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def mean_depth(self) -> float:
        """Layers executed on average."""
        layers = self.config.n_layers
        if self.criterion == FULL_DEPTH:
            return float(layers)
        return float(np.minimum(np.arange(layers + 1) + 1, layers) @ np.asarray(self.shares))


def work(load: Load) -> Work:
    """Part → kind of work → amount, for scoring a batch (compacted, where there are exits).

    Kinds: ``launches`` (operations started), ``expert_flops`` (wide products), ``thin_flops`` (products
    with few columns), ``flops``, ``bytes``, ``steps`` (of the recursion), ``logits``, ``run`` (1).
    """
    config, tokens = load.config, load.tokens
    flops, moved, layers = part_flops(config), part_bytes(config), config.n_layers
    if load.criterion == FULL_DEPTH:
        leaving = np.zeros(layers)
    else:
        leaving = np.asarray(load.shares, dtype=float)[:layers] * tokens
    leaving[-1] = 0
    alive = tokens - np.concatenate([[0], np.cumsum(leaving[:-1])])  # (L,) running each layer
    alive = np.where(alive < 0.5, 0, alive)
    executed, ran = alive.sum(), int((alive > 0).sum())
    early = leaving.sum()
    departures = int((leaving > 0.5).sum())
    out: Work = {
        "blocks": {
            "launches": ran * (6 + config.num_experts),
            "expert_flops": executed * flops["experts"],
            "thin_flops": executed * sum(flops[k] for k in ("potentials", "projection", "router")),
            "bytes": executed
            * sum(moved[k] for k in ("layer norm", "projection", "router", "experts")),
            "steps": executed * config.bk_heads,
        },
        "rest": {"run": 1.0, "bytes": tokens * 12 * config.d_model},
        "head": {
            "launches": 2 + departures,
            "flops": early * flops["translator"],
            "bytes": early * moved["translator"] + tokens * moved["head norm"],
        },
    }
    projected = float(tokens)  # by the head
    if load.criterion != FULL_DEPTH:
        checks = alive[: layers - 1]
        each = {"launches": float((checks > 0).sum())}
        if CRITERIA[load.criterion].reads == "logits":
            wanted = wanted_by(load.criterion)
            if read_by_check(config, load.criterion):  # those who reach the end go through the head
                projected = alive[-1]
            out["head"]["flops"] = out["head"]["bytes"] = 0.0
            out["projected check"] = each | _projection(config, checks.sum(), wanted)
            out["projected check"]["flops"] += checks.sum() * flops["translator"]
            out["projected check"]["launches"] += _chunks(config, checks, wanted)
        else:
            read = {"depth": 0, "saturation": 3}.get(load.criterion, 1)
            out["check"] = each | {"bytes": checks.sum() * 4 * read * config.d_model}
        passed_on = (leaving * (layers - 1 - np.arange(layers))).sum()
        waiting = (tokens - alive[alive > 0]).sum() if ran else 0.0
        out["propagation"] = {
            "launches": float(departures),
            "flops": passed_on * flops["potentials"],
            "bytes": early * moved["layer norm"] + passed_on * 4 * config.bk_heads,
            "steps": waiting * config.bk_heads,
        }
        stay = alive[1:][leaving[:-1] > 0.5].sum()
        rows = 4 * stay + 2 * early + 2 * tokens
        joined = alive[1:][alive[1:] < tokens - 0.5].sum() * 6 * config.bk_heads
        out["gather/scatter"] = {
            "launches": 2.0 + 2 * departures,
            "bytes": 4 * (rows * config.d_model + joined) + 8 * 6 * executed,
        }
    head = _projection(config, projected)
    out["head"]["flops"] += head["flops"]
    out["head"]["logits"] = head["logits"]
    out["head"]["launches"] += _chunks(config, np.array([projected]))
    return out


def _projection(config: ModelConfig, tokens: float, wanted: str = "word") -> dict[str, float]:
    return {
        "flops": tokens * unembedding_flops(config, wanted),
        "logits": tokens * vocabulary_width(config, wanted),
    }


def _chunks(config: ModelConfig, tokens: np.ndarray, wanted: str = "word") -> float:
    rows = max(1, int(CHUNK_ELEMENTS // vocabulary_width(config, wanted)))
    return float(np.ceil(tokens / rows).sum())
