"""Models of plain ResNet-BK blocks decode in compiled loops; see :mod:`earlyexit.nn.decode_loops`.

Whether a model is one is read off the types of its parts, here and nowhere else: a kind of model that
changes a part is decoded through the contract, which is slower and right for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.protocol import ExitModel
from earlyexit.nn import decode_loops as loops
from earlyexit.nn.block import EarlyExitResNetBKBlock, MoEResNetBKLayer
from earlyexit.nn.decode_loops import Choice, Rule, Weights
from earlyexit.nn.gates import ExitGates
from earlyexit.nn.heads import ExitHead
from earlyexit.nn.mixing import ResolventMixing
from earlyexit.nn.unembedding import AdaptiveUnembedding, LinearUnembedding

RULES = {"depth": loops.DEPTH, "gate": loops.GATE, "agreement": loops.AGREEMENT}
LEFT_BEHIND = {"recomputed": loops.RECOMPUTED, "kept": loops.KEPT, "potentials": loops.POTENTIALS}


@dataclass
class Texts:
    """These are B sequences that are continued, in arrays that are filled in place.

    Attributes:
        ids: words ``(B, M)``; exits: where each was let go ``(B, M)``.
        start: words of each prompt ``(B,)``; length: words known so far; end: words wanted.
        uniform: function from a shape to random numbers of [0, 1); zeros where nothing is drawn.
        stop: words that end a sequence.
    """

    ids: np.ndarray
    exits: np.ndarray
    start: np.ndarray
    length: np.ndarray
    end: np.ndarray
    choice: Choice
    uniform: Callable[[tuple[int, ...]], np.ndarray]
    stop: np.ndarray


def fusable(model: ExitModel) -> bool:
    """Tell whether the compiled loops know all parts of a model."""
    blocks = getattr(model, "blocks", ())
    kinds = {(w.dtype, w.device.type) for w in model.parameters()}
    if not (
        model.can_step
        and blocks
        and all(type(block) is EarlyExitResNetBKBlock for block in blocks)
        and kinds in ({(torch.float32, "cpu")}, {(torch.float64, "cpu")})
    ):
        return False
    heads = [block.exit_classifier for block in blocks]
    mixings = [getattr(block.bk_layer, "mixing", None) for block in blocks]
    return (
        all(type(block.bk_layer) is MoEResNetBKLayer for block in blocks)
        and all(type(block.layer_norm) is nn.LayerNorm for block in blocks)
        and all(type(m) is ResolventMixing and m.bk_core.n_values for m in mixings)
        and all(type(head) is ExitHead for head in heads)
        and type(model.gates) in (ExitGates, type(None))
        and len({type(head.unembedding) for head in heads}) == 1
        and all(_clusters(head.unembedding) in (0, 2) for head in heads)
    )


def _clusters(unembedding: nn.Module) -> int:
    """Return the clusters of an adaptive head, 0 of a linear one, −1 of another."""
    if type(unembedding) is AdaptiveUnembedding:
        return len(unembedding.softmax.tail)
    return 0 if type(unembedding) is LinearUnembedding else -1


def rule_of(model: ExitModel, policy: ExitPolicy) -> Rule | None:
    """Return a policy as the loops read it; None if its criterion is not one of ``RULES``."""
    if policy.criterion not in RULES:
        return None
    if policy.rule.needs_gates and (model.gates is None or not model.gates.trained):
        return None  # the contract says what is missing
    return Rule(RULES[policy.criterion], np.array(policy.thresholds), float(policy.decay))


@torch.no_grad()
def pack(model: ExitModel) -> Weights:
    """Return the weights of a :func:`fusable` model as the loops read them."""
    packing, every = _Packing(model.n_layers), slice(None)
    put, linear = packing.put, packing.linear
    put(every, "token", model.token_embedding.weight.flatten())
    put(every, "position", model.position_embedding.weight.flatten())
    gates = [] if model.gates is None else model.gates.gates
    for k, gate in enumerate(gates):
        if isinstance(gate, nn.Sequential):
            linear(k, "judge", gate[0])
        linear(k, "verdict", gate[-1] if isinstance(gate, nn.Sequential) else gate)
    for k, block in enumerate(model.blocks):
        norm, mixing, moe = block.layer_norm, block.bk_layer.mixing, block.bk_layer.moe
        weight, bias = mixing.contribution.affine()
        put(k, "norm", norm.weight, norm.bias)
        put(k, "epsilon", bias.new_tensor([norm.eps]))
        put(k, "given", weight)
        put(k, "given_bias", bias)
        put(k, "eta", mixing.bk_core.eta)
        put(k, "t", mixing.bk_core.t)
        put(k, "parts", mixing.real, mixing.imag)
        put(k, "gate", mixing.gate_proj.weight)
        put(k, "out", mixing.bk_scale * mixing.output_proj.weight)
        put(k, "out_bias", mixing.bk_scale * mixing.output_proj.bias)
        linear(k, "router", moe.gating_network)
        linear(k, "up", *(expert[0] for expert in moe.experts))
        linear(k, "down", *(expert[-1] for expert in moe.experts))
        head = block.exit_classifier
        if head.translator is not None:
            linear(k, "translator", head.translator)
        put(k, "head_norm", head.layer_norm.weight, head.layer_norm.bias)
        put(k, "head_epsilon", bias.new_tensor([head.layer_norm.eps]))
        clusters = _clusters(head.unembedding)
        linear(k, "words", head.unembedding.softmax.head if clusters else head.unembedding)
        for c in range(clusters):
            narrow, rare = head.unembedding.softmax.tail[c]
            put(k, f"narrow_{c + 1}", narrow.weight)
            put(k, f"rare_{c + 1}", rare.weight)
    return Weights(torch.cat(packing.parts).numpy(), packing.at, _sizes(model))


class _Packing:
    """Tensors are laid one after another, each once: ``at`` says where, ``(L, NAMES)``."""

    def __init__(self, n_layers: int):
        self.at = np.full((n_layers, len(loops.NAMES)), loops.NONE)
        self.parts: list[Tensor] = []
        self.length = 0
        self.known: dict[tuple[int, ...], tuple[int, tuple[Tensor, ...]]] = {}

    def put(self, layer: int | slice, name: str, *tensors: Tensor) -> None:
        """Add vectors, or matrices of which inputs stand first, padded with zeros to ``STEP``."""
        key = tuple(map(id, tensors))
        if key not in self.known:
            self.known[key] = self.length, tensors
            for tensor in tensors:
                if tensor.dim() == 2:
                    tensor = F.pad(tensor.mT, (0, 0, 0, -tensor.shape[1] % loops.STEP))
                self.parts.append(tensor.flatten())
                self.length += tensor.numel()
        self.at[layer, loops.NAMES.index(name)] = self.known[key][0]

    def linear(self, layer: int, name: str, *modules: nn.Linear) -> None:
        self.put(layer, name, *(module.weight for module in modules))
        self.put(layer, f"{name}_bias", *(module.bias for module in modules))


def _sizes(model: ExitModel) -> np.ndarray:
    block, unembedding = model.blocks[0], model.blocks[0].exit_classifier.unembedding
    core, moe = block.bk_layer.mixing.bk_core, block.bk_layer.moe
    gates = [] if model.gates is None else [*model.gates.gates]
    size = dict.fromkeys(loops.SIZES, 0) | {
        "L": model.n_layers,
        "D": model.token_embedding.embedding_dim,
        "H": core.n_heads,
        "C": core.n_heads * core.n_values,
        "E": moe.num_experts,
        "F": moe.experts[0][0].out_features,
        "G": gates[0][0].out_features if gates and isinstance(gates[0], nn.Sequential) else 0,
        "S": model.vocab_size,
        "top_k": moe.top_k,
        "left": LEFT_BEHIND[model.config.left_behind],
        "N": model.n_seq,
        "V": model.vocab_size,
    }
    if _clusters(unembedding):
        size["S"] = unembedding.softmax.shortlist_size
        for c, (narrow, rare) in enumerate(unembedding.softmax.tail, start=1):
            size |= {f"D{c}": narrow.out_features, f"V{c}": rare.out_features}
    return np.array(list(size.values()))


class FusedDecoder:
    """This decoder continues texts in compiled loops, side by side, or losslessly one by one.

    Args:
        rule: where words leave, or with ``max_draft`` which of them are drafted.
        max_draft: longest draft; 0: none, words that leave are taken as they are.

    Attributes:
        seen: with drafts, counts ``(4, L, max_draft + 1)``; see
            :func:`earlyexit.nn.decode_loops.speculate`.

    Raises:
        ValueError: scores or logits are not finite.
    """

    def __init__(self, weights: Weights, texts: Texts, rule: Rule, max_draft: int = 0):
        self.weights, self.texts, self.rule, self.max_draft = weights, texts, rule, max_draft
        (sequences, longest), layers = texts.ids.shape, len(weights.at)
        self.ring = max_draft + 2 if max_draft else 1
        size = dict(zip(loops.SIZES, weights.size.tolist(), strict=True))
        state = (layers, sequences * self.ring, 2, size["H"] + size["C"])
        self.state = np.zeros(state)
        self.seen = np.zeros((4, layers, max_draft + 1), dtype=np.int64)
        shape = (sequences, longest, 3, max_draft + 1) if max_draft else (longest, sequences)
        self.uniforms = texts.uniform(shape)
        if max_draft:
            rule = Rule(loops.DEPTH, np.full(layers, np.inf), 0.0)
        run = texts.ids, texts.length, texts.exits, self.state, self.ring
        self._check(loops.prompt(weights, rule, *run, loops.rows(weights, loops.CHUNK)))
        self.rows = loops.rows(weights, max_draft + 1 if max_draft else sequences)
        drawn = max_draft and texts.choice.temperature > 0
        self.drafted = np.zeros((max_draft, size["V"]) if drawn else (1, 1))

    def advance(self, words: int, read: bool = True) -> None:
        """Continue every sequence by at most ``words`` words; a draft that stands may end beyond.

        Args:
            read: False runs the layers over the words that stand there already, to time them.
        """
        t = self.texts
        if not self.max_draft:
            run = t.ids, t.length, t.end, t.exits, self.state, self.uniforms, t.stop
            how = words, read, self.rows
            self._check(loops.decode(self.weights, self.rule, t.choice, *run, *how))
            return
        for b, known in enumerate(t.length):
            slots = self.state[:, b * self.ring : (b + 1) * self.ring]
            state = np.ascontiguousarray(slots)
            run = t.ids[b], known, t.end[b], t.exits[b], state, self.uniforms[b], t.stop
            how = words, self.seen, self.drafted, self.rows
            found = loops.speculate(self.weights, self.rule, t.choice, *run, *how)
            self._check(loops.BROKEN if found < 0 else loops.FINE)
            slots[:], t.length[b] = state, found
            if (t.stop == t.ids[b, known:found, None]).any():
                t.end[b] = found

    @staticmethod
    def _check(ended: int) -> None:
        if ended != loops.FINE:
            raise ValueError("a score or logit is not finite: the weights hold NaN or infinity")
