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

from earlyexit.corpus.windows import IGNORE
from earlyexit.cost.timing import interleaved_times
from earlyexit.devices import resolve_device
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy, check_threshold
from earlyexit.exits.protocol import Execution
from earlyexit.exits.statistics import exit_statistics


def on_device(batches: Iterable, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token ids and targets ``(B, N)`` of batches on a device.

    Raises:
        ValueError: a batch is empty.
    """
    for x, y in batches:
        if x.numel() == 0:
            raise ValueError("the loader gave an empty batch")
        yield x.to(device), y.view(x.shape).to(device)


def run_batches(
    model: EarlyExitModel,
    batches: Iterable,
    policy: ExitPolicy | None,
    execution: Execution = "compacted",
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Run a policy on batches and yield targets, NLL and exit layers ``(B, N)``; None is full depth."""
    for x, y in on_device(batches, next(model.parameters()).device):
        if policy is None:
            yield y, model.nll(x, y), torch.full_like(x, model.n_layers)
        else:
            yield y, *model.nll(x, y, policy, execution)


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
        batches = list(dataloader)  # read once: it may be an iterator
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
            batches = tqdm(dataloader, desc="evaluate", mininterval=2, leave=False)
            for y, batch_nll, exits in run_batches(model, batches, policy, execution):
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
        return {"perplexity": math.exp(nll / tokens), **statistics}

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
        if num_batches < 1:
            raise ValueError(f"num_batches={num_batches} must be at least 1")
        policy = policy or self.model.default_policy()
        plain, early = [], []
        counts = torch.zeros(self.model.n_layers + 1, dtype=torch.int64)
        with self._borrowed_model() as model:
            for x, y in on_device(islice(dataloader, num_batches), self.device):
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
        training = {module: module.training for module in model.modules()}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        try:
            yield model.to(self.device).eval()
        finally:
            model.to(device)
            for module, was_training in training.items():
                module.training = was_training
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
