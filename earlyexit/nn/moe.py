"""Sparse experts transform a token by the few of them that a router chooses."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.checked import real, whole
from earlyexit.nn.record import BatchRecord, listening


class SparseMoELayer(nn.Module):
    """This is a mixture of experts (Shazeer et al. 2017) with token-choice top-k routing.

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
        TypeError: a size is no whole number.
        ValueError: top_k is not in 1 … num_experts, or another value out of range.
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
        sizes = {"d_model": d_model, "num_experts": num_experts, "top_k": top_k}
        if expert_hidden is not None:
            sizes["expert_hidden"] = expert_hidden
        for name, size in sizes.items():
            whole(name, size, 1)
        real("dropout_p", dropout_p, least=0, below=1)
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

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, ``(…, D)`` → ``(…, D)``.

        It notes ``routed``, the tokens per expert ``(E,)``, and ``imbalance``, the loss that is least
        if all experts get as many.

        Raises:
            ValueError: the last dimension is not D.
        """
        if x.shape[-1:] != (self.d_model,):
            raise ValueError(
                f"states {tuple(x.shape)}: their last dimension must be {self.d_model}"
            )
        tokens = x.reshape(-1, self.d_model)  # (T, D)
        gates = F.softmax(self.gating_network(tokens), dim=-1)  # (T, E)
        weight, expert = gates.topk(self.top_k, dim=-1)  # (T, k)
        order = expert.flatten().argsort(stable=True)  # (T·k,), grouped by expert
        counts = expert.flatten().bincount(minlength=self.num_experts)
        rows = tokens.index_select(0, order // self.top_k).split(counts.tolist())
        sorted_out = torch.cat([f(r) for f, r in zip(self.experts, rows, strict=True)])
        out = sorted_out.index_select(0, order.argsort()).view(-1, self.top_k, self.d_model)
        out = torch.einsum("tkd,tk->td", out, weight)
        if (record := listening()) is not None:
            self._tell(record, gates, expert)
        return out.view_as(x)

    def _tell(self, record: BatchRecord, gates: Tensor, expert: Tensor) -> None:
        gates, expert = record.counted(gates), record.counted(expert)
        counts = expert.flatten().bincount(minlength=self.num_experts)
        record.notes["routed"].append(counts)
        # Switch Transformer (Fedus et al. 2022), eq. 4: E Σ_e f_e P_e, at least 1 when balanced.
        share, mean = counts / counts.sum().clamp_min(1), gates.sum(dim=0) / max(1, len(gates))
        record.notes["imbalance"].append(self.num_experts * (share * mean).sum())
