"""A block of a ResNet-BK language model mixes positions, applies experts, and has an exit.

It computes ``h + m + experts(LN(h) + m)``: mixing carries the past to a token as m, and sparse experts
transform it. What an exited token still hands to deeper layers is its contribution, at most one
product of LN(h), in which the experts have no part: for BK-Core potentials and values,
O(D · H (1 + P)) a layer.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from earlyexit.nn.config import ModelConfig
from earlyexit.nn.heads import ExitHead
from earlyexit.nn.mixing import MIXINGS
from earlyexit.nn.moe import SparseMoELayer
from earlyexit.nn.unembedding import LinearUnembedding


class MoEResNetBKLayer(nn.Module):
    """This layer mixes positions, by BK-Core unless another mixing is named, and applies experts.

    From the normalised input u ``(B, N, D)`` it makes what each token hands on ``(B, N, K)``, of that
    what each takes from the past ``(B·N, M)``, and reads it as m; it returns ``m + experts(u + m)``. See
    :mod:`earlyexit.nn.mixing`.

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
        self.d_model, self.n_seq = d_model, n_seq
        self.moe = SparseMoELayer(
            d_model, num_experts, top_k, dropout_p, expert_hidden=config.expert_hidden
        )
        self.mixing = MIXINGS[config.mixing](config)

    @property
    def contribution(self) -> Callable[[Tensor], Tensor]:
        """Return what makes all that a token hands to those after it, ``(…, D)`` → ``(…, K)``."""
        return self.mixing.contribution

    def mix(self, u: Tensor, given: Tensor, rows: Tensor | None) -> Tensor:
        """Return what running tokens take from the contributions of all, ``(A, M)``."""
        return self.mixing.mix(u, given, rows)

    def step(self, u: Tensor, given: Tensor, memory) -> tuple[Tensor, object]:
        """Do :meth:`mix` for one position, from a memory of those before."""
        return self.mixing.step(u, given, memory)

    def transform(self, u: Tensor, mixed: Tensor) -> Tensor:
        """Return the update of the residual stream ``(…, D)`` from u and what was mixed ``(…, M)``."""
        m = self.mixing.read(u, mixed)
        return m + self.moe(u + m)

    def forward(self, u: Tensor) -> Tensor:
        """Return the update of the residual stream from u, both ``(B, N, D)``."""
        flat = u.flatten(0, 1)
        mixed = self.mix(flat, self.contribution(u), None)
        return self.transform(flat, mixed).view_as(u)


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
