"""Every change changes something, and what its name says."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch.nn import functional as F

from earlyexit.evaluation.ablation import (
    CHANGES,
    UNCHANGED,
    Change,
    WithDiagonal,
    WithoutGate,
    WithoutNorm,
)
from earlyexit.evaluation.recipes import WITHOUT_EXITS
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.nn.config import ModelConfig
from earlyexit.nn.mixing import ResolventMixing
from earlyexit.runs.profiles import PROFILES
from earlyexit.training.config import TrainingConfig

PROFILE = {"vocab_size": 40, "d_model": 64, "n_layers": 1, "n_seq": 12}


def built(change: Change) -> torch.nn.Module:
    torch.manual_seed(0)
    return change.kind.from_config(ModelConfig(**PROFILE | change.model)).eval()


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_of_the_training_or_changes_what_the_model_does(name):
    change, plain = CHANGES[name], CHANGES[UNCHANGED]
    x = torch.randint(40, (3, 12), generator=torch.manual_seed(0))
    model = built(change)
    fit = model.train()(x), built(plain).train()(x)
    assert (not torch.equal(*fit)) == bool(change.model or change.kind is not plain.kind)
    assert change.training.keys() <= {f.name for f in fields(TrainingConfig)}
    given = replace(PROFILES["ablation"].training, **WITHOUT_EXITS)
    default = {k: getattr(given, k) for k in change.training}
    assert not change.training or default != change.training
    assert (name == UNCHANGED) == (change == Change())


def test_variants_of_the_layer_do_what_they_say():
    config = ModelConfig(**PROFILE)
    layers = {}
    for kind in (ResolventMixing, WithoutGate, WithoutNorm, WithDiagonal):
        torch.manual_seed(0)
        layers[kind] = kind(config)
    plain = layers[ResolventMixing]
    with torch.no_grad():
        plain.bk_scale.fill_(1.5)
    for layer in layers.values():
        layer.load_state_dict(plain.state_dict(), strict=False)
    u = torch.randn(5, 64)
    features = torch.randn(5, 2 * 16 + 2 * 64)
    re, im = features[:, 32:96], features[:, 96:]
    z = plain.real * re + plain.imag * im
    rms = F.rms_norm(z.view(5, 16, 4), (4,), eps=1e-6).flatten(1)
    out, scale = plain.output_proj, plain.bk_scale
    gate = F.silu(plain.gate_proj(u))

    def close(kind, truth):
        torch.testing.assert_close(layers[kind].read(u, features), truth, rtol=1e-4, atol=1e-5)

    close(ResolventMixing, scale * out(rms * gate))
    close(WithoutGate, scale * out(rms))
    eta = plain.bk_core.eta.repeat_interleave(4)
    close(WithoutNorm, scale * out(z * eta.sqrt() * gate))
    diagonal = layers[WithDiagonal].diagonal_proj(F.normalize(features[:, :32], dim=-1))
    close(WithDiagonal, scale * out(rms * gate) + diagonal)


def test_a_model_with_a_variant_is_an_ordinary_model():
    for name in ("values not gated", "values not normalised", "diagonal read as well"):
        model = built(CHANGES[name])
        assert isinstance(model, EarlyExitLanguageModel)
        torch.manual_seed(0)
        again = type(model).from_config(model.config)
        again.load_state_dict(model.state_dict())
