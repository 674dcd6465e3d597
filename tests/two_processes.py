"""What two processes compute of a batch that they share; as a program, this file is the second."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch
from torch import Tensor

from earlyexit.corpus.windows import IGNORE
from earlyexit.models.act import ACTLanguageModel
from earlyexit.models.multi_scale import MultiScaleLanguageModel
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.training import parallel
from earlyexit.training.config import TrainingConfig

SIZES = {
    "vocab_size": 53, "d_model": 16, "n_layers": 3, "n_seq": 12, "bk_heads": 4, "gate_hidden": 0,
    "dropout_p": 0.0,
}  # fmt: skip
ALL = TrainingConfig(exit_sampling="all", exit_loss_weight=3.0, balance_weight=0.5, seed=4)
CASES = {
    "every exit": (EarlyExitLanguageModel, {}, ALL),
    "adaptive head": (EarlyExitLanguageModel, {"output_head": "adaptive", "exit_head": "own"}, ALL),
    "one exit": (EarlyExitLanguageModel, {"top_k": 2}, TrainingConfig(balance_weight=0.5)),
    "halting": (ACTLanguageModel, {}, TrainingConfig(exit_loss_weight=0.0, balance_weight=0.5)),
    "scales": (MultiScaleLanguageModel, {"n_layers": 5}, TrainingConfig(balance_weight=0.5)),
}
BATCHES = (7, 1)  # windows: shares of another size, and fewer windows than processes


def model_of(case: str) -> EarlyExitLanguageModel:
    kind, changes, _ = CASES[case]
    sizes = SIZES | changes
    if case in ("halting", "scales"):
        sizes = {k: v for k, v in sizes.items() if k != "gate_hidden"}
    torch.manual_seed(0)
    return kind(**sizes).train()


def batch(windows: int) -> tuple[Tensor, Tensor]:
    """Windows of very different lengths, so that no two shares have as many tokens."""
    generator = torch.Generator().manual_seed(windows)
    x = torch.randint(53, (windows, 12), generator=generator)
    lengths = torch.randint(1, 13, (windows, 1), generator=generator)
    return x, torch.where(torch.arange(12) < lengths, x.roll(-1, 1), IGNORE)


def gradients(case: str, windows: int, loss) -> tuple[float, dict[str, Tensor]]:
    """The mean NLL of the last layer, and the gradient of every weight that has one."""
    model = model_of(case)
    objective, nll = loss(model, *batch(windows), CASES[case][2], 3, progress=0.5)
    objective.backward()
    return nll.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def shared_gradients() -> dict:
    """Those of every case and batch, on the processes that have joined."""
    with parallel.replaced(parallel.record, "BatchRecord", parallel._WholeRecord):
        return {
            (case, windows): gradients(case, windows, parallel._SharedLoss())
            for case in CASES
            for windows in BATCHES
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with parallel.joined("cpu"):
        shared_gradients()
        corpus = pickle.loads(Path(sys.argv[1]).read_bytes())
        parallel.follow(corpus, torch.device("cpu"))
