"""Early exit in a ResNet-BK language model: what it saves, at what price, with what guarantee."""

from earlyexit.bk_core import BKCore
from earlyexit.certificate import Certificate, certify
from earlyexit.corpus import CorpusConfig, load_corpus, loader
from earlyexit.evaluator import EarlyExitEvaluator
from earlyexit.exits import CRITERIA, ExitPolicy
from earlyexit.fitting import fit_policy
from earlyexit.gates import train_gates
from earlyexit.layers import EarlyExitResNetBKBlock, MoEResNetBKLayer, SparseMoELayer
from earlyexit.model import EarlyExitLanguageModel, ModelConfig
from earlyexit.trace import ExitTrace, collect_trace
from earlyexit.training import TrainingConfig, train

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
