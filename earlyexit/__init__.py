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
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.nn.bk_core import BKCore
from earlyexit.nn.block import EarlyExitResNetBKBlock, MoEResNetBKLayer
from earlyexit.nn.config import ModelConfig
from earlyexit.nn.moe import SparseMoELayer
from earlyexit.training.config import TrainingConfig
from earlyexit.training.gates import train_gates
from earlyexit.training.train import train

__all__ = [
    "CRITERIA",
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
    "SparseMoELayer",
    "TrainingConfig",
    "certify",
    "collect_trace",
    "fit_policy",
    "load_corpus",
    "loader",
    "train",
    "train_gates",
]
