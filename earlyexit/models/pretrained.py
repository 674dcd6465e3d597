"""A Hugging Face decoder is run with exits: its own layer modules, its weights as they are.

A layer of the contract is here a *stage*: as many of the decoder's layers, one after another, as lie
between two exits. Stages are of one length, so layers saved are counted right in units of stages, and
a trace or a gate costs something at the exits alone.

A stage takes states and gives states, so what a token hands to those after it is its state, of which
each layer makes keys and values by itself, and the number of the stage, ``LEFT`` if the token has left.
What deeper layers read of one that has, ``left_behind`` says:

* ``"mapped"``: keys and values of a state that affine *shortcuts* carry on, one for each stage that the
  token does not run (Yom Din et al. 2023, §3);
* ``"copied"``: of the state in which it left (Schuster et al. 2022, CALM, §3.2);
* ``"zeroed"``: zeros, a control that is known to be bad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.checked import Checked, Count
from earlyexit.corpus.windows import check_whole, checked_ids, checked_targets
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.operations import LAYER_NORM, Operations
from earlyexit.models.decoder_layers import Attending, call_layer, keys_and_values
from earlyexit.nn.cross_entropy import CHUNK_ELEMENTS, precise
from earlyexit.nn.gates import ExitGates
from earlyexit.nn.heads import ExitHead
from earlyexit.nn.unembedding import LinearUnembedding, nll_of_logits

ROWS = 64  # of logits that are made at once, at least
LEFT = -1.0  # in place of the number of a stage
Way = Literal["mapped", "copied", "zeroed"]
Cache = list[tuple[Tensor, Tensor]]  # keys and values (B, H, positions, d) of each layer of a stage


@dataclass(frozen=True)
class PretrainedConfig(Checked):
    """What decides how a decoder is run with exits.

    Attributes:
        family: its type in transformers.
        n_layers: stages L, with an exit after each; stage_layers: layers of the decoder in a stage.
        d_model, vocab_size: its sizes; n_seq: longest sequence.
        left_behind: what deeper layers read of a token that has left.
    """

    family: str
    n_layers: Count
    stage_layers: Count
    d_model: Count
    vocab_size: Count
    n_seq: Count
    left_behind: Way = "mapped"


class BorrowedUnembedding(LinearUnembedding):
    """The decoder's output layer, whose weights stay where they are."""

    def __init__(self, linear: nn.Module):
        nn.Module.__init__(self)
        self._linear = (linear,)  # a tuple hides it from state_dict
        self.out_features, self.in_features = linear.weight.shape

    @property
    def weight(self) -> Tensor:
        return self._linear[0].weight

    @property
    def bias(self) -> Tensor | None:
        return self._linear[0].bias

    def _matrix(self) -> tuple[Tensor, Tensor | None]:
        return precise(self.weight), None if self.bias is None else precise(self.bias)

    def chunks(self, features: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield logits ``(rows, V)`` of features ``(T, D)``, of at least ``ROWS`` rows at once.

        Of a large vocabulary, reading the weights for a few rows takes longer than the products.
        """
        features, matrix = precise(features), self._matrix()
        rows = max(ROWS, CHUNK_ELEMENTS // self.out_features)
        for start in range(0, max(1, len(features)), rows):
            part = slice(start, min(start + rows, len(features)))
            yield part, F.linear(features[part], *matrix)

    @torch.no_grad()
    def nll(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the NLL ``(T,)`` of features ``(T, D)``, 0 where targets ``(T,)`` are ``IGNORE``."""
        targets = checked_targets(targets, self.out_features)
        parts = [nll_of_logits(logits, targets[part]) for part, logits in self.chunks(features)]
        return torch.cat(parts)


class StateGates(ExitGates):
    """Gates that read a state of any scale: they divide it by its root mean square first."""

    def forward(self, layer: int, state: Tensor) -> Tensor:
        """Return (log KL, logit of agreement) ``(T, 2)`` of states ``(T, D)`` after ``layer``."""
        return super().forward(layer, F.rms_norm(state, state.shape[-1:]))


class SharedStart:
    """States of a few batches after the stages that all of their tokens run, which no policy changes.

    Args:
        batches: how many are kept: the first ones, and the one that is run.

    Attributes:
        after: of the batch that is run, stage → states of all tokens after it ``(B·N, D)``.
    """

    def __init__(self, batches: int):
        self.batches = batches
        self.kept: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
        self.after: dict[int, Tensor] = {}

    def begin(self, x: Tensor) -> None:
        """Go to the batch of these token ids, which is known by being the same tensor."""
        if id(x) not in self.kept:
            if len(self.kept) == self.batches:
                self.kept.popitem()
            self.kept[id(x)] = x, {}
        self.after = self.kept[id(x)][1]


class PretrainedModel(EarlyExitModel):
    """A frozen decoder with an exit after every stage; :func:`attach` makes one.

    Args:
        decoder: a Hugging Face model for causal language modelling.
        tokenizer: what made its ids, or None.

    Attributes:
        eos_id: the id that stands before a document, 0 without a tokenizer.
    """

    can_step = True
    _shared: SharedStart | None = None

    def __init__(self, decoder: nn.Module, config: PretrainedConfig, tokenizer: Any = None):
        super().__init__()
        self.config, self.decoder, self.tokenizer = config, decoder, tokenizer
        self.n_layers, self.n_seq = config.n_layers, config.n_seq
        self.vocab_size = config.vocab_size
        self.eos_id = 0 if tokenizer is None else end_id(tokenizer)
        base, like = decoder.base_model, next(decoder.parameters())
        names = ("norm", "final_layer_norm", "ln_f")
        norm = next(getattr(base, name) for name in names if hasattr(base, name))
        unembedding = BorrowedUnembedding(decoder.get_output_embeddings())
        self.heads = nn.ModuleList()
        for layer in range(config.n_layers):
            last = layer == config.n_layers - 1
            head = ExitHead(config.d_model, unembedding, borrowed=True, translate=not last)
            head.layer_norm = norm
            self.heads.append(head.to(like))
        # One over each stage but the first and the last, the identity until it is fitted.
        self.shortcuts = nn.ModuleList(
            nn.Linear(config.d_model, config.d_model).to(like) for _ in range(config.n_layers - 2)
        )
        for parameter in self.shortcuts.parameters():
            nn.init.zeros_(parameter)
        self.gates = StateGates(config.n_layers, config.d_model).to(like.device)
        for parameter in self.gates.parameters():  # so that equal models have equal fingerprints
            nn.init.zeros_(parameter)
        self.start_statistics()

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder's own layers."""
        base = self.decoder.base_model
        return base.layers if hasattr(base, "layers") else base.h

    @contextmanager
    def shared_start(self, batches: int = 1) -> Iterator[None]:
        """Run, inside, what all tokens of a batch run once for all policies of that batch.

        Until its first token leaves, the states are those of full depth. Nothing may be timed inside.
        """
        self._shared = SharedStart(batches)
        try:
            yield
        finally:
            self._shared = None

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
        if (end := start + x.shape[1]) > self.n_seq:
            raise ValueError(
                f"sequence of {end} tokens is longer than n_seq={self.n_seq}: cut it, or attach with a"
                " larger n_seq"
            )
        if self._shared:
            self._shared.begin(x)
        h = self.decoder.get_input_embeddings()(checked_ids(x, self.vocab_size))
        learned = getattr(self.decoder.base_model, "wpe", None)
        return h if learned is None else h + learned.weight[start:end]

    def normed(self, layer: int, h: Tensor) -> Tensor:
        """Return the states: a stage reads them as they are, and so do :class:`StateGates`."""
        return h

    def contribution(self, layer: int, u: Tensor) -> Tensor:
        """Return states and the number of the stage ``(…, D + 1)``."""
        return F.pad(u, (0, 1), value=layer)

    def handed_on(self, now: Tensor, then: Tensor) -> Tensor:
        """Return frozen states, carried from the stage of ``then`` to that of ``now``, and ``LEFT``."""
        states, last_run = now[..., :-1], then[..., -1:]
        for stage in range(1, int(now.flatten()[-1])):
            states = torch.where(last_run < stage, self._carried(stage, states), states)
        return F.pad(states, (0, 1), value=LEFT)

    def propagation(self) -> Callable[[Tensor, Tensor, int], Tensor]:
        """Return a function that hands on frozen states; stages make keys and values of them."""

        def handed_on(hidden: Tensor, then: Tensor, first: int) -> Tensor:
            states = [hidden]
            for stage in range(first, self.n_layers - 1):
                states.append(self._carried(stage, states[-1]))
            return F.pad(torch.stack(states, dim=1), (0, 1), value=LEFT)

        return handed_on

    def _carried(self, stage: int, states: Tensor) -> Tensor:
        """Return what a shortcut makes of states ``(…, D)``, if shortcuts are used."""
        if self.config.left_behind != "mapped":
            return states
        return states + self.shortcuts[stage - 1](states)

    def mix(self, layer: int, u: Tensor, given: Tensor, rows: Tensor | None) -> Tensor:
        """Return the states ``(A, D)`` of the running tokens after the stage."""
        states, left = given.flatten(0, 1)[:, :-1], given[..., -1].flatten() == LEFT
        if rows is None:
            u, left = states, left if left.any() else None
        kept = self._shared.after if self._shared and rows is None and left is None else {}
        if layer not in kept:
            kept[layer] = self._stage(layer, u, states, left, rows, given.shape[:2], None)[0]
        return kept[layer]

    def update(self, layer: int, h: Tensor, u: Tensor, mixed: Tensor) -> Tensor:
        return mixed

    def step(
        self, layer: int, u: Tensor, given: Tensor, memory: Cache | None
    ) -> tuple[Tensor, Cache]:
        """Do :meth:`mix` for one position; tokens that have left only add keys and values."""
        states, left = given[:, :-1], given[:, -1] == LEFT
        rows = (~left).nonzero().squeeze(1)
        whole_batch = len(rows) == len(left)
        new, memory = self._stage(
            layer, states[rows], states, None if whole_batch else left,
            None if whole_batch else rows, (len(states), 1), memory or [],
        )  # fmt: skip
        return states.index_copy(0, rows, new), memory

    def head(self, layer: int) -> ExitHead:
        return self.heads[layer]

    def operations(self) -> Operations:
        """Return what a stage executes: its products, and keys and values of tokens that have left."""
        c, (attention, feed_forward, handed) = self.config, _products(self.blocks[0])
        experts = getattr(self.decoder.config, "num_local_experts", 0)
        if experts:
            share = self.decoder.config.num_experts_per_tok / experts
            feed_forward *= share  # the router's few columns with them
        heads = self.decoder.config.num_attention_heads
        width = heads * (getattr(self.decoder.config, "head_dim", None) or c.d_model // heads)
        shortcut = {"shortcut": 2 * c.d_model**2} if c.left_behind == "mapped" else {}
        counted = Operations.plain(
            n_layers=c.n_layers,
            d_model=c.d_model,
            vocab_size=c.vocab_size,
            block={
                "projections": 2 * c.stage_layers * attention,
                "attention": 2 * c.stage_layers * width * (c.n_seq + 1),  # half of them are seen
                "feed-forward": 2 * c.stage_layers * feed_forward,
            },
            propagated={"keys and values": 2 * c.stage_layers * handed} | shortcut,
            translator=2 * c.d_model**2,
        )
        return replace(counted, gate=counted.gate + LAYER_NORM * c.d_model)

    # ------------------------------------------------------------------ one stage

    def _stage(self, layer, h, states, left, rows, shape, cache: Cache | None):
        """Run the decoder's layers of a stage.

        Args:
            h: states of the running tokens ``(A, D)``; states: of all tokens ``(B·N, D)``.
            left: which of all have left ``(B·N,)``; None if none has.
            rows: which are running ``(A,)``; None if all are run, also those that have left: their
                states are put back after every layer.
            cache: keys and values of earlier positions; None keeps none.

        Returns:
            New states ``(A, D)``, and the cache with these positions.
        """
        past = cache[0][0].shape[2] if cache else 0
        everywhere = torch.arange(len(states), device=h.device)
        others = everywhere if rows is None else left.nonzero().squeeze(1)
        attending = Attending(tuple(shape), rows, others, past)
        if left is not None and self.config.left_behind == "zeroed":
            attending.blank = left
        positions, made = everywhere % shape[1] + past, []
        turned = self._rotary(h, positions if rows is None else positions[rows])
        if rows is not None:
            frozen, turned_others = (
                states.index_select(0, others),
                self._rotary(h, positions[others]),
            )
        first = layer * self.config.stage_layers
        for index, block in enumerate(self.blocks[first : first + self.config.stage_layers]):
            attending.cache = cache[index] if cache else None
            if rows is not None:
                attending.left = keys_and_values(block, frozen, turned_others)
            if rows is None or len(rows):
                new = call_layer(block, h, turned, attending)
                put_back = rows is None and left is not None
                h = torch.where(left[:, None], h, new) if put_back else new
            else:  # nobody runs, but later positions will read what these hand on
                attending.keep(*(t[:0] for t in attending.left))
            made.append(attending.cache)
        return h, made

    def _rotary(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return what turns queries and keys at ``positions`` ``(A,)``, if the family turns them."""
        rotary = getattr(self.decoder.base_model, "rotary_emb", None)
        return None if rotary is None else rotary(like, positions[None])


def _products(block: nn.Module) -> tuple[float, float, float]:
    """Return the weights in a layer's products: of attention, of the rest, and up to the keys."""
    (attention,) = (m for m in block.modules() if type(m).__name__.endswith("Attention"))
    matrices = {name: p.numel() for name, p in attention.named_parameters() if p.dim() > 1}
    last = ("o_proj", "c_proj", "dense")
    up_to_keys = sum(n for name, n in matrices.items() if name.split(".")[0] not in last)
    everything = sum(p.numel() for p in block.parameters() if p.dim() > 1)
    inside = sum(matrices.values())
    return float(inside), float(everything - inside), float(up_to_keys)


def end_id(tokenizer: Any) -> int:
    """Return the id that stands before a document and pads a batch."""
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        if (found := getattr(tokenizer, name, None)) is not None:
            return int(found)
    raise ValueError(
        "the tokenizer has no end, start or padding token, of which one must stand before a document:"
        " set tokenizer.eos_token"
    )
