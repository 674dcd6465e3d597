"""What a training costs on paper, from the account of operations and an accelerator's data sheet."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from earlyexit.exits.operations import FLOAT, flops
from earlyexit.models.operations import operations
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.nn.config import ModelConfig
from earlyexit.training.config import TrainingConfig
from earlyexit.training.muon import ITERATIONS
from earlyexit.training.optimizer import is_layer_matrix

PASSES = 3  # a forward pass, and a backward pass of two products for each of its


@dataclass(frozen=True)
class Accelerator:
    """An accelerator has peaks, of which a training reaches a share.

    Attributes:
        half_flops, single_flops: peak FLOPs per second of dense products in bfloat16 and in float32.
        memory: bytes.
        reached: the assumed share of the peaks.
    """

    name: str
    half_flops: float
    single_flops: float
    memory: float
    reached: float


# NVIDIA's data sheet of the H100 SXM, without sparsity; float32 without tensor cores.
H100 = Accelerator("H100", half_flops=989e12, single_flops=67e12, memory=80e9, reached=0.3)


@dataclass(frozen=True)
class TrainingCost:
    """The cost of a training.

    Attributes:
        parameters, tokens, steps: of the model, in all passes, and of the optimiser.
        token_flops: FLOPs of all tokens, forward and backward; head_share: that of output heads.
        optimizer_flops: of Muon's iterations, in float32; 0 with AdamW, whose work is no product.
        hours: of everything; optimizer_hours: of Muon alone.
        state_bytes: weights, gradients and the optimiser's averages, in float32.
        activation_bytes: at most: all that the layers and heads of a step read and write, in float32.
    """

    parameters: int
    tokens: int
    steps: int
    token_flops: float
    head_share: float
    optimizer_flops: float
    hours: float
    optimizer_hours: float
    state_bytes: float
    activation_bytes: float


def training_cost(
    config: ModelConfig, training: TrainingConfig, tokens: int, machine: Accelerator = H100
) -> TrainingCost:
    """Return the cost of training a model, which is not built, on ``tokens`` per pass.

    Windows are taken as full: documents whose last one is padded cost more.
    """
    stated, last = operations(config), config.n_layers - 1
    exits = {"one": 1, "all": last, "tokens": 0}[training.exit_sampling]
    exits = exits if training.exit_loss_weight else 0
    layers = [stated.layer(layer) for layer in range(config.n_layers)]
    heads = [stated.head("word")] * (1 + exits) + [stated.translator] * exits
    forward, in_heads = sum(map(flops, layers + heads)), sum(map(flops, heads))
    read, batch = int(tokens * training.epochs), training.batch_size * config.n_seq
    steps = math.ceil(read / batch)

    with torch.device("meta"):
        model = EarlyExitLanguageModel.from_config(config)
    muon = training.optimizer == "muon"
    matrices, numbers, averages = [], 0, 0
    for name, weight in model.named_parameters():
        by_muon = muon and is_layer_matrix(name, weight)
        matrices += [weight.shape] if by_muon else []
        numbers += weight.numel()
        averages += weight.numel() * (1 if by_muon else 2)
    iterated = steps * sum(orthogonal_flops(*shape) for shape in matrices)
    trained = read * PASSES * forward
    rate = machine.half_flops if training.bf16 else machine.single_flops
    hours = trained / (rate * machine.reached) / 3600
    optimizer_hours = iterated / (machine.single_flops * machine.reached) / 3600
    moved = sum(n for part in layers + heads for kind, n in part.items() if kind.endswith("bytes"))
    return TrainingCost(
        numbers, read, steps, trained, in_heads / forward, iterated, hours + optimizer_hours,
        optimizer_hours, FLOAT * (2 * numbers + averages), batch * moved,
    )  # fmt: skip


def orthogonal_flops(rows: int, columns: int) -> int:
    """Return the FLOPs of :func:`earlyexit.training.muon.orthogonal` on one matrix."""
    short, long = sorted((rows, columns))
    return ITERATIONS * (2 * 2 * short * short * long + 2 * short**3)
