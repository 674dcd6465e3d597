"""The ResNet-BK language model has causal resolvent mixing, sparse experts and exits at all layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.corpus.windows import check_whole, checked_ids
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.clock import marker
from earlyexit.exits.operations import Operations
from earlyexit.models.operations import operations
from earlyexit.nn.block import EarlyExitResNetBKBlock
from earlyexit.nn.config import ModelConfig
from earlyexit.nn.gates import ExitGates
from earlyexit.nn.heads import ExitHead
from earlyexit.nn.mixing import Contribution
from earlyexit.nn.record import BatchRecord
from earlyexit.nn.unembedding import AdaptiveUnembedding, LinearUnembedding, Unembedding


def new_unembedding(config: ModelConfig) -> Unembedding:
    """Return an output head with new weights."""
    if config.output_head == "adaptive":
        return AdaptiveUnembedding(config.d_model, config.vocab_size)
    unembedding = LinearUnembedding(config.d_model, config.vocab_size)
    nn.init.zeros_(unembedding.bias)
    return unembedding


class EarlyExitLanguageModel(EarlyExitModel):
    """This is a ResNet-BK language model with an exit after every layer.

    Its arguments are the fields of :class:`earlyexit.nn.config.ModelConfig`, in that order.

    Raises:
        ValueError: the configuration refuses a value.
    """

    config_type = ModelConfig

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.__signature__ = inspect.signature(cls.config_type)

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.config = c = self.config_type(*args, **kwargs)
        self.vocab_size, self.d_model = c.vocab_size, c.d_model
        self.n_layers, self.n_seq = c.n_layers, c.n_seq
        self.can_step = c.causal
        self._fold_of: tuple[list, tuple[Tensor, Tensor]] | None = None

        self.token_embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.position_embedding = nn.Embedding(c.n_seq, c.d_model)
        nn.init.normal_(self.token_embedding.weight, std=c.d_model**-0.5)
        nn.init.normal_(self.position_embedding.weight, std=0.1 * c.d_model**-0.5)

        unembedding = new_unembedding(c)
        if c.tie_embeddings:
            unembedding.weight = self.token_embedding.weight
        self.blocks = nn.ModuleList()
        for layer in range(c.n_layers):
            last = layer == c.n_layers - 1
            head = None  # a block makes its own full head
            if last or c.exit_head != "full":
                own = last or c.exit_head == "own"
                words = unembedding if last or not own else new_unembedding(c)
                head = ExitHead(c.d_model, words, borrowed=not own, translate=not last)
            self.blocks.append(EarlyExitResNetBKBlock(**c.base(), exit_classifier=head))
        if c.gate_hidden is not None:
            self.gates = ExitGates(c.n_layers, c.d_model, c.gate_hidden)
        self.start_statistics(c.confidence_threshold)

    @classmethod
    def from_config(cls, config: ModelConfig) -> EarlyExitLanguageModel:
        """Build a model with new weights from its configuration."""
        return cls(**asdict(config))

    # ------------------------------------------------------------------ the contract

    def embed(self, x: Tensor, start: int = 0) -> Tensor:
        """Return the states ``(B, N, D)`` of token ids ``(B, N)`` at positions ``start`` …

        Raises:
            TypeError: they are no tensor of whole numbers.
            ValueError: ids are not two-dimensional, empty, beyond n_seq, or outside 0 … V − 1.
        """
        check_whole(x, "token ids")
        if x.dim() != 2 or x.numel() == 0:
            raise ValueError(f"expected token ids (B, N) with B, N ≥ 1, got shape {tuple(x.shape)}")
        end = start + x.shape[1]
        if end > self.n_seq:
            raise ValueError(
                f"sequence of {end} tokens is longer than n_seq={self.n_seq}: cut it, or build"
                " the model with a larger n_seq"
            )
        x = checked_ids(x, self.vocab_size)
        return self.token_embedding(x) + self.position_embedding.weight[start:end]

    def normed(self, layer: int, h: Tensor) -> Tensor:
        return self.blocks[layer].layer_norm(h)

    def contribution(self, layer: int, u: Tensor) -> Tensor:
        """Return potentials and values ``(…, H + H·P)``, or what another mixing hands on."""
        return self.blocks[layer].bk_layer.contribution(u)

    def mix(self, layer: int, u: Tensor, given: Tensor, rows: Tensor | None) -> Tensor:
        """Return what running tokens take from the contributions of all ``(A, M)``."""
        mark = marker()
        mixed = self.blocks[layer].bk_layer.mix(u, given, rows)
        mark("blocks", "propagation", len(u) / given.shape[:2].numel())  # it passes over all tokens
        return mixed

    def update(self, layer: int, h: Tensor, u: Tensor, mixed: Tensor) -> Tensor:
        return h + self.blocks[layer].bk_layer.transform(u, mixed)

    def step(self, layer: int, u: Tensor, given: Tensor, memory) -> tuple[Tensor, Tensor]:
        return self.blocks[layer].bk_layer.step(u, given, memory)

    def head(self, layer: int) -> ExitHead:
        return self.blocks[layer].exit_classifier

    def operations(self, **changes) -> Operations:
        """Return :func:`earlyexit.models.operations.operations`, with the changes of a kind of model."""
        return operations(self.config, **changes)

    def handed_on(self, now: Tensor, then: Tensor) -> Tensor:
        if self.config.left_behind == "kept":
            return then
        if self.config.left_behind == "potentials":
            heads, values = self.config.bk_heads, self.config.bk_heads * self.config.bk_values
            potentials, b, others = now.tensor_split([heads, heads + values], dim=-1)
            return torch.cat([potentials, torch.zeros_like(b), others], dim=-1)
        return now

    def auxiliary_loss(self, record: BatchRecord) -> Tensor | float:
        return sum(record.notes["imbalance"]) / self.n_layers

    def propagation(self) -> Callable[[Tensor, Tensor, int], Tensor]:
        """Return a function that makes what exited tokens hand on by one product for all layers.

        Of a frozen state h, layer l makes W_l LN_l(h) + b_l. The layers' norms differ by their affine
        maps alone, LN_l(h) = γ_l ⊙ z + β_l, so h is standardised to z once, and one product with the
        joined matrices W_l diag(γ_l) gives the contributions to all deeper layers. Of those, only what
        is handed on is made.
        """
        left_behind = self.config.left_behind
        if left_behind == "kept":
            return lambda hidden, then, first: then[:, None].expand(-1, self.n_layers - first, -1)
        norms = [block.layer_norm for block in self.blocks]
        products = [block.bk_layer.contribution for block in self.blocks]
        plain = all(isinstance(product, Contribution) for product in products)
        if not plain or any(norm.eps != norms[0].eps for norm in norms):
            return super().propagation()
        made = self.config.bk_heads if left_behind == "potentials" else products[0].out_features
        folded = None

        def handed_on(hidden: Tensor, then: Tensor, first: int) -> Tensor:
            nonlocal folded
            folded = folded or self._folded(norms, products)
            weight, bias = (part[first:, :made].flatten(0, 1) for part in folded)
            z = F.layer_norm(hidden, hidden.shape[-1:], eps=norms[0].eps)
            given = F.linear(z, weight, bias).unflatten(1, (-1, made))
            others = then.shape[-1] - made
            return F.pad(given, (0, others)) if others else given

        return handed_on

    def _folded(
        self, norms: list[nn.LayerNorm], products: list[Contribution]
    ) -> tuple[Tensor, Tensor]:
        """Return :func:`_fold`, made again only where a weight was written since: it takes a while."""
        if torch.is_grad_enabled():
            return _fold(norms, products)
        read = [t for norm in norms for t in (norm.weight, norm.bias)]
        read += [t for p in products for t in (p.weight, p.bias, p.start, p.unit)]
        written = [(t.data_ptr(), t._version, t.dtype) for t in read]
        if self._fold_of is None or self._fold_of[0] != written:
            self._fold_of = written, _fold(norms, products)
        return self._fold_of[1]


EarlyExitLanguageModel.__signature__ = inspect.signature(ModelConfig)


def _fold(norms: list[nn.LayerNorm], products: list[Contribution]) -> tuple[Tensor, Tensor]:
    """Return matrices ``(L, K, D)`` and offsets ``(L, K)`` that contribute from standardised z."""
    affine = [product.affine() for product in products]
    weight, bias = (torch.stack(parts) for parts in zip(*affine, strict=True))
    scale = torch.stack([norm.weight for norm in norms])
    shift = torch.stack([norm.bias for norm in norms])
    return weight * scale[:, None], bias + (weight * shift[:, None]).sum(dim=-1)
