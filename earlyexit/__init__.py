"""Early exit in a ResNet-BK language model: what it saves, at what price, with what guarantee.

The package is read from bottom to top, and a wing uses only those before it: ``corpus`` (text to ids),
``nn`` (one layer a file), ``exits`` (the contract of a model with exits, and running it), ``models``
(kinds of models), ``figures``, ``training``, ``calibration`` (trace, thresholds, certificates), ``cost``
(operations, time, memory), ``evaluation`` (tables), ``runs`` (profiles, cache, notebooks), ``study``.

Dimensions, as they are written in shapes everywhere:

    B  sequences of a batch             V  words of the vocabulary
    N  positions of a sequence          L  layers
    D  width of the residual stream     E  experts; where tokens leave, the tokens that leave
    H  heads, with a potential each     T  tokens: of a batch, B · N, or of a split
    P  BK-Core's values per head        A  running tokens, those that have not left
    K  what a token hands to others     M  what a token takes from others
"""

import earlyexit.environment  # noqa: F401  (before torch and numba are loaded)
from earlyexit.calibration.certificate import Certificate
from earlyexit.calibration.certify import certify
from earlyexit.calibration.collect import collect_trace
from earlyexit.calibration.thresholds import fit_policy
from earlyexit.calibration.trace import ExitTrace
from earlyexit.corpus.documents import CorpusConfig
from earlyexit.corpus.load import load_corpus
from earlyexit.corpus.windows import loader
from earlyexit.evaluation.evaluator import EarlyExitEvaluator
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy
from earlyexit.explore import explore
from earlyexit.models.act import ACTLanguageModel, convert_act_to_early_exit
from earlyexit.models.attach import attach
from earlyexit.models.checkpoints import load_model, save_model
from earlyexit.models.multi_scale import MultiScaleLanguageModel
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.models.sparse_bk import SparseBKLanguageModel
from earlyexit.nn.bk_core import BKCore
from earlyexit.nn.block import EarlyExitResNetBKBlock, MoEResNetBKLayer
from earlyexit.nn.config import ModelConfig
from earlyexit.nn.moe import SparseMoELayer
from earlyexit.runs.published import load
from earlyexit.training.config import TrainingConfig
from earlyexit.training.gates import train_gates
from earlyexit.training.train import train

__all__ = [
    "CRITERIA",
    "ACTLanguageModel",
    "BKCore",
    "Certificate",
    "CorpusConfig",
    "EarlyExitEvaluator",
    "EarlyExitLanguageModel",
    "EarlyExitResNetBKBlock",
    "ExitPolicy",
    "ExitTrace",
    "MoEResNetBKLayer",
    "ModelConfig",
    "MultiScaleLanguageModel",
    "SparseBKLanguageModel",
    "SparseMoELayer",
    "TrainingConfig",
    "attach",
    "certify",
    "collect_trace",
    "convert_act_to_early_exit",
    "explore",
    "fit_policy",
    "load",
    "load_corpus",
    "load_model",
    "loader",
    "save_model",
    "train",
    "train_gates",
]
