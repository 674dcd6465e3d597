"""This wing holds the kinds of models; each file implements :mod:`earlyexit.exits.protocol`."""

from earlyexit.models.act import ACTEarlyExitModel, ACTLanguageModel, convert_act_to_early_exit
from earlyexit.models.act_multi_scale import (
    ACTMultiScaleExitModel,
    ACTMultiScaleLanguageModel,
    convert_act_multi_scale,
)
from earlyexit.models.multi_scale import MultiScaleLanguageModel
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.models.sparse_bk import SparseBKLanguageModel

__all__ = [
    "ACTEarlyExitModel",
    "ACTLanguageModel",
    "ACTMultiScaleExitModel",
    "ACTMultiScaleLanguageModel",
    "EarlyExitLanguageModel",
    "MultiScaleLanguageModel",
    "SparseBKLanguageModel",
    "convert_act_multi_scale",
    "convert_act_to_early_exit",
]
