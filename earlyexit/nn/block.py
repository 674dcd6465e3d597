"""A block of a ResNet-BK language model mixes positions, applies experts, and has an exit.

It computes ``h + experts(LN(h) + mixing)``: BK-Core carries the past to a token, and sparse experts
transform it. What an exited token still contributes to deeper layers is only its potentials
``v = W · LN(h)``, which the experts have no part in, so keeping the recursion fed costs O(D · H).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.nn.bk_core import BKCore
from earlyexit.nn.config import ModelConfig
from earlyexit.nn.heads import ExitHead
from earlyexit.nn.moe import SparseMoELayer
from earlyexit.nn.unembedding import LinearUnembedding

QUIET = 0.3  # initial scale of the potentials' weights; of 0.1, 0.3, 1 and 2 it trained best


class MoEResNetBKLayer(nn.Module):
    """This layer mixes positions by BK-Core, then transforms each by sparse experts.

    From the normalised input u ``(B, N, D)`` it makes potentials v = W_v u ``(B, N, H)``, resolvent
    features ``(B, N, 2H)`` and their projection m ``(B, N, D)``; it returns
    ``m·s + experts(u + m·s)`` with a learned scale s.

    Args:
        d_model, n_seq, num_experts, top_k, dropout_p: see :class:`earlyexit.nn.config.ModelConfig`.
        options: other fields of the configuration, such as ``bk_heads``.
    """

    def __init__(
        self,
        d_model: int,
        n_seq: int,
        num_experts: int = 4,
        top_k: int = 1,
        dropout_p: float = 0.1,
        **options,
    ):
        super().__init__()
        sizes = {"d_model": d_model, "n_seq": n_seq, "num_experts": num_experts, "top_k": top_k}
        config = ModelConfig(**{"vocab_size": 2} | sizes | {"dropout_p": dropout_p} | options)
        self.d_model, self.n_seq, heads = d_model, n_seq, config.bk_heads
        d = d_model
        self.moe = SparseMoELayer(
            d, num_experts, top_k, dropout_p, expert_hidden=config.expert_hidden
        )
        self.v_proj = nn.Linear(d, heads)
        self.bk_core = BKCore(heads, causal=config.causal)
        self.output_proj = nn.Linear(2 * heads, d)
        self.bk_scale = nn.Parameter(torch.ones(()))
        # The band |α| < 2|t| is where the past matters: spread the heads over it. In one dimension
        # disorder localises (Anderson 1958): noisy potentials forget, so they start quiet.
        with torch.no_grad():
            self.v_proj.weight.mul_(QUIET)
            self.v_proj.bias.copy_(2 * self.bk_core.t + torch.linspace(-1.5, 1.5, heads))

    def potentials(self, u: Tensor) -> Tensor:
        """Return v ``(…, H)`` of u ``(…, D)``: all that a token hands to the recursion."""
        return self.v_proj(u)

    def transform(self, u: Tensor, features: Tensor) -> Tensor:
        """Return the update of the residual stream ``(…, D)`` from u and BK features ``(…, 2H)``."""
        project, scale = self.output_proj, self.bk_scale  # scaling weights is cheaper than states
        mixed = F.linear(features, scale * project.weight, scale * project.bias)
        return mixed + self.moe(u + mixed)

    def forward(self, u: Tensor) -> Tensor:
        """Return the update of the residual stream from u, both ``(B, N, D)``."""
        return self.transform(u, self.bk_core(self.potentials(u)))


class EarlyExitResNetBKBlock(nn.Module):
    """A block is LayerNorm → MoEResNetBKLayer → residual sum → exit classifier.

    Args:
        d_model, n_seq, vocab_size, num_experts, top_k, dropout_p: see
            :class:`earlyexit.nn.config.ModelConfig`; all of them can be read as attributes.
        exit_classifier: the head to use; by default the block owns LayerNorm + Linear(D, V).
        options: other fields of the configuration, such as ``bk_heads``.
    """

    def __init__(
        self,
        d_model: int,
        n_seq: int,
        vocab_size: int,
        num_experts: int = 4,
        top_k: int = 1,
        dropout_p: float = 0.1,
        *,
        exit_classifier: ExitHead | None = None,
        **options,
    ):
        super().__init__()
        self.d_model, self.n_seq, self.vocab_size = d_model, n_seq, vocab_size
        self.num_experts, self.top_k, self.dropout_p = num_experts, top_k, dropout_p
        self.layer_norm = nn.LayerNorm(d_model)
        self.bk_layer = MoEResNetBKLayer(d_model, n_seq, num_experts, top_k, dropout_p, **options)
        self.exit_classifier = exit_classifier or ExitHead(
            d_model, LinearUnembedding(d_model, vocab_size), borrowed=False, translate=False
        )

    def hidden(self, h: Tensor) -> Tensor:
        """Return the states after the block, without its exit: ``(B, N, D)`` → ``(B, N, D)``."""
        return h + self.bk_layer(self.layer_norm(h))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states after the block ``(B, N, D)`` and the exit's logits ``(B, N, V)``."""
        output = self.hidden(h)
        return output, self.exit_classifier(output)
