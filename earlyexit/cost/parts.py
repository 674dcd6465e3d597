"""The account of a run gives its cost: an amount of each kind of work, for each part of the run.

It is computed from the operations that a model states (:mod:`earlyexit.exits.operations`), from how
many positions every layer transforms, and from the checks. FLOPs, bytes and the amounts that predict
time are read from it. A function that takes a ``model`` also takes operations alone, so that the model
need not be built: see :func:`earlyexit.models.operations.operations`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from torch import Tensor

from earlyexit.calibration.exit_costs import ExitCosts
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.operations import FLOAT, Operations, flops, norm, weighted_sum
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.protocol import ExitModel
from earlyexit.exits.statistics import exit_shares, layers_executed
from earlyexit.models.operations import operations
from earlyexit.nn.config import ModelConfig
from earlyexit.nn.cross_entropy import CHUNK_ELEMENTS

FULL_DEPTH = "full depth"
FINAL_HEAD = ("head norm", "unembedding", "softmax")
EXIT_HEAD = ("translator", *FINAL_HEAD)

# Kinds of work that have a price in time; the time of the other kinds is contained in these.
PRICED = ("launches", "expert_flops", "thin_flops", "flops", "bytes", "steps", "logits", "run")
NOBODY = 1e-9  # a share of tokens below this is a rounding error
Account = dict[str, dict[str, float]]  # part of a run → kind of work → amount


# ---------------------------------------------------------------------- parts of one layer and of a head


def model_parts(model: ExitModel | Operations) -> dict[str, dict[str, float]]:
    """Return the amounts of every part of the first layer and of an exit head that scores one word."""
    stated = model.operations()
    head = {"translator": stated.translator, "head norm": norm(stated.width)}
    parts = stated.layers[0] | head | stated.projection["word"]
    return {name: dict(amounts) for name, amounts in parts.items()}


def part_flops(model: ExitModel | Operations) -> dict[str, float]:
    """Return the FLOPs per token of every part of the first layer and of an exit head."""
    return {name: flops(amounts) for name, amounts in model_parts(model).items()}


def total(parts: dict[str, float], names: Iterable[str]) -> float:
    """Return the sum of the named parts."""
    return sum(parts[name] for name in names)


def cost_table(model: ExitModel | Operations) -> pd.DataFrame:
    """Return each part's parameters, FLOPs and bytes per token, and FLOPs as a share of one block."""
    stated = model.operations()
    block = flops(stated.layer(0))
    rows = [
        {
            "part": name,
            "group": "block" if name in stated.layers[0] else "head",
            "parameters": stated.parameters.get(name, 0),
            "flops_per_token": flops(amounts),
            "bytes_per_token": sum(n for kind, n in amounts.items() if kind.endswith("bytes")),
            "share_of_block": flops(amounts) / block,
        }
        for name, amounts in model_parts(stated).items()
    ]
    return pd.DataFrame(rows)


def head_ratio(model: ExitModel | Operations) -> float:
    """Return the FLOPs of the final head over those of one block."""
    stated = model.operations()
    return flops(stated.head("word")) / flops(stated.layer(0))


def break_even_depth(layers: int, head_ratio: float) -> float:
    """Return the mean depth below which full-vocabulary checks pay off: (L + r) / (1 + r)."""
    return (layers + head_ratio) / (1 + head_ratio)


# ---------------------------------------------------------------------- the account


def check_amounts(model: Operations, criterion: str, layer: int) -> dict[str, float]:
    """Return the amounts per token of one exit check after ``layer``, without the exit itself."""
    rule = CRITERIA[criterion]
    if rule.reads == "logits":
        terms = [(1.0, model.translator), (1.0, model.head(rule.wants))]
    else:
        moved = FLOAT * rule.states_moved * model.width
        terms = [(1.0, {"elementwise_flops": rule.flops(model), "bytes": moved})]
    return weighted_sum([*terms, (1.0, {"elementwise_flops": model.reading[layer]})])


def check_flops(model: ExitModel | Operations, criterion: str) -> float:
    """Return the FLOPs per token of one check at the first exit, without the exit itself."""
    return flops(check_amounts(model.operations(), criterion, 0))


def account(
    model: Operations,
    positions: np.ndarray,
    criterion: str | None,
    checked: Sequence[bool] = (),
    *,
    tokens: int | None = None,
    stops: bool = True,
) -> Account:
    """Return the amounts per token of a compacted run that scores one word per token.

    Launches are not counted. A check at the last layer is free unless it computes logits from which
    the prediction is not read. If a check finds the most probable word without all logits, the score
    of the target is computed in addition.

    Args:
        positions: positions per token that every layer transforms ``(L,)``.
        criterion: the criterion that is checked; None is full depth, without any exit.
        checked: whether it is checked after each layer ``(L,)``.
        tokens: tokens of the batch; a layer that would run for less than half a token is not run.
        stops: whether a run ends when no token is left, so that states are propagated no further.

    Returns:
        Parts ``blocks`` and ``head``, and with a criterion ``check`` and ``propagation``.
    """
    layers, full = range(model.n_layers), model.positions
    least = 0.5 / tokens if tokens else NOBODY
    run, left = np.where(positions < least, 0.0, positions), full - positions
    out: Account = {"blocks": weighted_sum((run[k], model.layer(k)) for k in layers)}
    if criterion is None:
        return out | {"head": model.head("word")}
    rule, early, end = CRITERIA[criterion], left[-1], run[-1]
    passed = left * (run > 0) if stops else left
    through = weighted_sum((passed[k], model.passed(k)) for k in layers)
    # The recursion visits the positions of exited tokens only in layers that run.
    waited = weighted_sum((left[k] * (run[k] > 0), model.passed(k)) for k in layers)
    out["propagation"] = weighted_sum([(1.0, through), (early, model.leaving)])
    out["propagation"] |= {kind: n for kind, n in waited.items() if kind == "steps"}
    out["check"] = weighted_sum(
        (run[k] * checked[k], check_amounts(model, criterion, k)) for k in layers[:-1]
    )
    last_check = model.head(rule.wants) if rule.reads == "logits" and checked[-1] else None
    known = full.min() == 1 and rule.reads == "logits"  # the check has those of every token
    word = model.head("word")
    if known and rule.read_by_check(model):
        heads = [(end, last_check or word)]
    elif known:
        read = 1.0 if last_check else early
        heads = [(1.0, word), (-read, norm(model.width)), (end, last_check or {})]
    else:
        heads = [(1.0, word), (early, model.translator)]
    out["head"] = weighted_sum(heads)
    return out


def run_flops(
    model: ExitModel | Operations,
    positions: np.ndarray,
    policy: ExitPolicy | str | None,
    *,
    at_last: bool = False,
    stops: bool = False,
) -> dict[str, float]:
    """Return the FLOPs per token, by part, of a compacted run that scores one word per token.

    Args:
        positions: positions per token that every layer transformed ``(L,)``.
        policy: the policy whose checks are counted; or a criterion, checked after every layer but the
            last, and with ``at_last`` there too; None is full depth.
        stops: see :func:`account`.

    Returns:
        ``blocks``, ``checks``, ``propagation`` (of exited tokens), ``head``, ``total``, ``full_depth``
        and ``speedup_flops`` = full_depth / total.
    """
    stated = model.operations()
    criterion, checked = policy, [True] * (stated.n_layers - 1) + [at_last]
    if isinstance(policy, ExitPolicy):
        criterion, checked = policy.criterion, list(map(policy.checks, range(stated.n_layers)))
    parts = account(stated, positions, criterion, checked, stops=stops)
    names = {"blocks": "blocks", "checks": "check", "propagation": "propagation", "head": "head"}
    out = {name: flops(parts.get(part, {})) for name, part in names.items()}
    out["total"] = sum(out.values())
    out["full_depth"] = sum(map(flops, account(stated, stated.positions, None).values()))
    return out | {"speedup_flops": out["full_depth"] / out["total"]}


def policy_flops(
    model: ExitModel | Operations,
    shares: Sequence[float],
    policy: ExitPolicy | str,
    stops: bool = True,
) -> dict[str, float]:
    """Return :func:`run_flops` of tokens that leave in these ``shares`` per exit layer ``(L + 1,)``.

    The last share is of tokens without an early exit. In a model with several scales, tokens are
    assumed to leave in whole blocks. A criterion is checked at the last layer if tokens exit at it.
    """
    stated, at_last = model.operations(), False
    if isinstance(policy, str):
        at_last = CRITERIA[policy].streak or shares[stated.n_layers - 1] > 0
    positions = stated.positions * _alive(shares)
    return run_flops(stated, positions, policy, at_last=at_last, stops=stops)


def batch_speedups(model: ExitModel, x: Tensor, y: Tensor, policy: ExitPolicy) -> dict[str, float]:
    """Return ``speedup_layers`` and ``speedup_flops`` of a compacted run on one batch ``(B, N)``."""
    shares = exit_shares(model, x, y, policy)
    return {
        "speedup_layers": model.n_layers / mean_layers(shares),
        "speedup_flops": policy_flops(model, shares, policy)["speedup_flops"],
    }


def mean_layers(shares: Sequence[float]) -> float:
    """Return the mean layers executed by tokens that leave in these shares ``(L + 1,)``."""
    n_layers = len(shares) - 1
    return float(layers_executed(np.arange(n_layers + 1), n_layers) @ np.asarray(shares))


def _alive(shares: Sequence[float]) -> np.ndarray:
    """Return the share of tokens that run each layer ``(L,)``, from exit shares ``(L + 1,)``."""
    return 1 - np.append(0, np.cumsum(np.asarray(shares, dtype=float)))[: len(shares) - 1]


def exit_costs(model: ExitModel | Operations, criterion: str) -> np.ndarray:
    """Return FLOPs per token ``(L,)`` of leaving at exit 0 … L − 1 while other tokens run on."""
    layers = model.operations().n_layers
    rows = np.eye(layers, layers + 1)
    rows[-1] = np.roll(rows[-1], 1)  # leaving at the last layer is no early exit
    return np.array([policy_flops(model, row, criterion, stops=False)["total"] for row in rows])


def policy_costs(model: ExitModel | Operations, criterion: str) -> ExitCosts:
    """Return :func:`exit_costs` in two: leaving at each exit, and every check on the way there."""
    stated = model.operations()
    checks = [flops(check_amounts(stated, criterion, k)) for k in range(stated.n_layers - 1)]
    checks = stated.positions * [*checks, 0.0]
    return ExitCosts(exit_costs(stated, criterion) - np.cumsum(checks), checks)


def stopping_costs(model: ExitModel | Operations, criterion: str) -> list[ExitCosts]:
    """Return for each exit what leaving there or before costs in a run in which no token goes deeper.

    Nothing is propagated beyond the deepest exit, whose check every token pays that comes so far.
    """
    stated, whole = model.operations(), policy_costs(model, criterion)
    passing = [n * flops(stated.passed(k)) for k, n in enumerate(stated.positions)]
    found = []
    for deepest in range(stated.n_layers - 1):
        leaving = whole.leaving[: deepest + 1] - sum(passing[deepest + 1 :])
        leaving[-1] += whole.checks[deepest]
        found.append(ExitCosts(leaving, np.append(whole.checks[:deepest], 0.0)))
    return [*found, whole]


# ---------------------------------------------------------------------- what takes time


@dataclass(frozen=True)
class Load:
    """A load states the model, the batch and the exits of a run, so that its cost can be computed.

    Attributes:
        config: configuration of the model.
        batch, length: number of windows B, and of tokens N of each.
        criterion: checked after every layer but the last; ``FULL_DEPTH`` runs no exit.
        shares: share of the tokens per exit layer ``(L + 1,)``; not used at full depth.

    Raises:
        ValueError: a size is below 1, the criterion is unknown, or the shares have another length,
            are negative or do not sum to 1.
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

    @cached_property
    def operations(self) -> Operations:
        """Return the operations of the model, which is not built."""
        return operations(self.config)

    @property
    def at_full_depth(self) -> Load:
        """Return the load of the same batch without exits."""
        return Load(self.config, self.batch, self.length)

    @property
    def tokens(self) -> int:
        """Return the number of tokens in the batch."""
        return self.batch * self.length

    @property
    def mean_depth(self) -> float:
        """Return the number of layers that a token executes on average."""
        layers = self.config.n_layers
        if self.criterion == FULL_DEPTH:
            return float(layers)
        return mean_layers(self.shares)

    def describe(self) -> dict:
        """Return sizes, criterion and mean depth as columns of a table."""
        config = self.config
        sizes = ("d_model", "n_layers", "vocab_size", "output_head")
        return {name: getattr(config, name) for name in sizes} | {
            "batch": self.batch,
            "n_seq": self.length,
            "criterion": self.criterion,
            "mean_depth": self.mean_depth,
        }


def work(load: Load) -> Account:
    """Return the amounts of ``PRICED`` kinds for scoring a batch, compacted if there are exits.

    To those of :func:`account` it adds launches (operations started), the part ``rest``, and with exits
    ``gather/scatter``. A check that makes all logits is a ``projected check``, and one that finds the
    most probable word without most of them a ``top check``: each has its own prices.
    """
    model, tokens, layers = load.operations, load.tokens, load.config.n_layers
    exits = load.criterion != FULL_DEPTH
    rule = CRITERIA[load.criterion] if exits else None
    shares = load.shares if exits else (0.0,) * layers + (1.0,)
    # Tokens that exit at the last layer run all layers, like those without an exit.
    alive = _alive((*shares[: layers - 1], 0.0, shares[-1]))
    parts = account(
        model, alive, load.criterion if exits else None, [True] * (layers - 1) + [False],
        tokens=tokens, stops=False,
    )  # fmt: skip
    running = np.where(alive * tokens < 0.5, 0.0, alive * tokens)
    leaving = -np.diff(alive) * tokens
    departures = int((leaving > 0.5).sum())
    check, projected = "check", float(tokens)
    if exits and rule.reads == "logits":
        check = "projected check" if rule.read_by_check(model) else "top check"
        parts[check] = parts.pop("check")
        for part in (check, "head"):  # compared with the logits, their bytes take no time
            parts[part].pop("bytes", None)
        if rule.read_by_check(model):  # only tokens that reach the end are projected
            projected = running[-1]
    out = {
        part: {kind: tokens * n for kind, n in amounts.items() if kind in PRICED}
        for part, amounts in parts.items()
    }
    out["rest"] = {"run": 1.0, "bytes": tokens * 3 * FLOAT * model.width}
    out["blocks"]["launches"] = float((running > 0).sum() * model.launches)
    out["head"]["launches"] = 2.0 + departures + _chunks(model, np.array([projected]), "word")
    if not exits:
        return out
    out[check]["launches"] = float((running[:-1] > 0).sum())
    if check != "check":
        out[check]["launches"] += _chunks(model, running[:-1], rule.wants)
    out["propagation"]["launches"] = float(departures)
    out["gather/scatter"] = _moves(model, running, leaving, tokens) | {
        "launches": 2.0 + 2 * departures
    }
    return out


def _moves(
    model: Operations, running: np.ndarray, leaving: np.ndarray, tokens: int
) -> dict[str, float]:
    """Return the bytes moved to gather rows and to scatter them back, as tokens leave."""
    stay = running[1:][leaving > 0.5].sum()
    rows = 4 * stay + 2 * leaving.sum() + 2 * tokens
    joined = 6 * model.handed_on * running[1:][running[1:] < tokens - 0.5].sum()
    indices = 8 * 6 * running.sum()
    return {"bytes": FLOAT * (rows * model.width + joined) + indices}


def _chunks(model: Operations, tokens: np.ndarray, wanted: str) -> float:
    rows = max(1, int(CHUNK_ELEMENTS // model.logits(wanted)))
    return float(np.ceil(tokens / rows).sum())
