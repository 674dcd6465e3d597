"""A Hugging Face decoder is run with exits: its own layer modules, its weights as they are.

A layer of the contract is here a *stage*: as many of the decoder's layers, one after another, as lie
between two exits. Stages are of one length, so layers saved are counted right in units of stages, and
a trace or a gate costs something at the exits alone.

A stage takes states and gives states, so what a token hands to those after it is its state, of which
each layer makes keys and values by itself, and a flag that says whether the token has left. Of one that
has, every deeper layer reads keys and values of the state in which it left (Schuster et al. 2022, CALM,
§3.2); ``left_behind="zeroed"`` puts zeros there instead, a control that is known to be bad.

transformers calls a function of this module for attention, which tells apart running tokens and others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.checked import Checked, Count, brief, whole
from earlyexit.corpus.windows import check_whole, checked_ids, checked_targets
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.operations import LAYER_NORM, Operations
from earlyexit.nn.cross_entropy import CHUNK_ELEMENTS, precise
from earlyexit.nn.gates import ExitGates
from earlyexit.nn.heads import ExitHead
from earlyexit.nn.unembedding import LinearUnembedding, nll_of_logits

# Model types whose layers are known to be called as they are here; the tests make one of each.
FAMILIES = (
    *("gpt2", "gpt_neox", "llama", "mistral", "mixtral"),
    *("olmo2", "phi3", "qwen2", "qwen3", "smollm3"),
)
ATTENTION = "earlyexit"  # its name among the attention functions of transformers
MOST_EXITS, USUAL_LENGTH = 12, 512
ROWS = 64  # of logits that are made at once, at least
CHECKED_SHAPE = (2, 48)  # sequences and tokens on which full depth is compared with the model's own
TOLERANCE = 1e-3  # of logits, relative to the largest; families that are known differ by about 1e-6
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
    left_behind: Literal["copied", "zeroed"] = "copied"


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


class KeysMade(Exception):
    """Keys and values of tokens that have left are made; the rest of the layer is not run for them."""


class Attending:
    """The attention of running tokens to all tokens up to themselves, of the same sequence.

    Args:
        shape: sequences B and positions N of the batch.
        rows: which of the B·N tokens are running ``(A,)``, ascending; None if all are.
        others: the rest of the tokens ``(X,)``.
        past: positions before these that the cache holds.
    """

    def __init__(self, shape: tuple[int, int], rows: Tensor | None, others: Tensor, past: int):
        self.shape, self.rows, self.others, self.past = shape, rows, others, past
        self.slots = self.mask = self.blank = None
        self.left: tuple[Tensor, Tensor] | None = None  # keys and values of ``others`` (X, H, d)
        self.cache: tuple[Tensor, Tensor] | None = None  # of the layer that runs
        if rows is None:
            return
        # Queries are padded to the longest sequence of running tokens; nothing else is.
        counts = (rows // shape[1]).bincount(minlength=shape[0])
        self.width = int(counts.max())
        rank = (
            torch.arange(len(rows), device=rows.device)
            - (counts.cumsum(0) - counts)[rows // shape[1]]
        )
        self.slots = rows // shape[1] * self.width + rank
        seen = torch.zeros(shape[0] * self.width, dtype=torch.int64, device=rows.device)
        seen[self.slots] = past + rows % shape[1]
        positions = torch.arange(past + shape[1], device=rows.device)
        self.mask = positions <= seen.view(shape[0], 1, self.width, 1)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Return what the running tokens take ``(1, A, H, d)``; arguments are ``(1, H, A, d)``."""
        groups = query.shape[1] // key.shape[1]
        self.keep(*(t.squeeze(0).transpose(0, 1) for t in (key, value)))
        key, value = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in self.cache)
        query = query.squeeze(0).transpose(0, 1)  # (A, H, d)
        if self.slots is not None:
            padded = query.new_zeros(self.shape[0] * self.width, *query.shape[1:])
            query = padded.index_copy(0, self.slots, query)
        query = query.unflatten(0, (self.shape[0], -1)).transpose(1, 2)
        causal = self.mask is None and not self.past
        out = F.scaled_dot_product_attention(
            query, key, value, self.mask, is_causal=causal, scale=scale
        )
        out = out.transpose(1, 2).flatten(0, 1)
        return (out if self.slots is None else out.index_select(0, self.slots)).unsqueeze(0)

    def keep(self, key: Tensor, value: Tensor) -> None:
        """Join keys and values of the running tokens ``(A, H, d)`` to those of all in ``cache``."""
        self.cache = self._joined(key, 0), self._joined(value, 1)

    def _joined(self, made: Tensor, index: int) -> Tensor:
        """Return keys or values of all tokens so far ``(B, H, past + N, d)`` from ``(A, H, d)``."""
        if self.left is not None:
            joined = made.new_empty(self.shape[0] * self.shape[1], *made.shape[1:])
            joined = joined.index_copy(0, self.rows, made)
            made = joined.index_copy(0, self.others, self.left[index])
        if self.blank is not None:
            made = made.masked_fill(self.blank[:, None, None], 0)
        made = made.unflatten(0, self.shape).transpose(1, 2)
        return torch.cat([self.cache[index], made], dim=2) if self.past else made


class PretrainedModel(EarlyExitModel):
    """A frozen decoder with an exit after every stage; :func:`attach` makes one.

    Args:
        decoder: a Hugging Face model for causal language modelling.
        tokenizer: what made its ids, or None.

    Attributes:
        eos_id: the id that stands before a document, 0 without a tokenizer.
    """

    can_step = True

    def __init__(self, decoder: nn.Module, config: PretrainedConfig, tokenizer: Any = None):
        super().__init__()
        self.config, self.decoder, self.tokenizer = config, decoder, tokenizer
        self.n_layers, self.n_seq = config.n_layers, config.n_seq
        self.vocab_size = config.vocab_size
        self.eos_id = 0 if tokenizer is None else _end(tokenizer)
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
        self.gates = StateGates(config.n_layers, config.d_model).to(like.device)
        for parameter in self.gates.parameters():  # so that equal models have equal fingerprints
            nn.init.zeros_(parameter)
        self.start_statistics()

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder's own layers."""
        base = self.decoder.base_model
        return base.layers if hasattr(base, "layers") else base.h

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
        h = self.decoder.get_input_embeddings()(checked_ids(x, self.vocab_size))
        learned = getattr(self.decoder.base_model, "wpe", None)
        return h if learned is None else h + learned.weight[start:end]

    def normed(self, layer: int, h: Tensor) -> Tensor:
        """Return the states: a stage reads them as they are, and so do :class:`StateGates`."""
        return h

    def contribution(self, layer: int, u: Tensor) -> Tensor:
        """Return states and flags ``(…, D + 1)``; the flag 0 says that a token has not left."""
        return F.pad(u, (0, 1))

    def handed_on(self, now: Tensor, then: Tensor) -> Tensor:
        return F.pad(now[..., :-1], (0, 1), value=1.0)

    def propagation(self) -> Callable[[Tensor, Tensor, int], Tensor]:
        """Return a function that hands on frozen states; stages make keys and values of them."""

        def handed_on(hidden: Tensor, then: Tensor, first: int) -> Tensor:
            left = F.pad(hidden, (0, 1), value=1.0)
            return left[:, None].expand(-1, self.n_layers - first, -1)

        return handed_on

    def mix(self, layer: int, u: Tensor, given: Tensor, rows: Tensor | None) -> Tensor:
        """Return the states ``(A, D)`` of the running tokens after the stage."""
        states, left = given.flatten(0, 1)[:, :-1], given[..., -1].flatten() > 0
        if rows is None and not left.any():
            left = None
        return self._stage(layer, u, states, left, rows, given.shape[:2], None)[0]

    def update(self, layer: int, h: Tensor, u: Tensor, mixed: Tensor) -> Tensor:
        return mixed

    def step(
        self, layer: int, u: Tensor, given: Tensor, memory: Cache | None
    ) -> tuple[Tensor, Cache]:
        """Do :meth:`mix` for one position; tokens that have left only add keys and values."""
        states, left = given[:, :-1], given[:, -1] > 0
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
        counted = Operations.plain(
            n_layers=c.n_layers,
            d_model=c.d_model,
            vocab_size=c.vocab_size,
            block={
                "projections": 2 * c.stage_layers * attention,
                "attention": 2 * c.stage_layers * width * (c.n_seq + 1),  # half of them are seen
                "feed-forward": 2 * c.stage_layers * feed_forward,
            },
            propagated={"keys and values": 2 * c.stage_layers * handed},
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
                attending.left = _keys_and_values(block, frozen, turned_others)
            if rows is None or len(rows):
                new = _call(block, h, turned, attending)
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


def _call(block: nn.Module, h: Tensor, turned, attending: Callable) -> Tensor:
    """Call a layer of the decoder with states ``(A, D)`` of tokens of any sequence."""
    out = block(h[None], attention_mask=None, position_embeddings=turned, attending=attending)
    return (out[0] if isinstance(out, tuple) else out).squeeze(0)


def _keys_and_values(block: nn.Module, h: Tensor, turned) -> tuple[Tensor, Tensor]:
    """Return keys and values ``(X, H, d)`` that a layer makes of states ``(X, D)``."""
    try:
        _call(block, h, turned, _stop)
    except KeysMade as made:
        return tuple(t.squeeze(0).transpose(0, 1) for t in made.args)
    raise AssertionError("the layer did not call its attention")


def _stop(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    raise KeysMade(key, value)


def _products(block: nn.Module) -> tuple[float, float, float]:
    """Return the weights in a layer's products: of attention, of the rest, and up to the keys."""
    (attention,) = (m for m in block.modules() if type(m).__name__.endswith("Attention"))
    matrices = {name: p.numel() for name, p in attention.named_parameters() if p.dim() > 1}
    last = ("o_proj", "c_proj", "dense")
    up_to_keys = sum(n for name, n in matrices.items() if name.split(".")[0] not in last)
    everything = sum(p.numel() for p in block.parameters() if p.dim() > 1)
    inside = sum(matrices.values())
    return float(inside), float(everything - inside), float(up_to_keys)


# ---------------------------------------------------------------------- attach


def attach(
    model: nn.Module,
    tokenizer: Any = None,
    exits: int | None = None,
    *,
    n_seq: int | None = None,
    left_behind: Literal["copied", "zeroed"] = "copied",
) -> PretrainedModel:
    """Give exits to a Hugging Face decoder, whose weights stay as they are.

    The translators of its exits start as the identity, and its gates untrained: see
    :func:`earlyexit.training.translators.fit_translators` and
    :func:`earlyexit.training.gates.train_gates`. The decoder remains usable by itself; where it attends
    by another function than torch's own, it does by that from now on.

    Args:
        model: a model for causal language modelling of one of ``FAMILIES``.
        tokenizer: what made its ids; None, if ids are given by hand.
        exits: number of exits, the last layer's included; it divides the number of layers. None: the
            largest such number up to ``MOST_EXITS``.
        n_seq: longest sequence; None: 512, or fewer if the model has fewer positions.
        left_behind: see :class:`PretrainedConfig`.

    Raises:
        TypeError: it is no such model.
        ValueError: it is an encoder, of a family that is not known, or of half precision on a CPU; its
            attention slides over less than n_seq or is of another kind, or it has fewer positions;
            ``exits`` does not divide its layers; the tokenizer has no end; or full depth does not give
            the model's own logits.
    """
    config = _check_family(model)
    layers, positions = config.num_hidden_layers, config.max_position_embeddings
    n_seq = min(USUAL_LENGTH, positions) if n_seq is None else whole("n_seq", n_seq, 1)
    if n_seq > positions:
        raise ValueError(f"n_seq={n_seq}: the model has {positions} positions; give at most those")
    _check_attention(config, n_seq)
    if tokenizer is not None:
        _end(tokenizer)
    divisors = [n for n in range(1, layers + 1) if layers % n == 0]
    exits = max(n for n in divisors if n <= MOST_EXITS) if exits is None else exits
    if whole("exits", exits, 1) not in divisors:
        raise ValueError(
            f"exits={exits} does not divide the model's {layers} layers: choose one of"
            f" {', '.join(map(str, divisors))}"
        )
    sizes = (config.hidden_size, config.vocab_size, n_seq)
    ours = PretrainedConfig(
        config.model_type, exits, layers // exits, *sizes, left_behind=left_behind
    )
    x = torch.randint(
        config.vocab_size, (CHECKED_SHAPE[0], min(n_seq, CHECKED_SHAPE[1])),
        generator=torch.Generator().manual_seed(0),
    ).to(next(model.parameters()).device)  # fmt: skip
    usual = config._attn_implementation
    model.eval()
    try:
        with torch.no_grad():
            own = model(x).logits
            _register()
            config._attn_implementation = ATTENTION
            attached = PretrainedModel(model, ours, tokenizer).eval()
            gap = (attached(x) - own).abs().max().item()
        if not gap <= TOLERANCE * max(1.0, own.abs().max().item()):
            raise ValueError(
                f"full depth differs from the model's own logits by {gap:.2g}: this {config.model_type}"
                " scales, caps or mixes something that is not known here, and cannot be given exits"
            )
    except BaseException:
        config._attn_implementation = usual
        raise
    return attached


def _check_family(model: object) -> Any:
    """Return the configuration of a decoder of a family that is known."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if not isinstance(model, nn.Module) or kind is None:
        raise TypeError(
            f"{brief(model)} is no Hugging Face model: give AutoModelForCausalLM.from_pretrained(…);"
            " pip install 'earlyexit[hf]' brings transformers"
        )
    known = ", ".join(FAMILIES)
    if (
        config.is_encoder_decoder
        or model.get_output_embeddings() is None
        or not model.can_generate()
    ):
        raise ValueError(
            f"a {type(model).__name__} predicts no next word: give a decoder with its output layer, of"
            f" {known}"
        )
    if kind not in FAMILIES:
        raise ValueError(f"{kind!r} is a family whose layers are not known here: known are {known}")
    weight = next(model.parameters())
    if weight.itemsize < 4 and weight.device.type == "cpu":
        raise ValueError(
            f"weights in {weight.dtype} are slow and coarse on a CPU: give model.float()"
        )
    return config


def _check_attention(config: Any, n_seq: int) -> None:
    """Raise ValueError where a token would not attend to all tokens before it."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention", "sliding_attention"
    }  # fmt: skip
    if kinds:
        raise ValueError(f"attention of the kind {', '.join(sorted(kinds))} is not known here")
    types = getattr(config, "layer_types", None)
    slides = types is None or "sliding_attention" in types
    window = getattr(config, "sliding_window", None) if slides else None
    if window is not None and window < n_seq:
        raise ValueError(
            f"the model's attention slides over {window} tokens, and n_seq={n_seq}: give n_seq={window},"
            " up to which it sees everything"
        )


def _end(tokenizer: Any) -> int:
    """Return the id that stands before a document and pads a batch."""
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        if (found := getattr(tokenizer, name, None)) is not None:
            return int(found)
    raise ValueError(
        "the tokenizer has no end, start or padding token, of which one must stand before a document:"
        " set tokenizer.eos_token"
    )


def _register() -> None:
    """Tell transformers of the attention function; a model that runs by itself gets torch's own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(
        module, query, key, value, attention_mask, scaling=None, attending=None, **others
    ):
        if attending is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, **others
            )
        unknown = [n for n in ("softcap", "s_aux", "position_bias") if others.get(n) is not None]
        if unknown:
            raise ValueError(f"attention with {', '.join(unknown)} is not known here")
        return attending(query, key, value, scaling), None

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
