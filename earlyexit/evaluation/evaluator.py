"""Run policies on a model and measure their quality and their speed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from earlyexit.checked import brief, whole
from earlyexit.corpus.windows import IGNORE, check_whole
from earlyexit.cost.timing import interleaved_times
from earlyexit.devices import resolve_device
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy, check_threshold
from earlyexit.exits.protocol import Execution
from earlyexit.exits.statistics import exit_statistics
from earlyexit.nn.borrowed import borrowed


def on_device(batches: Iterable, model: EarlyExitModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token ids and targets ``(B, N)`` of batches on a model's device.

    Raises:
        TypeError: a batch is no pair of tensors of whole numbers.
        ValueError: a batch is empty, ids and targets differ in number, or the loader is of another
            text than the model was trained on.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor):
        raise TypeError(f"batches={brief(batches)}: give pairs of token ids and targets (B, N)")
    model.check_text(getattr(batches, "dataset", None))
    device = next(model.parameters()).device
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            of = f" of {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""
            raise TypeError(
                f"a batch is a {type(batch).__name__}{of}: give pairs of token ids and targets (B, N)"
            )
        x, y = batch
        check_whole(x, "token ids")
        check_whole(y, "targets")
        if x.numel() == 0 or x.numel() != y.numel():
            raise ValueError(
                f"token ids {tuple(x.shape)} and targets {tuple(y.shape)}: give a target for each of at"
                " least one token"
            )
        yield x.to(device), y.reshape(x.shape).to(device)


def run_batches(
    model: EarlyExitModel,
    batches: Iterable,
    policy: ExitPolicy | None,
    execution: Execution = "compacted",
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Run a policy on batches and yield targets, NLL and exit layers ``(B, N)``; None is full depth."""
    for x, y in on_device(batches, model):
        if policy is None:
            yield y, model.nll(x, y), torch.full_like(x, model.n_layers, dtype=torch.int64)
        else:
            yield y, *model.nll(x, y, policy, execution)


def perplexity(nll: float, tokens: int) -> float:
    """Return exp(NLL per token); infinity where that is too large for a number."""
    return torch.tensor(nll / tokens, dtype=torch.float64).exp().item()


class EarlyExitEvaluator:
    """The evaluator measures quality and speed of a model with exits and leaves it unchanged.

    Args:
        model: the model.
        device: the device to run on: a string, a ``torch.device``, or ``"auto"``.
    """

    def __init__(self, model: EarlyExitModel, device: str | torch.device = "auto"):
        self.model = model
        self.device = resolve_device(device)

    def evaluate(
        self,
        dataloader: Iterable,
        confidence_thresholds: Sequence[float] = (0.7, 0.8, 0.9, 0.95),
    ) -> dict[float, dict]:
        """Evaluate exits by maximum probability at each threshold, compacted, over all batches.

        Args:
            dataloader: pairs of token ids and targets ``(B, N)``; targets of −100 are ignored.

        Returns:
            threshold → ``perplexity`` (token-weighted), ``avg_exit_layer``, ``exit_distribution``
            (n_layers + 1 percentages), ``speedup_estimate`` (layers, not time), ``total_tokens``.

        Raises:
            ValueError: a threshold is outside [0, 1], no token is scored, or the NLL is not finite.
        """
        rule = CRITERIA["max_probability"]
        thresholds = [check_threshold(t, rule) for t in confidence_thresholds]
        batches = list(on_device(dataloader, self.model))  # read once: it may be an iterator
        return {
            t: self.evaluate_policy(batches, ExitPolicy.constant(t, self.model.n_layers))
            for t in thresholds
        }

    def evaluate_policy(
        self,
        dataloader: Iterable,
        policy: ExitPolicy | None = None,
        execution: Execution = "compacted",
    ) -> dict:
        """Evaluate any policy as :meth:`evaluate` does; None is full depth without any exit head."""
        n_layers, nll, tokens = self.model.n_layers, 0.0, 0
        counts = torch.zeros(n_layers + 1, dtype=torch.int64)
        with self._borrowed_model() as model:
            runs = run_batches(model, dataloader, policy, execution)
            for y, batch_nll, exits in tqdm(runs, "evaluate", leave=False, mininterval=2):
                scored = y != IGNORE
                nll += batch_nll[scored].double().sum().item()
                tokens += int(scored.sum())
                counts += exits[scored].cpu().bincount(minlength=n_layers + 1)
        if not tokens:
            raise ValueError("the loader gave no scored token: check the split and its batch size")
        if not math.isfinite(nll):
            raise ValueError(f"NLL is {nll}: the weights or logits hold NaN or infinity")
        statistics = exit_statistics(counts)
        statistics["total_tokens"] = statistics.pop("total_tokens_processed")
        return {"perplexity": perplexity(nll, tokens), **statistics}

    def benchmark_speedup(
        self,
        dataloader: Iterable,
        num_batches: int = 100,
        policy: ExitPolicy | None = None,
        execution: Execution = "compacted",
    ) -> dict:
        """Time scoring with exits against full depth without exit heads, with the same weights.

        Both are warmed up and synchronised, and timed one right after the other on each batch. The
        times include the output head.

        Args:
            num_batches: the most batches that are timed.
            policy: by default maximum probability ≥ the model's ``confidence_threshold``.

        Returns:
            ``time_no_exit`` and ``time_with_exit`` (median seconds per batch), ``actual_speedup``
            (their ratio), ``theoretical_speedup`` (layers), ``avg_exit_layer``,
            ``exit_distribution`` (percentages).
        """
        num_batches = whole("num_batches", num_batches, 1)
        policy = self.model.default_policy() if policy is None else policy
        plain, early = [], []
        counts = torch.zeros(self.model.n_layers + 1, dtype=torch.int64)
        with self._borrowed_model() as model:
            for x, y in islice(on_device(dataloader, model), num_batches):
                _, exits = model.nll(x, y, policy, execution)
                counts += exits[y != IGNORE].cpu().bincount(minlength=model.n_layers + 1)
                pair = [
                    ("plain", lambda x=x, y=y: model.nll(x, y)),
                    ("early", lambda x=x, y=y: model.nll(x, y, policy, execution)),
                ]
                order = pair[:: (-1) ** len(plain)]  # the order alternates
                seconds = interleaved_times(dict(order), self.device, repeats=1)
                plain.append(seconds["plain"][0])
                early.append(seconds["early"][0])
        if not plain:
            raise ValueError("the loader is empty: there is nothing to time")
        statistics = exit_statistics(counts)
        return {
            "time_no_exit": float(np.median(plain)),
            "time_with_exit": float(np.median(early)),
            "actual_speedup": float(np.median(plain) / np.median(early)),
            "theoretical_speedup": statistics["speedup_estimate"],
            "avg_exit_layer": statistics["avg_exit_layer"],
            "exit_distribution": statistics["exit_distribution"],
        }

    @contextmanager
    def _borrowed_model(self) -> Iterator[EarlyExitModel]:
        """Yield the model on the evaluator's device in evaluation mode, and restore it afterwards.

        A model keeps its statistics in buffers, so the values of all buffers are restored in place.
        """
        model, device = self.model, next(self.model.parameters()).device
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        try:
            with borrowed(model.to(self.device)):
                yield model
        finally:
            model.to(device)
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
