"""Other computations behind the same exits: ACT, several scales, a sparse BK-Core."""

from earlyexit.variants.act import (
    ACTEarlyExitModel,
    ACTLanguageModel,
    act_loss,
    convert_act_to_early_exit,
)
from earlyexit.variants.act_multi_scale import (
    ACTMultiScaleExitModel,
    ACTMultiScaleLanguageModel,
    act_multi_scale_loss,
    convert_act_multi_scale,
)
from earlyexit.variants.multi_scale import (
    MultiScaleLanguageModel,
    block_trace,
    multi_scale_loss,
    positions_run,
)
from earlyexit.variants.sparse_bk import SparseBKLanguageModel, kept_shares, sparse_loss

__all__ = [
    "ACTEarlyExitModel",
    "ACTLanguageModel",
    "ACTMultiScaleExitModel",
    "ACTMultiScaleLanguageModel",
    "MultiScaleLanguageModel",
    "SparseBKLanguageModel",
    "act_loss",
    "act_multi_scale_loss",
    "block_trace",
    "convert_act_multi_scale",
    "convert_act_to_early_exit",
    "kept_shares",
    "multi_scale_loss",
    "positions_run",
    "sparse_loss",
]
