"""Adaptive Computation Time works over layers (Graves 2016, arXiv:1603.08983), and becomes early exit.

After layer l a halting unit reads a token's state h_l and gives p_l = σ(w_l · LN(h_l) + b_l). A token
halts at the first layer N whose cumulative probability c_l = Σ_{k≤l} p_k reaches 1 − ε, at the latest
at the last layer. Its output is the average of its states, the last one weighted by the remainder
(eqs. 6, 7 and 13), and its ponder cost counts layers plus that remainder (eq. 8 and section 2.2):

    y = Σ_{l<N} p_l h_l + R h_N,        R = 1 − Σ_{l<N} p_l,        ρ = N + R.

A token that never halts costs more than L; one that halts before the last layer costs at most L.

The average is carried along, so that leaving needs no look back. The *stream* of a token is

    [h_l, S_l, c_l]  with  S_l = Σ_{k≤l} p_k h_k,    and    y = S_l + (1 − c_l) h_l

is what leaving at layer l would give: at l = N it is exactly the output above, because the p_N in S_N
and in c_N cancel. Norm, layer and head of a block each read their slice of the stream, so whatever runs
a model with exits runs this one, unchanged. A layer beyond c = 1 adds nothing: p is cut to 1 − c.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.exits.operations import Operations
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.models.sparse_bk import SparseBKLanguageModel, SparseConfig
from earlyexit.nn.halting import AverageHead, HaltingGates, HaltingLayer, StreamNorm
from earlyexit.nn.record import BatchRecord, listening


@dataclass(frozen=True)
class ACTConfig(SparseConfig):
    """Its fields are the arguments of :class:`ACTLanguageModel`.

    Attributes:
        keep: below 1, the layers are sparse ones; see :class:`SparseConfig`.
        epsilon: a token halts once its cumulative halting probability reaches 1 − ε.
        ponder_weight: weight τ of the mean ponder cost in the loss (eq. 12), nats per layer.

    Raises:
        ValueError: :func:`check_halting` or the base class refuses a value.
    """

    _: KW_ONLY
    keep: float = 1.0
    epsilon: float = 0.01
    ponder_weight: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        check_halting(self)


def check_halting(config) -> None:
    """Refuse a configuration with which no ACT model can be built.

    Raises:
        ValueError: ε is not in (0, 1), the ponder weight is negative, gates are asked for, or halted
            tokens shall hand on anything but what is recomputed from their states.
    """
    if not 0 < config.epsilon < 1 or not config.ponder_weight >= 0:
        raise ValueError(f"epsilon={config.epsilon} must lie in (0, 1), ponder_weight be ≥ 0")
    if config.gate_hidden is not None:
        raise ValueError("the gates of this model are its halting units: leave out gate_hidden")
    if config.left_behind != "recomputed":
        raise ValueError(
            f"left_behind={config.left_behind!r}: halted tokens of ACT need 'recomputed'"
        )


def add_halting(model: EarlyExitLanguageModel) -> None:
    """Give every block of ``model`` a halting unit and a head that reads the average, in place."""
    d, layers = model.d_model, model.n_layers
    for layer, block in enumerate(model.blocks):
        start = 1 / layers if layer < layers - 1 else None  # every layer weighs the same at first
        block.layer_norm = StreamNorm(d)
        block.bk_layer = HaltingLayer(block.bk_layer, d, start)
        block.exit_classifier = AverageHead.like(block.exit_classifier, d)


class HaltingExits:
    """In such a model exits read the running average, and the halting units are the gates."""

    def operations(self, **changes) -> Operations:
        return super().operations(halting=True, **changes)

    def act_policy(self) -> ExitPolicy:
        """Return the policy that halts where ACT halts: at a cumulative probability ≥ 1 − ε."""
        return ExitPolicy.constant(1 - self.config.epsilon, self.n_layers, "agreement")

    def default_policy(self) -> ExitPolicy:
        """Return :meth:`act_policy`; the confidence threshold plays no part."""
        return self.act_policy()


class Pondering:
    """Such a model is trained and run with ACT: it follows its own threshold, no policy."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gates = None

    def check_training(self, exit_sampling: str, layer_dropout: float) -> None:
        """Raise ValueError for exits sampled by token, because halting alone decides who stops."""
        super().check_training(exit_sampling, layer_dropout)
        if exit_sampling == "tokens":
            raise ValueError("in ACT halting decides who stops: take exit_sampling='one'")

    def own_loss(self, record: BatchRecord) -> Tensor | float:
        """Return ``ponder_weight`` × mean ponder cost, beside what the base class adds."""
        return super().own_loss(record) + self.config.ponder_weight * sum(record.notes["ponder"])

    def tell_ponder(self, streams: list[Tensor]) -> None:
        """Note ``ponder``, the mean cost of the tokens that count, given the ``hidden_states``."""
        if (record := listening()) is not None:
            cost = record.counted(self.ponder_cost(streams).flatten())
            record.notes["ponder"].append(cost.sum() / max(1, len(cost)))

    def final_state(self, x: Tensor) -> Tensor:
        return self.hidden_states(x)[-1]

    def ponder_cost(self, streams: list[Tensor]) -> Tensor:
        """Return ρ = N + R of every token ``(B, N)``, given its ``hidden_states``."""
        c = torch.cat([stream[..., -1:] for stream in streams[:-1]], dim=-1)  # (B, N, L): 0, c_1 …
        steps = self.steps(streams)
        return steps + 1 - c.gather(-1, steps[..., None] - 1).squeeze(-1)

    def steps(self, streams: list[Tensor]) -> Tensor:
        """Return the layers that every token runs ``(B, N)`` int64, given its ``hidden_states``."""
        halted = [stream[..., -1] >= 1 - self.config.epsilon for stream in streams[1:-1]]
        return self.n_layers - sum((h.long() for h in halted), streams[0].new_zeros(()).long())

    def forward(
        self, x: Tensor, return_ponder_cost: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits ``(B, N, V)`` of token ids ``(B, N)``, if asked also the mean ponder cost."""
        streams = self.hidden_states(x)
        logits = self.head(self.n_layers - 1)(streams[-1])
        return (logits, self.ponder_cost(streams).mean()) if return_ponder_cost else logits


class ACTEarlyExitModel(HaltingExits, SparseBKLanguageModel):
    """This early-exit model reads the running ACT average; see :func:`convert_act_to_early_exit`.

    Its criterion is ``"agreement"``, the cumulative halting probability. Its arguments are the fields
    of :class:`ACTConfig`.
    """

    config_type = ACTConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        add_halting(self)
        self.gates = HaltingGates()

    def embed(self, x: Tensor, start: int = 0) -> Tensor:
        """Return streams ``(B, N, 2D + 1)`` with nothing averaged and nothing halted."""
        return F.pad(super().embed(x, start), (0, self.d_model + 1))


class ACTLanguageModel(Pondering, ACTEarlyExitModel):
    """This language model is trained and run with Adaptive Computation Time.

    A token that has halted keeps its state and hands only potentials and values to deeper layers, as
    an exited token does, but layers are still computed for it. Its arguments are the fields of
    :class:`ACTConfig`.
    """

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """Return streams ``(B, N, 2D + 1)`` before the first and after every layer."""
        streams = [self.embed(x)]
        for block in self.blocks:
            halted = streams[-1][..., -1:] >= 1 - self.config.epsilon
            streams.append(torch.where(halted, streams[-1], block.hidden(streams[-1])))
        self.tell_ponder(streams)
        return streams


def convert_act_to_early_exit(act_model: ACTLanguageModel) -> ACTEarlyExitModel:
    """Make an early-exit model with a copy of the weights of ``act_model``.

    Every exit reads the running average through a copy of the final head. With ``act_policy()`` the
    model reproduces ``act_model``; with another threshold of ``"agreement"`` tokens leave earlier or
    later. Exits can be calibrated by training them on the frozen backbone
    (``TrainingConfig(freeze_backbone=True)``).
    """
    model = ACTEarlyExitModel.from_config(act_model.config).to(next(act_model.parameters()))
    model.load_state_dict(act_model.state_dict())
    copy_final_head(model)
    model.trained_on = act_model.trained_on
    return model.train(act_model.training)


def copy_final_head(model: EarlyExitLanguageModel) -> None:
    """Copy the last layer's head, the only one that ACT trains, to every exit, in place."""
    final = model.blocks[-1].exit_classifier
    for block in model.blocks[:-1]:
        head = block.exit_classifier
        head.layer_norm.load_state_dict(final.layer_norm.state_dict())
        if head.translator is not None:
            nn.init.zeros_(head.translator.weight)
            nn.init.zeros_(head.translator.bias)
        if head.linear is not None:
            head.linear.load_state_dict(final.linear.state_dict())
