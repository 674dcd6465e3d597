"""A training runs on several processes of one box, a GPU each, as ``torchrun`` starts them.

The first process leads: it goes through the package as if it were alone, with its cache and history.
The others follow: it hands them each training, and they take the same steps. Of every batch each
process runs a share of the windows, and the gradients that they add up are those of one process on the
whole batch, to rounding; only dropout draws other units. Without ``torchrun`` none of this is used.

:func:`earlyexit.training.train.train` does not know of it, so that a model is the same entry of the
cache however many processes trained it: while they train, two names that it uses are replaced.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from earlyexit.corpus.corpus import Corpus
from earlyexit.corpus.windows import IGNORE
from earlyexit.exits.protocol import ExitModel
from earlyexit.models.checkpoints import CheckpointError
from earlyexit.nn import record
from earlyexit.training import train as one
from earlyexit.training.config import TrainingConfig
from earlyexit.training.losses import training_loss

PATIENCE = timedelta(
    days=14
)  # others wait while the first trains gates; torchrun ends them if it dies
LEADER, CPU = 0, torch.device("cpu")


def started() -> int:
    """Return how many processes ``torchrun`` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str) -> Iterator[bool]:
    """Join the processes that ``torchrun`` started, and yield whether this one leads.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``; each process takes a GPU of its own.
    """
    if started() == 1:
        yield True
        return
    gpus = device != "cpu" and torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    try:
        leads = distributed.get_rank() == LEADER
        yield leads
        if leads:
            _hand_over(None)
    finally:
        distributed.destroy_process_group()


@contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Give a name of a module another value within the block."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@wraps(one.train)  # by its name the cache knows the code that decides a model's weights
def train(
    model: ExitModel,
    corpus: Corpus,
    config: TrainingConfig,
    device: torch.device,
    checkpoint_dir: Path | None = None,
    **options: Any,
) -> list[dict]:
    """Train on all processes, of which this one leads; see :func:`earlyexit.training.train.train`.

    Returns:
        Its rows, with a column processes.

    Raises:
        ValueError: exits are sampled by token, which only a process with the whole batch can draw.
    """
    if config.exit_sampling == "tokens":
        raise ValueError(
            "exit_sampling='tokens' draws exits over the whole batch: train it on one process"
        )
    _hand_over((model, config, checkpoint_dir, options))
    history = _train(model, corpus, config, device, checkpoint_dir, **options)
    return [row | {"processes": distributed.get_world_size()} for row in history]


def follow(corpus: Corpus, device: torch.device) -> None:
    """Take part in the trainings that the leading process hands over, until it ends."""
    while (job := _hand_over()) is not None:
        model, config, checkpoint_dir, options = job
        options |= {"checkpoint_every": sys.maxsize}  # the leader writes, and all read
        try:
            _train(model, corpus, config, device, checkpoint_dir, **options)
        except CheckpointError:
            continue  # the leader decides what to do


def _train(*arguments: Any, **options: Any) -> list[dict]:
    try:
        with ExitStack() as stack:
            stack.enter_context(replaced(one, "training_loss", _SharedLoss()))
            stack.enter_context(replaced(record, "BatchRecord", _WholeRecord))
            return one.train(*arguments, **options)
    except CheckpointError:
        distributed.barrier()  # so that nobody deletes the state before all have read it
        raise


class _SharedLoss:
    """The loss of a process's share of a batch, whose gradients add up over all processes.

    It is called as :func:`earlyexit.training.losses.training_loss`, with the whole batch.
    """

    def __init__(self):
        self.model: ExitModel | None = None

    def __call__(
        self,
        model: ExitModel,
        x: Tensor,
        y: Tensor,
        config: TrainingConfig,
        step: int,
        progress: float,
    ) -> tuple[Tensor, Tensor]:
        if self.model is not model:  # the weights' gradients are asked for by now
            self.model, self.loss = (
                model,
                DistributedDataParallel(
                    _Loss(model, config), find_unused_parameters=True, forward_sync_buffers=False
                ),
            )
        rank, world = distributed.get_rank(), distributed.get_world_size()
        torch.manual_seed((config.seed * 1_000_003 + step) * world + rank)  # of dropout
        scored = (y != IGNORE).sum().clamp_min(1)
        own_x, own_y = (part.tensor_split(world)[rank] for part in (x, y))
        if not len(own_x):  # fewer windows than processes: one that does not count
            own_x, own_y = x[:1], torch.full_like(y[:1], IGNORE)
        share = (own_y != IGNORE).sum() / scored  # means over the own tokens count by their number
        objective, nll = self.loss(own_x, own_y, step, progress)
        distributed.all_reduce(mean := share * nll)
        return world * share * objective, mean  # gradients are averaged over the processes


class _Loss(nn.Module):
    """The loss as a module, as DistributedDataParallel wants it."""

    def __init__(self, model: ExitModel, config: TrainingConfig):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, x: Tensor, y: Tensor, step: int, progress: float) -> tuple[Tensor, Tensor]:
        return training_loss(self.model, x, y, self.config, step, progress)


class _WholeRecord(record.BatchRecord):
    """A record of the whole batch, although this process runs only its share.

    The loss that is made of it, the balance of experts, is that of all processes; its gradient reaches
    the own rows, enlarged by what :class:`_SharedLoss` takes from the loss of a share.
    """

    def __init__(self, counted: Tensor):
        super().__init__(counted)
        distributed.all_reduce(scored := counted.sum())
        self._enlarged = scored / counted.sum().clamp_min(1)

    def counted(self, values: Tensor) -> Tensor:
        """Return the rows that count of all processes ``(S, …)``, of the own positions ``(T, …)``."""
        own = super().counted(values)
        parts = _gathered(own.detach())
        if own.requires_grad:
            own = own.detach().lerp(own, self._enlarged.to(own.dtype))
        parts[distributed.get_rank()] = own
        return torch.cat(parts)


def _gathered(rows: Tensor) -> list[Tensor]:
    """Return the rows of each process, ``(S, …)`` with an S of its own."""
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, count)
    longest = int(max(counts))
    padded = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, longest - len(rows)))
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded.contiguous())
    return [part[: int(n)] for part, n in zip(parts, counts, strict=True)]


def _hand_over(job: Any = None) -> Any:
    """Return what the leading process gives as ``job``."""
    given = [job]
    distributed.broadcast_object_list(given, LEADER, device=CPU)
    return given[0]
