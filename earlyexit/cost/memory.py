"""Measure the peak memory of runs, of tensors and of whole processes, as tidy tables."""

from __future__ import annotations

import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import psutil
import torch
from torch import Tensor

from earlyexit.cost.synthetic import (
    geometric_shares,
    policy_for_shares,
    random_model,
    random_tokens,
)
from earlyexit.devices import synchronize
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.original import original_early_exit
from earlyexit.exits.policy import ExitPolicy
from earlyexit.nn.borrowed import borrowed
from earlyexit.nn.config import ModelConfig

MIB = 2**20
RETURNED, SCORED = "logits returned", "scored in chunks"
NONE_EARLY = "compacted, none early"  # the control: what it saves is not due to exits


def executions(
    model: EarlyExitModel, x: Tensor, y: Tensor, policy: ExitPolicy, threshold: float
) -> dict[tuple[str, str], Callable[[], object]]:
    """Return forward passes by (output, execution); only the original's uses ``threshold``."""
    exits = partial(model, x, use_early_exit=True)
    nobody = ExitPolicy.static(model.n_layers - 1, model.n_layers)
    return {
        (RETURNED, "full depth"): lambda: model(x),
        (RETURNED, "compacted"): partial(exits, policy=policy),
        (RETURNED, NONE_EARLY): partial(exits, policy=nobody),
        (RETURNED, "dense"): partial(exits, policy=policy, execution="dense"),
        (RETURNED, "original's procedure"): lambda: original_early_exit(model, x, threshold),
        (SCORED, "full depth"): lambda: model.nll(x, y),
        (SCORED, "compacted"): lambda: model.nll(x, y, policy),
    }


@torch.no_grad()
def peak_memory(
    model: EarlyExitModel, x: Tensor, y: Tensor, policy: ExitPolicy, threshold: float
) -> pd.DataFrame:
    """Measure the peak tensor memory of every execution on one batch.

    Returns:
        Columns output, execution, logits_mib (of the B · N · V logits returned), rest_mib, peak_mib.
    """
    rows = []
    with borrowed(model):
        for (output, execution), run in executions(model, x, y, policy, threshold).items():
            run()  # warm-up: libraries allocate workspaces that they keep
            peak = peak_tensor_bytes(run, x.device) / MIB
            logits = x.numel() * model.vocab_size * 4 / MIB if output == RETURNED else 0.0
            rows.append((output, execution, logits, peak - logits, peak))
    columns = ["output", "execution", "logits_mib", "rest_mib", "peak_mib"]
    return pd.DataFrame(rows, columns=columns)


def memory_over_batches(
    model: EarlyExitModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    policy: ExitPolicy,
    threshold: float,
) -> pd.DataFrame:
    """Measure :func:`peak_memory` on batches of different sizes, with a column batch (windows).

    Args:
        batches: token ids and targets ``(B, N)``, one batch per size.
        policy, threshold: as :func:`executions` takes them.
    """
    parts = [peak_memory(model, x, y, policy, threshold).assign(batch=len(x)) for x, y in batches]
    return pd.concat(parts, ignore_index=True)


def memory_over_lengths(
    config: ModelConfig, lengths: Sequence[int], device: torch.device
) -> pd.DataFrame:
    """Measure :func:`peak_memory` on one window of each length, with a column length (tokens).

    Weights are random, and exits are constructed so that (L + 1) / 2 layers are executed on average.

    Args:
        config: configuration of the model; its ``n_seq`` is replaced.
    """
    shares, parts = geometric_shares(config.n_layers, (config.n_layers + 1) / 2), []
    for length in lengths:
        longer = replace(config, n_seq=length)
        model, x = random_model(longer).to(device), random_tokens(longer, 1, length).to(device)
        policy = policy_for_shares(model, x, shares)
        threshold = policy_for_shares(model, x, shares, "max_probability").thresholds[0]
        parts.append(peak_memory(model, x, x, policy, threshold).assign(length=length))
    return pd.concat(parts, ignore_index=True)


def resident_memory(
    config: ModelConfig,
    windows: int,
    policy: ExitPolicy,
    threshold: float,
    keys: Iterable[tuple[str, str]],
) -> pd.DataFrame:
    """Measure :func:`peak_resident` of executions: columns output, execution, resident_mib.

    Args:
        windows: windows of the batch; keys: pairs (output, execution) of :func:`executions`.
    """
    rows = [(*key, peak_resident(config, windows, policy, threshold, key)) for key in keys]
    return pd.DataFrame(rows, columns=["output", "execution", "resident_mib"])


def peak_resident(
    config: ModelConfig, batch: int, policy: ExitPolicy, threshold: float, key: tuple[str, str]
) -> float:
    """Measure the peak resident memory (MiB) that one execution adds to a new process (CPU).

    The process has random weights of ``config``. Memory depends on them only through which tokens
    exit, so ``policy`` should be a static one.
    """
    return peak_rss_bytes(_child, config, batch, policy, threshold, key) / MIB


def _child(
    work: bool, config: ModelConfig, batch: int, policy: ExitPolicy, threshold: float, key
) -> None:
    model = random_model(config)
    x = torch.randint(config.vocab_size, (batch, config.n_seq))
    run = executions(model, x, x, policy, threshold)[key]
    with torch.no_grad():
        model.nll(x[:1, :8], x[:1, :8])  # loads every library that the run needs
        if work:
            run()


def memory_parts(model: EarlyExitModel, batch: int) -> pd.DataFrame:
    """Compute the MiB of the parameters, of one residual stream and of one batch of logits."""
    config = model.config
    embedding = config.vocab_size * config.d_model
    parameters = sum(p.numel() for p in model.parameters())
    tokens = batch * config.n_seq
    parts = {
        "parameters: vocabulary": embedding,
        "parameters: the rest": parameters - embedding,
        "one residual stream": tokens * config.d_model,
        "logits of one batch": tokens * config.vocab_size,
    }
    return pd.DataFrame([{"part": k, "mib": 4 * v / MIB} for k, v in parts.items()])


def peak_tensor_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Measure the most bytes of tensors alive at once during ``function``, beyond those before it.

    On CUDA the allocator counts them; on the CPU they are summed from the profiler's allocations.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(alive.max(initial=0))


def peak_rss_bytes(function: Callable[..., object], *args) -> int:
    """Measure by how many bytes the work in ``function`` raises a process's peak resident memory.

    ``function(False, *args)`` does everything but the work to be measured, ``function(True, *args)``
    does it too. Each runs in a new process on the CPU, so ``function`` must be importable.
    """
    idle, busy = (_child_peak(function, work, *args) for work in (False, True))
    return max(0, busy - idle)


def _child_peak(function, work: bool, *args) -> int:
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_report_peak, args=(writer, function, work, *args))
    child.start()
    writer.close()
    try:
        peak = reader.recv()
    except EOFError:
        raise RuntimeError("the measured process ended without a result") from None
    finally:
        child.join()
    return peak


def _report_peak(writer, function, work: bool, *args) -> None:
    function(work, *args)
    writer.send(_own_peak())


def _own_peak() -> int:
    """Return this process's peak resident bytes; on Linux ``ru_maxrss`` would start at the parent's."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except OSError:  # not Linux
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def largest_peak_bytes() -> int:
    """Return the peak resident bytes of this process or of a child that ended, whichever is larger."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return max(_own_peak(), unit * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
