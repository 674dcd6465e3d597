"""The language model: full depth, or with tokens that leave at their exit.

Here are its weights and the plain way of running them: every layer, then the final head, and no exit
head. :mod:`earlyexit.exits.execution` runs the same weights with exits.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict
from typing import Literal

import torch
from torch import Tensor, nn

from earlyexit.exits import execution as runs
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.generation import generate
from earlyexit.exits.policy import ExitPolicy, check_threshold
from earlyexit.exits.readers import Predictions, Reader, Scores
from earlyexit.exits.statistics import exit_statistics
from earlyexit.nn.block import EarlyExitResNetBKBlock
from earlyexit.nn.config import ModelConfig
from earlyexit.nn.gates import ExitGates
from earlyexit.nn.heads import ExitHead
from earlyexit.nn.unembedding import AdaptiveUnembedding, LinearUnembedding


class EarlyExitLanguageModel(nn.Module):
    """A ResNet-BK language model with an exit after every layer.

    Args:
        vocab_size: words V.
        d_model: width D.
        n_layers: blocks L.
        n_seq: longest sequence; shorter ones work.
        num_experts, top_k, dropout_p, expert_hidden: see :class:`earlyexit.nn.moe.SparseMoELayer`.
        confidence_threshold: maximum probability at which a token exits when no policy is given.
        bk_heads, causal: see :class:`earlyexit.nn.bk_core.BKCore`.
        exit_head: ``"translator"`` (a d×d map before one shared unembedding) or ``"full"`` (each
            exit owns LayerNorm + Linear(V)).
        tie_embeddings: the final unembedding is the token embedding; by default where it can be.
        gate_hidden: hidden units of learned gates, 0 for linear ones, None for none; see
            :func:`earlyexit.training.gates.train_gates`.
        output_head: ``"linear"``, or ``"adaptive"``; see
            :class:`earlyexit.nn.unembedding.AdaptiveUnembedding`. Exits share it.

    Raises:
        ValueError: unknown ``exit_head`` or ``output_head``, an adaptive head that is tied or not
            shared, top_k > num_experts, n_layers < 1, threshold not in [0, 1].
    """

    config_type = ModelConfig

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 64,
        n_layers: int = 4,
        n_seq: int = 128,
        num_experts: int = 4,
        top_k: int = 1,
        dropout_p: float = 0.1,
        confidence_threshold: float = 0.9,
        *,
        bk_heads: int = 16,
        causal: bool = True,
        exit_head: Literal["translator", "full"] = "translator",
        tie_embeddings: bool | None = None,
        expert_hidden: int | None = None,
        gate_hidden: int | None = None,
        output_head: Literal["linear", "adaptive"] = "linear",
    ):
        super().__init__()
        if exit_head not in ("translator", "full"):
            raise ValueError(f"exit_head={exit_head!r} must be 'translator' or 'full'")
        if output_head not in ("linear", "adaptive"):
            raise ValueError(f"output_head={output_head!r} must be 'linear' or 'adaptive'")
        adaptive = output_head == "adaptive"
        if adaptive and (tie_embeddings or exit_head == "full"):
            raise ValueError("an adaptive output head is shared by the exits, and not tied")
        tie_embeddings = not adaptive if tie_embeddings is None else tie_embeddings
        if n_layers < 1:
            raise ValueError(f"n_layers={n_layers} must be at least 1")
        self.config = ModelConfig(
            vocab_size, d_model, n_layers, n_seq, num_experts, top_k, dropout_p,
            confidence_threshold, bk_heads, causal, exit_head, tie_embeddings, expert_hidden,
            gate_hidden, output_head,
        )  # fmt: skip
        self.vocab_size, self.d_model = vocab_size, d_model
        self.n_layers, self.n_seq = n_layers, n_seq
        self.confidence_threshold = confidence_threshold

        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(n_seq, d_model)
        nn.init.normal_(self.token_embedding.weight, std=d_model**-0.5)
        nn.init.normal_(self.position_embedding.weight, std=0.1 * d_model**-0.5)

        if adaptive:
            unembedding = AdaptiveUnembedding(d_model, vocab_size)
        else:
            unembedding = LinearUnembedding(d_model, vocab_size)
            nn.init.zeros_(unembedding.bias)
        if tie_embeddings:
            unembedding.weight = self.token_embedding.weight
        self.blocks = nn.ModuleList()
        for layer in range(n_layers):
            last = layer == n_layers - 1
            head = None  # a block makes its own full head
            if last or exit_head == "translator":
                head = ExitHead(d_model, unembedding, borrowed=not last, translate=not last)
            self.blocks.append(
                EarlyExitResNetBKBlock(
                    d_model,
                    n_seq,
                    vocab_size,
                    num_experts,
                    top_k,
                    dropout_p,
                    bk_heads=bk_heads,
                    causal=causal,
                    expert_hidden=expert_hidden,
                    exit_classifier=head,
                )
            )
        self.gates: ExitGates | None = None
        if gate_hidden is not None:
            self.gates = ExitGates(n_layers, d_model, gate_hidden)
        self.register_buffer("avg_exit_layer", torch.zeros(()), persistent=False)
        self.register_buffer(
            "exit_layer_counts", torch.zeros(n_layers + 1, dtype=torch.int64), persistent=False
        )
        self._told_nothing_exits = False

    @classmethod
    def from_config(cls, config: ModelConfig) -> EarlyExitLanguageModel:
        return cls(**asdict(config))

    # ------------------------------------------------------------------ settings and statistics

    @property
    def confidence_threshold(self) -> float:
        return self._confidence_threshold

    @confidence_threshold.setter
    def confidence_threshold(self, value: float) -> None:
        self._confidence_threshold = check_threshold(value, CRITERIA["max_probability"])

    def default_policy(self) -> ExitPolicy:
        """Maximum probability against ``confidence_threshold`` at every layer."""
        return ExitPolicy.constant(self.confidence_threshold, self.n_layers)

    def get_exit_statistics(self) -> dict:
        """Of all tokens run with exits since the last reset.

        Returns:
            ``avg_exit_layer`` (mean index, n_layers counting for "no exit"), ``exit_distribution``
            (n_layers + 1 percentages), ``speedup_estimate`` (n_layers / mean layers executed; a count
            of layers, not of time), ``total_tokens_processed``.
        """
        return exit_statistics(self.exit_layer_counts)

    def reset_exit_statistics(self) -> None:
        self.avg_exit_layer.zero_()
        self.exit_layer_counts.zero_()

    def _count_exits(self, exit_layers: Tensor) -> None:
        counts = exit_layers.bincount(minlength=self.n_layers + 1)
        self.exit_layer_counts += counts
        self.avg_exit_layer.fill_(exit_statistics(self.exit_layer_counts)["avg_exit_layer"])
        if counts[-1] == exit_layers.numel() and not self._told_nothing_exits:
            self._told_nothing_exits = True
            warnings.warn(
                "no token exits at these thresholds: every layer runs, and the checks cost extra",
                stacklevel=5,
            )

    def fingerprint(self) -> str:
        """Names configuration and weights, gates included: 16 hexadecimal digits of their SHA-256."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    # ------------------------------------------------------------------ running

    def embed(self, x: Tensor) -> Tensor:
        """Token ids ``(B, N)`` → ``(B, N, D)``.

        Raises:
            ValueError: not two-dimensional, empty, longer than n_seq, or an id outside 0 … V − 1.
        """
        if x.dim() != 2 or x.numel() == 0:
            raise ValueError(f"expected token ids (B, N) with B, N ≥ 1, got shape {tuple(x.shape)}")
        if x.shape[1] > self.n_seq:
            raise ValueError(
                f"sequence of {x.shape[1]} tokens is longer than n_seq={self.n_seq}: cut it, or build"
                " the model with a larger n_seq"
            )
        low, high = torch.stack(x.aminmax()).tolist()
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is outside the vocabulary 0 … {self.vocab_size - 1}")
        return self.token_embedding(x) + self.position_embedding.weight[: x.shape[1]]

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """Residual stream before the first and after every layer, L + 1 tensors ``(B, N, D)``."""
        states = [self.embed(x)]
        for block in self.blocks:
            states.append(block.hidden(states[-1]))
        return states

    def forward(
        self,
        x: Tensor,
        use_early_exit: bool = False,
        policy: ExitPolicy | None = None,
        execution: runs.Execution = "compacted",
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Token ids ``(B, N)`` → logits ``(B, N, V)``, with early exit also ``exit_info``.

        Args:
            use_early_exit: run with exits, and count them in the statistics.
            policy: by default maximum probability ≥ ``confidence_threshold``.
            execution: ``"compacted"`` or ``"dense"``; the same answer.

        Returns:
            Logits, or ``(logits, exit_info)`` with ``exit_layers`` (0-based, n_layers: none),
            ``exit_confidences`` (the criterion at the exit) and ``exited_mask``, each ``(B, N)``.

        Raises:
            ValueError: see :meth:`embed`; a policy for another depth; a policy without
                ``use_early_exit``; scores that are NaN.
        """
        if not use_early_exit:
            if policy is not None:
                raise ValueError("a policy does nothing unless use_early_exit=True")
            return self.blocks[-1].exit_classifier(self._full_depth(x))
        policy = policy or self.default_policy()
        run = runs.run(self, x, policy, Reader(), execution)
        self._count_exits(run.exit_layers)
        return run.outputs.view(*x.shape, -1), {
            "exit_layers": run.exit_layers.view_as(x),
            "exit_confidences": run.scores.view_as(x),
            "exited_mask": (run.exit_layers < self.n_layers).view_as(x),
        }

    def nll(
        self,
        x: Tensor,
        targets: Tensor,
        policy: ExitPolicy | None = None,
        execution: runs.Execution = "compacted",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Negative log-likelihood in nats of each target, never holding all B·N·V logits.

        Args:
            x: token ids ``(B, N)``; targets: ``(B, N)``, ``IGNORE`` where nothing is scored.
            policy: None runs full depth without any exit head.

        Returns:
            NLL ``(B, N)``, 0 where ignored; with a policy also the exit layers ``(B, N)``.
        """
        if targets.shape != x.shape:
            raise ValueError(f"targets {tuple(targets.shape)} do not fit tokens {tuple(x.shape)}")
        return self._read_tokens(x, Scores(targets.reshape(-1)), policy, execution)

    def predict(
        self, x: Tensor, policy: ExitPolicy | None = None, execution: runs.Execution = "compacted"
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Most probable next token ``(B, N)``; with a policy also the exit layers ``(B, N)``."""
        return self._read_tokens(x, Predictions(), policy, execution)

    @torch.no_grad()
    def _read_tokens(self, x: Tensor, read: Reader, policy, execution):
        if policy is None:
            head = self.blocks[-1].exit_classifier
            features = head.features(self._full_depth(x)).flatten(0, 1)
            tokens = torch.arange(len(features), device=x.device)
            return read.from_features(head.unembedding, features, tokens).view_as(x)
        run = runs.run(self, x, policy, read, execution)
        return run.outputs.view_as(x), run.exit_layers.view_as(x)

    def _full_depth(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block.hidden(h)
        return h

    def generate(
        self,
        prompt: Tensor,
        n_new: int,
        policy: ExitPolicy | None = None,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Continue ``prompt``; see :func:`earlyexit.exits.generation.generate`."""
        return generate(self, prompt, n_new, policy, temperature, generator)
