"""Construct exits by which a prescribed share of the tokens leaves at each layer.

Time depends on how many tokens run each layer, not on how good their predictions are. Timing therefore
needs no trained model: thresholds are set at quantiles of the scores of a batch's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from earlyexit.exits.criteria import CRITERIA, Criterion
from earlyexit.exits.execution import run
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.protocol import ExitModel
from earlyexit.exits.readers import Predictions
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.nn.config import ModelConfig

# The most frequent tenth of 10,000 words then makes 80 % of the tokens; in the embedded text, 81 %.
ZIPF_SHIFT, ZIPF_POWER = 2.7, 1.1


def random_model(config: ModelConfig, seed: int = 0) -> EarlyExitLanguageModel:
    """Return an untrained model in evaluation mode whose random linear gates are marked as trained."""
    torch.manual_seed(seed)
    model = EarlyExitLanguageModel.from_config(replace(config, gate_hidden=config.gate_hidden or 0))
    model.gates.trained.fill_(True)
    return model.eval()


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> Tensor:
    """Draw token ids ``(B, N)`` whose frequencies fall with the id as in a text (Zipf–Mandelbrot).

    An adaptive softmax takes less time for frequent words, so uniform ids would bias its time.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = torch.arange(config.vocab_size, dtype=torch.float64)
    weight = (rank + ZIPF_SHIFT) ** -ZIPF_POWER
    ids = torch.multinomial(weight, batch * length, replacement=True, generator=generator)
    return ids.view(batch, length)


def geometric_shares(n_layers: int, mean_depth: float) -> np.ndarray:
    """Return shares per exit layer ``(L + 1,)`` that fall or rise geometrically; the last is 0.

    Args:
        mean_depth: layers executed on average, in 1 … n_layers.

    Raises:
        ValueError: the mean depth is out of this range.
    """
    if not 1 <= mean_depth <= n_layers:
        raise ValueError(f"a mean depth of {mean_depth} does not lie in 1 … {n_layers} layers")
    depth = np.arange(1, n_layers + 1)

    def weights(log_ratio: float) -> np.ndarray:
        power = log_ratio * (depth - 1)
        return np.exp(power - power.max()) / np.exp(power - power.max()).sum()

    if mean_depth in (1, n_layers):
        share = (depth == mean_depth).astype(float)
    else:
        share = weights(brentq(lambda r: weights(r) @ depth - mean_depth, -500, 500))
    return np.append(share, 0.0)


def rule_threshold(rule: Criterion, scores: np.ndarray, share: float) -> float:
    """Return the threshold of a criterion that about this share of the scores passes."""
    cut = np.quantile(scores, 1 - share if rule.exit_above else share)
    return float(np.clip(cut, *rule.bounds))


@torch.no_grad()
def policy_for_shares(
    model: ExitModel, x: Tensor, shares: Sequence[float], criterion: str = "gate"
) -> ExitPolicy:
    """Return a policy by which these shares of the tokens ``x`` ``(B, N)`` leave at each layer.

    Thresholds are found layer by layer on compacted runs, whose states include the effect of the
    tokens that have already exited.

    Args:
        shares: share per exit layer ``(L + 1,)``; the tokens of the last two run to the end.

    Raises:
        ValueError: the shares have another length, are negative or do not sum to 1.
    """
    rule, layers = CRITERIA[criterion], model.n_layers
    shares = np.asarray(shares, dtype=float)
    if shares.shape != (layers + 1,) or (shares < 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f"expected {layers + 1} shares ≥ 0 that sum to 1, got {shares.tolist()}")
    reader = Predictions() if rule.reads == "logits" else None
    always = rule.bounds[0] if rule.exit_above else rule.bounds[1]
    thresholds = [rule.never] * layers
    for layer in range(layers - 1):
        left = shares[layer:].sum()
        if shares[layer] <= 0 or left <= 0:
            continue
        if shares[layer] >= left - 1e-9:
            thresholds[layer] = always
            break
        thresholds[layer] = always
        made = run(model, x, ExitPolicy(criterion, tuple(thresholds)), reader)
        scores = made.scores[made.exit_layers == layer].double().cpu().numpy()
        thresholds[layer] = rule_threshold(rule, scores, shares[layer] / left)
    return ExitPolicy(criterion, tuple(thresholds))
