"""The systems that are compared: each idea alone, in pairs, and all together; and their controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from earlyexit.models.act import ACTLanguageModel, convert_act_to_early_exit
from earlyexit.models.act_multi_scale import ACTMultiScaleLanguageModel, convert_act_multi_scale
from earlyexit.models.multi_scale import MultiScaleLanguageModel
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.models.sparse_bk import SparseBKLanguageModel


@dataclass(frozen=True)
class System:
    """A system is one way of saving computation, or several at once.

    Attributes:
        name: in tables and legends.
        parts: of "ACT", "multi-scale", "sparse", those it has.
        kind: class of the model.
        convert: from the ACT model to its early-exit form; None where exits have learned gates.
        exits: whether its exits are trained, so that tokens may leave early.
        changes: changes to the profile's model, beside those of its parts.
    """

    name: str
    parts: frozenset[str] = field(default_factory=frozenset)
    kind: type[EarlyExitLanguageModel] = EarlyExitLanguageModel
    convert: Callable[[EarlyExitLanguageModel], EarlyExitLanguageModel] | None = None
    exits: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def criterion(self) -> str:
        """The criterion that decides: the gate's KL, or the cumulative halting probability."""
        return "agreement" if self.convert else "gate"


REFERENCE = System("plain", exits=False)
EXITS = System("exits")

SYSTEMS = (
    REFERENCE,
    EXITS,
    System("ACT", frozenset({"ACT"}), ACTLanguageModel, convert_act_to_early_exit),
    System("multi-scale", frozenset({"multi-scale"}), MultiScaleLanguageModel),
    System("sparse", frozenset({"sparse"}), SparseBKLanguageModel),
    System(
        "ACT + multi-scale", frozenset({"ACT", "multi-scale"}),
        ACTMultiScaleLanguageModel, convert_act_multi_scale,
    ),
    System(
        "ACT + sparse", frozenset({"ACT", "sparse"}),
        ACTLanguageModel, convert_act_to_early_exit,
    ),
    System(
        "multi-scale + sparse", frozenset({"multi-scale", "sparse"}),
        MultiScaleLanguageModel,
    ),
    System(
        "all three", frozenset({"ACT", "multi-scale", "sparse"}),
        ACTMultiScaleLanguageModel, convert_act_multi_scale,
    ),
)  # fmt: skip

# The reference without what exits and sparse cores are to save: where its absence costs nothing, saving
# it is no achievement.
CONTROLS = (
    System("no mixing", exits=False, changes={"mixing": "none"}),
    System("one layer", exits=False, changes={"n_layers": 1}),
)

CALIBRATION_RATE = 3e-3  # of exits that start as copies of a trained head


@dataclass(frozen=True)
class Budget:
    """The budget is what every system gets, the reference and the controls included.

    Attributes:
        tokens: training tokens, 0: the whole split; epochs: passes over them.
        batch_size: windows per step.
        gate_tokens: training tokens of gates; calibration_tokens: of a converted model's exits.
        validation_tokens: of the fit part, read after a training for its history.
        keep: share of positions that sparse cores visit.
        ponder_weight: nats per layer in ACT's loss.
        scales: layers of a model of several scales.
    """

    tokens: int
    epochs: float
    batch_size: int
    gate_tokens: int
    calibration_tokens: int
    validation_tokens: int
    keep: float = 0.5
    ponder_weight: float = 0.02
    scales: int = 5
