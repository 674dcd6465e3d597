"""Every model with exits, whatever its kind, gives logits, scores, predictions and new words."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict

import torch
from torch import Tensor

from earlyexit.corpus.windows import check_whole
from earlyexit.exits.clock import marker
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.execution import run
from earlyexit.exits.fused import fusable, pack
from earlyexit.exits.generation import Generated, Prompts, decode
from earlyexit.exits.policy import ExitPolicy, check_policy, check_threshold
from earlyexit.exits.protocol import Execution, ExitModel
from earlyexit.exits.readers import Predictions, Reader, Scores
from earlyexit.exits.statistics import exit_statistics
from earlyexit.nn.borrowed import own_precision
from earlyexit.nn.decode_loops import Weights


class EarlyExitModel(ExitModel):
    """This is a model of the contract :class:`ExitModel` that is called with and without exits.

    Subclasses set ``n_layers``, ``n_seq``, ``vocab_size`` and a dataclass ``config``, and then call
    :meth:`start_statistics`.
    """

    def start_statistics(self, confidence_threshold: float = 0.9) -> None:
        """Set the threshold of the default policy, and count exits from zero."""
        self.confidence_threshold = confidence_threshold
        self._last_fingerprint: tuple[list, str] = [], ""
        self._packed: tuple[list, Weights | None] | None = None
        self.register_buffer("avg_exit_layer", torch.zeros(()), persistent=False)
        counts = torch.zeros(self.n_layers + 1, dtype=torch.int64)
        self.register_buffer("exit_layer_counts", counts, persistent=False)
        self._warned_nothing_exits = False

    @property
    def confidence_threshold(self) -> float:
        """Return the maximum probability at which a token exits when no policy is given."""
        return self._confidence_threshold

    @confidence_threshold.setter
    def confidence_threshold(self, value: float) -> None:
        self._confidence_threshold = check_threshold(value, CRITERIA["max_probability"])

    def default_policy(self) -> ExitPolicy:
        """Return the policy of a maximum probability ≥ ``confidence_threshold`` at every layer."""
        return ExitPolicy.constant(self.confidence_threshold, self.n_layers)

    def get_exit_statistics(self) -> dict:
        """Return the :func:`exit_statistics` of all tokens run with exits since the last reset."""
        return exit_statistics(self.exit_layer_counts)

    def reset_exit_statistics(self) -> None:
        """Count exits from zero again."""
        self.avg_exit_layer.zero_()
        self.exit_layer_counts.zero_()

    def _count_exits(self, exit_layers: Tensor) -> None:
        counts = exit_layers.bincount(minlength=self.n_layers + 1)
        self.exit_layer_counts += counts
        self.avg_exit_layer.fill_(exit_statistics(self.exit_layer_counts)["avg_exit_layer"])
        if counts[-1] == exit_layers.numel() and not self._warned_nothing_exits:
            self._warned_nothing_exits = True
            warnings.warn(
                "no token exits at these thresholds: every layer runs, and the checks cost extra",
                stacklevel=5,
            )

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits of the SHA-256 of configuration and weights, gates included."""
        state = self._state_of_weights()
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(name.encode() + raw.numpy().tobytes())
        self._last_fingerprint = state, (found := digest.hexdigest()[:16])
        return found

    def _state_of_weights(self) -> list[tuple[int, int]]:
        """Return where each weight lies and how often it was changed there, which is read at once."""
        weights = (*self.parameters(), *self.buffers())
        return [(tensor.data_ptr(), tensor._version) for tensor in weights]

    def _check_origin(self, policy: ExitPolicy) -> None:
        """Raise TypeError for what is no policy, ValueError for a policy of another model or depth."""
        check_policy(policy, self.n_layers)
        if not policy.model_hash or self._last_fingerprint == (
            self._state_of_weights(), policy.model_hash,
        ):  # fmt: skip
            return
        if (found := self.fingerprint()) != policy.model_hash:
            raise ValueError(
                f"the policy was fitted for model {policy.model_hash}, not for {found}: fit it on a"
                " trace of this one, or use replace(policy, model_hash='') to run it all the same"
            )

    def forward(
        self,
        x: Tensor,
        use_early_exit: bool = False,
        policy: ExitPolicy | None = None,
        execution: Execution = "compacted",
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the logits ``(B, N, V)`` of token ids ``(B, N)``; with early exit also ``exit_info``.

        Args:
            use_early_exit: run with exits, and count them in the statistics.
            policy: by default :meth:`default_policy`.
            execution: ``"compacted"`` or ``"dense"``, which give the same answer.

        Returns:
            Logits, or ``(logits, exit_info)`` with ``exit_layers`` (0-based, n_layers: none),
            ``exit_confidences`` (the criterion at the exit) and ``exited_mask``, each ``(B, N)``.

        Raises:
            TypeError: ids or policy are of another type.
            ValueError: ``embed`` refuses the ids, the policy is for another model or depth or given
                without ``use_early_exit``, or scores are NaN.
        """
        if not use_early_exit:
            if policy is not None:
                raise ValueError("a policy does nothing unless use_early_exit=True")
            with own_precision(self):
                return self.head(self.n_layers - 1)(self.final_state(x))
        policy = self.default_policy() if policy is None else policy
        self._check_origin(policy)
        result = run(self, x, policy, Reader(), execution)
        self._count_exits(result.exit_layers)
        return result.outputs.view(*x.shape, -1), {
            "exit_layers": result.exit_layers.view_as(x),
            "exit_confidences": result.scores.view_as(x),
            "exited_mask": (result.exit_layers < self.n_layers).view_as(x),
        }

    def nll(
        self,
        x: Tensor,
        targets: Tensor,
        policy: ExitPolicy | None = None,
        execution: Execution = "compacted",
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the negative log-likelihood of each target in nats, never holding all logits.

        Args:
            x: token ids ``(B, N)``; targets: ``(B, N)``, ``IGNORE`` where nothing is scored.
            policy: None runs full depth without any exit head.

        Returns:
            NLL ``(B, N)``, 0 where ignored; with a policy also the exit layers ``(B, N)``.

        Raises:
            TypeError, ValueError: ids or targets are no whole numbers, not of one shape, or outside
                the vocabulary, or a score is NaN.
        """
        check_whole(x, "token ids")
        check_whole(targets, "targets")
        if targets.shape != x.shape:
            raise ValueError(f"targets {tuple(targets.shape)} do not fit tokens {tuple(x.shape)}")
        reader = Scores(targets.reshape(-1), self.vocab_size)
        return self._read_tokens(x, reader, policy, execution)

    def predict(
        self, x: Tensor, policy: ExitPolicy | None = None, execution: Execution = "compacted"
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the most probable next token ``(B, N)``; with a policy also the exit layers."""
        return self._read_tokens(x, Predictions(), policy, execution)

    def _read_tokens(self, x: Tensor, read: Reader, policy, execution):
        if policy is not None:
            self._check_origin(policy)
        # It spares a tenth of the time of a single window; a copy is an ordinary tensor again.
        with torch.inference_mode():
            found = self._inferred(x, read, policy, execution)
        copies = tuple(tokens.view(x.shape).clone() for tokens in found)
        return copies[0] if policy is None else copies

    def _inferred(self, x: Tensor, read: Reader, policy, execution) -> tuple[Tensor, ...]:
        """Return what is read of each token, and with a policy its exit layer, ``(B·N,)`` each."""
        if policy is not None:
            result = run(self, x, policy, read, execution)
            return result.outputs, result.exit_layers
        head = self.head(self.n_layers - 1)
        with own_precision(self):
            features = head.features(self.final_state(x)).flatten(0, 1)
            tokens = torch.arange(len(features), device=features.device)
            out = read.from_features(head.unembedding, features, tokens)
        marker()("head")
        return (out,)

    def generate(
        self,
        prompt: Prompts,
        n_new: int,
        policy: ExitPolicy | None = None,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        **options,
    ) -> tuple[Tensor, Tensor]:
        """Return the ``ids`` and ``exits`` of :meth:`decode`."""
        made = self.decode(prompt, n_new, policy, temperature, generator, **options)
        return made.ids, made.exits

    def decode(
        self,
        prompt: Prompts,
        n_new: int,
        policy: ExitPolicy | None = None,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        *,
        fused: bool = True,
        **options,
    ) -> Generated:
        """Continue ``prompt``; see :func:`earlyexit.exits.generation.decode`.

        Args:
            fused: whether compiled loops are used, where they know all parts of the model.
        """
        if policy is not None:
            self._check_origin(policy)
        weights = self.packed_weights() if fused else None
        return decode(
            self, prompt, n_new, policy, temperature, generator, weights=weights, **options
        )

    def packed_weights(self) -> Weights | None:
        """Return the weights for compiled loops, made again where one was written since.

        None: the loops do not know all parts of the model.
        """
        state = self._state_of_weights()
        if self._packed is None or self._packed[0] != state:
            self._packed = state, pack(self) if fusable(self) else None
        return self._packed[1]
