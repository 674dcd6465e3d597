"""The layers of a ResNet-BK language model, each with an exit.

A block is ``h + experts(LN(h) + mixing)``: BK-Core carries the past to a token, sparse experts
transform it. What an exited token still contributes to deeper layers is only its potentials
``v = W · LN(h)``, read before the experts, so keeping the recursion fed costs O(d · heads).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.bk_core import BKCore
from earlyexit.vocabulary import LinearUnembedding, Unembedding

QUIET = 0.3  # initial scale of the potentials' weights; of 0.1, 0.3, 1 and 2 it trained best


class SparseMoELayer(nn.Module):
    """Sparsely gated mixture of experts (Shazeer et al. 2017), token-choice top-k routing.

    An expert is Linear–ReLU–Dropout–Linear. A token's output is the sum of its k best experts
    weighted by their softmax gate (not renormalised, so that the router learns at k = 1 too, as in
    the Switch Transformer). Tokens are sorted by expert; each expert runs once, on its own rows.

    Args:
        d_model: width D.
        num_experts: experts E.
        top_k: experts per token, 1 … E.
        dropout_p: dropout inside the experts.
        expert_hidden: hidden width of an expert, by default 2 D.

    Raises:
        ValueError: top_k is not in 1 … num_experts.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int = 4,
        top_k: int = 1,
        dropout_p: float = 0.1,
        *,
        expert_hidden: int | None = None,
    ):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} must lie in 1 … num_experts={num_experts}")
        self.d_model, self.num_experts, self.top_k = d_model, num_experts, top_k
        hidden = expert_hidden or 2 * d_model
        self.gating_network = nn.Linear(d_model, num_experts)
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(d_model, hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout_p),
                nn.Linear(hidden, d_model),
            )
            for _ in range(num_experts)
        )
        self.register_buffer("_expert_counts", torch.zeros(num_experts), persistent=False)
        self.load_balancing_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``(…, D)`` → ``(…, D)``. Leaves the batch's ``load_balancing_loss`` on the module."""
        tokens = x.reshape(-1, self.d_model)  # (T, D)
        gates = F.softmax(self.gating_network(tokens), dim=-1)  # (T, E)
        weight, expert = gates.topk(self.top_k, dim=-1)  # (T, k)
        order = expert.flatten().argsort(stable=True)  # (T·k,), grouped by expert
        counts = expert.flatten().bincount(minlength=self.num_experts)
        rows = tokens.index_select(0, order // self.top_k).split(counts.tolist())
        sorted_out = torch.cat([f(r) for f, r in zip(self.experts, rows, strict=True)])
        out = sorted_out.index_select(0, order.argsort()).view(-1, self.top_k, self.d_model)
        out = torch.einsum("tkd,tk->td", out, weight)
        self._record(gates, counts)
        return out.view_as(x)

    def _record(self, gates: Tensor, counts: Tensor) -> None:
        # Switch Transformer (Fedus et al. 2022), eq. 4: E Σ_e f_e P_e, at least 1 when balanced.
        with torch.no_grad():
            self._expert_counts += counts
            share = counts / counts.sum().clamp_min(1)
        self.load_balancing_loss = None
        if torch.is_grad_enabled() and gates.shape[0]:
            self.load_balancing_loss = self.num_experts * (share * gates.mean(dim=0)).sum()

    def expert_utilisation(self) -> Tensor:
        """Share of routed tokens per expert ``(E,)`` since the last reset; sums to 1."""
        return self._expert_counts / self._expert_counts.sum().clamp_min(1)

    def reset_expert_utilisation(self) -> None:
        self._expert_counts.zero_()


class MoEResNetBKLayer(nn.Module):
    """BK-Core mixing over positions, then sparse experts.

    From the normalised input u ``(B, N, D)``: potentials v = W_v u ``(B, N, H)``, resolvent features
    ``(B, N, 2H)``, their projection m to D, and ``m·s + experts(u + m·s)`` with a learned scale s.

    Args:
        d_model, num_experts, top_k, dropout_p, expert_hidden: see :class:`SparseMoELayer`.
        n_seq: longest sequence.
        bk_heads: potentials per token H.
        causal: see :class:`earlyexit.bk_core.BKCore`.
    """

    def __init__(
        self,
        d_model: int,
        n_seq: int,
        num_experts: int = 4,
        top_k: int = 1,
        dropout_p: float = 0.1,
        *,
        bk_heads: int = 16,
        causal: bool = True,
        expert_hidden: int | None = None,
    ):
        super().__init__()
        self.n_seq = n_seq
        self.moe = SparseMoELayer(
            d_model, num_experts, top_k, dropout_p, expert_hidden=expert_hidden
        )
        self.v_proj = nn.Linear(d_model, bk_heads)
        self.bk_core = BKCore(bk_heads, causal=causal)
        self.output_proj = nn.Linear(2 * bk_heads, d_model)
        self.bk_scale = nn.Parameter(torch.ones(()))
        # The band |α| < 2|t| is where the past matters: spread the heads over it. In one dimension
        # disorder localises (Anderson 1958): noisy potentials forget, so they start quiet.
        with torch.no_grad():
            self.v_proj.weight.mul_(QUIET)
            self.v_proj.bias.copy_(2 * self.bk_core.t + torch.linspace(-1.5, 1.5, bk_heads))

    def potentials(self, u: Tensor) -> Tensor:
        """``(…, D)`` → v ``(…, H)``: all that a token hands to the recursion."""
        return self.v_proj(u)

    def transform(self, u: Tensor, features: Tensor) -> Tensor:
        """Update of the residual stream from u ``(…, D)`` and BK features ``(…, 2H)``."""
        project, scale = self.output_proj, self.bk_scale  # scaling weights is cheaper than states
        mixed = F.linear(features, scale * project.weight, scale * project.bias)
        return mixed + self.moe(u + mixed)

    def forward(self, u: Tensor) -> Tensor:
        """``(B, N, D)`` → ``(B, N, D)``."""
        return self.transform(u, self.bk_core(self.potentials(u)))


class ExitHead(nn.Module):
    """An exit classifier: features ``(…, D)`` cheap, logits ``(…, V)`` dear.

    ``exit_head="full"``: LayerNorm and its own Linear(D, V), as in the original.
    ``exit_head="translator"``: a residual affine map (Belrose et al. 2023, tuned lens, eq. 4), the
    LayerNorm, and an unembedding borrowed from the model. The last layer's head has no translator.

    Args:
        d_model: width D.
        unembedding: features to logits, owned (``borrowed=False``) or borrowed from the model.
        translate: put a translator before the LayerNorm.
    """

    def __init__(self, d_model: int, unembedding: Unembedding, *, borrowed: bool, translate: bool):
        super().__init__()
        self.translator = nn.Linear(d_model, d_model) if translate else None
        if self.translator is not None:  # starts as the identity: h + 0
            nn.init.zeros_(self.translator.weight)
            nn.init.zeros_(self.translator.bias)
        self.layer_norm = nn.LayerNorm(d_model)
        self.linear = None if borrowed else unembedding
        self._borrowed = (unembedding,) if borrowed else ()  # a tuple hides it from state_dict

    @property
    def unembedding(self) -> Unembedding:
        return self._borrowed[0] if self._borrowed else self.linear

    def features(self, h: Tensor) -> Tensor:
        """What the unembedding reads, ``(…, D)``."""
        if self.translator is not None:
            h = h + self.translator(h)
        return self.layer_norm(h)

    def forward(self, h: Tensor) -> Tensor:
        """Hidden state ``(…, D)`` → logits ``(…, V)``."""
        return self.unembedding(self.features(h))


class EarlyExitResNetBKBlock(nn.Module):
    """LayerNorm → MoEResNetBKLayer → residual → exit classifier.

    Args:
        d_model, n_seq, num_experts, top_k, dropout_p, bk_heads, causal, expert_hidden: see
            :class:`MoEResNetBKLayer`.
        vocab_size: words V.
        exit_classifier: the head to use; by default an own LayerNorm + Linear(D, V).
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
        bk_heads: int = 16,
        causal: bool = True,
        expert_hidden: int | None = None,
        exit_classifier: ExitHead | None = None,
    ):
        super().__init__()
        self.layer_norm = nn.LayerNorm(d_model)
        self.bk_layer = MoEResNetBKLayer(
            d_model,
            n_seq,
            num_experts,
            top_k,
            dropout_p,
            bk_heads=bk_heads,
            causal=causal,
            expert_hidden=expert_hidden,
        )
        self.exit_classifier = exit_classifier or ExitHead(
            d_model, LinearUnembedding(d_model, vocab_size), borrowed=False, translate=False
        )

    def hidden(self, h: Tensor) -> Tensor:
        """The block without its exit: ``(B, N, D)`` → ``(B, N, D)``."""
        return h + self.bk_layer(self.layer_norm(h))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, N, D)`` → the output ``(B, N, D)`` and the exit's logits ``(B, N, V)``."""
        output = self.hidden(h)
        return output, self.exit_classifier(output)
