"""Early exit in a ResNet-BK language model: what it saves, at what price, with what guarantee."""

from earlyexit.calibration.certificate import Certificate, certify
from earlyexit.calibration.collect import collect_trace
from earlyexit.calibration.thresholds import fit_policy
from earlyexit.calibration.trace import ExitTrace
from earlyexit.corpus.documents import CorpusConfig
from earlyexit.corpus.load import load_corpus
from earlyexit.corpus.windows import loader
from earlyexit.evaluation.evaluator import EarlyExitEvaluator
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models.act import ACTLanguageModel, convert_act_to_early_exit
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
    "certify",
    "collect_trace",
    "convert_act_to_early_exit",
    "fit_policy",
    "load",
    "load_corpus",
    "load_model",
    "loader",
    "save_model",
    "train",
    "train_gates",
]
