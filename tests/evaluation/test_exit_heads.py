"""Other heads are what they say: they cost what is stated, and reserved channels are never read."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from earlyexit.evaluation.exit_heads import (
    READ,
    ExitBlockModel,
    HiddenTranslatorModel,
    ReservedChannelsModel,
)
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.nn.config import ModelConfig

CONFIG = ModelConfig(60, 16, 3, n_seq=12, bk_heads=4, dropout_p=0.0, exit_head="own")


def made(kind: type[EarlyExitLanguageModel]) -> EarlyExitLanguageModel:
    torch.manual_seed(0)
    return kind.from_config(CONFIG).eval()


@pytest.mark.parametrize("kind", [HiddenTranslatorModel, ExitBlockModel])
def test_larger_heads_start_as_the_identity_and_cost_what_they_state(kind):
    model, plain = made(kind), made(EarlyExitLanguageModel)
    h = torch.randn(5, 16)
    torch.testing.assert_close(model.head(0).features(h), plain.head(0).layer_norm(h))
    torch.nn.init.normal_(model.head(0).translator[-1].weight)
    assert not torch.allclose(model.head(0).features(h), plain.head(0).layer_norm(h))
    assert model.head(2).translator is None
    stated, translator = model.operations(), model.head(0).translator
    with FlopCounterMode(display=False) as counted:
        translator(h)
    assert counted.get_total_flops() == 5 * stated.translator["flops"]
    assert ("elementwise_flops" in stated.translator) == (kind is ExitBlockModel)
    assert stated.parameters["translator"] == sum(p.numel() for p in translator.parameters())
    assert stated.layers == plain.operations().layers


def test_reserved_channels_are_read_by_the_last_layer_alone():
    model, h = made(ReservedChannelsModel), torch.randn(5, 16, requires_grad=True)
    read = int(READ * 16)
    for layer in range(3):
        (slope,) = torch.autograd.grad(model.head(layer).features(h).square().cumsum(1).sum(), h)
        assert (slope[:, :read] != 0).all()
        assert (slope[:, read:] != 0).any() == (layer == 2)


@pytest.mark.parametrize("kind", [HiddenTranslatorModel, ExitBlockModel, ReservedChannelsModel])
def test_a_model_with_other_heads_reads_its_own_weights(kind):
    model, again = made(kind), kind.from_config(CONFIG).eval()
    again.load_state_dict(model.state_dict())
    x = torch.randint(60, (2, 12))
    for states in zip(model.hidden_states(x)[1:], again.hidden_states(x)[1:], strict=True):
        assert torch.equal(*states)
