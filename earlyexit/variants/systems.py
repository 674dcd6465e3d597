"""The systems that are compared: each idea alone, in pairs, and all together, each with exits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from earlyexit import stages
from earlyexit.corpus import Corpus
from earlyexit.exits import ExitPolicy
from earlyexit.model import EarlyExitLanguageModel
from earlyexit.stages import Trained
from earlyexit.study import Study
from earlyexit.training import LossFunction
from earlyexit.variants.act import ACTLanguageModel, act_loss, convert_act_to_early_exit
from earlyexit.variants.act_multi_scale import (
    ACTMultiScaleLanguageModel,
    act_multi_scale_loss,
    convert_act_multi_scale,
)
from earlyexit.variants.measuring import quantile_policies
from earlyexit.variants.multi_scale import MultiScaleLanguageModel, multi_scale_loss
from earlyexit.variants.sparse_bk import SparseBKLanguageModel, sparse_loss


@dataclass(frozen=True)
class System:
    """One way of saving computation, or several at once.

    Attributes:
        name: in tables and legends.
        parts: of "ACT", "multi-scale", "sparse", those it has; all but the reference have exits.
        kind, loss: class and training loss; None is the plain model's.
        convert: from the ACT model to its early-exit form; None where exits have learned gates.
    """

    name: str
    parts: frozenset[str] = field(default_factory=frozenset)
    kind: type[EarlyExitLanguageModel] = EarlyExitLanguageModel
    loss: LossFunction | None = None
    convert: Callable[[EarlyExitLanguageModel], EarlyExitLanguageModel] | None = None

    @property
    def criterion(self) -> str:
        """What decides: the gate's KL, or the cumulative halting probability."""
        return "agreement" if self.convert else "gate"


REFERENCE = System("plain")
EXITS = System("exits")
SYSTEMS = (
    REFERENCE,
    EXITS,
    System("ACT", frozenset({"ACT"}), ACTLanguageModel, act_loss, convert_act_to_early_exit),
    System("multi-scale", frozenset({"multi-scale"}), MultiScaleLanguageModel, multi_scale_loss),
    System("sparse", frozenset({"sparse"}), SparseBKLanguageModel, sparse_loss),
    System(
        "ACT + multi-scale", frozenset({"ACT", "multi-scale"}),
        ACTMultiScaleLanguageModel, act_multi_scale_loss, convert_act_multi_scale,
    ),
    System(
        "ACT + sparse", frozenset({"ACT", "sparse"}),
        ACTLanguageModel, act_loss, convert_act_to_early_exit,
    ),
    System(
        "multi-scale + sparse", frozenset({"multi-scale", "sparse"}),
        MultiScaleLanguageModel, multi_scale_loss,
    ),
    System(
        "all three", frozenset({"ACT", "multi-scale", "sparse"}),
        ACTMultiScaleLanguageModel, act_multi_scale_loss, convert_act_multi_scale,
    ),
)  # fmt: skip


CALIBRATION_RATE = 3e-3  # of exits that start as copies of a trained head


@dataclass(frozen=True)
class Budget:
    """What every system gets, the reference included.

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


def train_system(study: Study, system: System, seed: int, budget: Budget) -> Trained:
    """The system's weights, trained now unless they are in the cache; with ACT the ACT model."""
    changes: dict = {}
    if "sparse" in system.parts:
        changes["keep"] = budget.keep
    if "multi-scale" in system.parts:
        changes["n_layers"] = budget.scales
    # One way for all: single tokens cannot leave where blocks do, nor where halting decides.
    training = {
        "epochs": budget.epochs, "batch_size": budget.batch_size, "exit_sampling": "one"
    }  # fmt: skip
    if "ACT" in system.parts:
        changes["ponder_weight"] = budget.ponder_weight
        training["exit_loss_weight"] = 0.0  # its one head reads averages; exits come afterwards
    if system is REFERENCE:
        training["exit_loss_weight"] = 0.0
    return stages.trained_model(
        _corpus(study, budget),
        study.model_config(system.kind, **changes),
        study.training_config(seed, **training),
        study.cache,
        study.device,
        max_tokens=budget.tokens,
        kind=system.kind,
        loss=system.loss,
    )


def _corpus(study: Study, budget: Budget) -> Corpus:
    """The text with a short fit part: reading all of it would take longer than a short training."""
    fit = study.corpus.splits["fit"].limit(budget.validation_tokens)
    return replace(study.corpus, splits=study.corpus.splits | {"fit": fit})


def with_exits(
    study: Study, system: System, seed: int, trained: Trained, budget: Budget
) -> Trained:
    """The system ready to exit: with learned gates, or converted from ACT and calibrated.

    The reference is returned as it is.
    """
    if system is REFERENCE:
        return trained
    if system.convert is None:
        return stages.gated_model(
            trained,
            study.corpus,
            study.cache,
            study.device,
            hidden=study.profile.gate_hidden,
            max_tokens=budget.gate_tokens,
            seed=seed,
            steps=min(stages.GATE_STEPS, max(50, budget.gate_tokens // 10)),
        )
    training = study.training_config(
        seed,
        epochs=1.0,
        batch_size=budget.batch_size,
        learning_rate=CALIBRATION_RATE,
        exit_sampling="all",
        freeze_backbone=True,
    )
    return stages.converted_model(
        trained,
        system.convert,
        _corpus(study, budget),
        training,
        study.cache,
        study.device,
        max_tokens=budget.calibration_tokens,
    )


def candidate_policies(
    system: System, model: EarlyExitLanguageModel, x: Tensor, shares: Sequence[float]
) -> dict[str, list[ExitPolicy | None]]:
    """What a system may do, by kind: full depth, a threshold per share of passing scores, one exit.

    Args:
        x: token ids ``(B, N)`` whose scores set the thresholds.
    """
    if system is REFERENCE:
        return {"full depth": [None]}
    layers = range(model.n_layers - 1)
    return {
        "full depth": [None],
        "adaptive": quantile_policies(model, x, system.criterion, shares),
        "static": [ExitPolicy.static(k, model.n_layers) for k in layers],
    }
