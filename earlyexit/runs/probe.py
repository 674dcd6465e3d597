"""Ask of an existing model and a text whether early exit would pay: ``python -m earlyexit probe``.

Every costly step is kept in the cache under what decides it, with a digest, so that a probe that was
stopped goes on after the last finished step, and one that was damaged is made again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

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
from earlyexit.evaluation.compare import fitted
from earlyexit.evaluation.existing import (
    ENOUGH,
    candidates_of,
    existing_exits,
    existing_policies,
    policy_times,
    verdict,
    ways_left_behind,
)
from earlyexit.evaluation.guarantees import ceiling_table, certify_each
from earlyexit.evaluation.peers import peer_table
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.execution import run
from earlyexit.exits.protocol import ExitModel
from earlyexit.exits.readers import Scores
from earlyexit.models.pretrained import PretrainedModel
from earlyexit.nn.cross_entropy import CHUNK_ELEMENTS
from earlyexit.runs import digests
from earlyexit.runs.kept import verified
from earlyexit.runs.parameters import Positives
from earlyexit.training import gates
from earlyexit.training.gates import train_gates
from earlyexit.training.translators import fit_translators

log = logging.getLogger(__name__)
BATCH = 8  # windows of a trace and of a real run: states of all exits of so many are held at once
SHARE = 4  # gates and traces read one of so many of the tokens of a probe
KEPT, PASSES = 2, 3  # one of so many is kept to refine translators, which read it so many times
TOKENS = 32  # that a trace or gates judge at once
SHARED_BYTES = 2**30  # of states that the real runs on the test split share, at most
STEP, WORDS = 512, 2_048  # tokens of a step of the refinement, and words that it usually draws
AFTER = 0.5  # of a full pass, what a policy costs beyond the start that it shares: rather more
FITS = (fit_translators, train_gates)  # on what the exits of a probe depend
RUNS = (run, Scores)  # on what a real run depends, besides the model


@dataclass(frozen=True)
class ProbeConfig(Checked):
    """How much a probe reads, and what it asks.

    Attributes:
        tokens: that translators are fitted on; gates and the two traces read a quarter each.
        epsilons: tolerated losses; delta: probability with which a certificate may be broken.
        n_candidates: policies from which certificates choose; each is run over all that certifies.
        document_tokens: to which the documents of all but the training split are cut.
        timed_windows, repeats: of the timed batch.
        assisted_tokens: new tokens of each decoding by drafts, at most those that the window leaves
            beside a prompt; 0: it is left out.
        seed: of the order of windows, words and gates.
    """

    tokens: Count = ENOUGH
    epsilons: Positives = (0.01, 0.02, 0.05, 0.1)
    delta: Probability = 0.05
    n_candidates: Count = 10
    document_tokens: Count = 256
    timed_windows: Count = 4
    repeats: Count = 5
    assisted_tokens: Limit = 0
    seed: Limit = 0


class Probe:
    """The steps of a probe; each is done when it is asked for, and kept.

    Args:
        model: a decoder with exits, not fitted yet.
        corpus: the text in its ids.
        folder: of what is kept.

    Raises:
        ValueError: the model has one exit, its last layer's.
    """

    def __init__(self, model: PretrainedModel, corpus: Corpus, config: ProbeConfig, folder: Path):
        if model.n_layers < 2:
            raise ValueError("exits=1: nothing can leave early; give two exits or more")
        self.model, self.corpus, self.config, self.folder = model, corpus, config, folder
        self.about = {"model": model.fingerprint(), "text": corpus.data_hash}
        self.about |= {k: getattr(config, k) for k in ("tokens", "seed")}

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
        """Estimate the time of a probe from nothing, in full passes over tokens."""
        c, exits, operations = self.config, self.model.n_layers, self.model.operations()
        head, layer = operations.head("word")["flops"], operations.layer(0)["flops"]
        head /= exits * layer + head  # share of a full pass that reading its words takes
        judged = 1 + (exits - 1) * head
        refined = 3 * PASSES / KEPT * (exits - 1) * head * min(1.0, WORDS / self.model.vocab_size)
        certify, fit, test = (self.split(name).n_tokens for name in ("certify", "fit", "test"))
        policies = 2 * len(c.epsilons)  # those that are certified, and those that are fitted
        passes = (
            c.tokens * (1 + refined)
            + (min(self.part, c.tokens) + fit + test) * judged
            + certify * (1 + AFTER * c.n_candidates)
            + test * (1 + AFTER * policies)
            + 2 * c.repeats * (1 + policies) * c.timed_windows * self.model.n_seq
        )
        return passes * self.milliseconds_per_token() / 60_000

    @cached_property
    def translators(self) -> pd.DataFrame:
        """Fit the exits' translators, and return a row per exit with what they explain."""
        kept = max(1, self.config.tokens // KEPT)
        asked = {
            "refine_tokens": kept,
            "steps": max(1, PASSES * kept // STEP),
            "batch_size": min(STEP, kept),
        }

        def fit() -> list[dict]:
            split, c = self.corpus.splits["train"], self.config
            return fit_translators(
                self.model, split, self.corpus.eos_id, c.tokens, seed=c.seed, **asked
            )

        return self._fitted("translators", ("heads.", "shortcuts."), fit, fit_translators, **asked)

    @cached_property
    def exits(self) -> pd.DataFrame:
        """Fit translators and then gates, and return a row per exit with what both explain."""
        translators = self.translators

        def fit() -> list[dict]:
            split, eos = self.corpus.splits["train"], self.corpus.eos_id
            with _more_at_once(self.model):
                return train_gates(self.model, split, eos, self.part, seed=self.config.seed)

        return translators.merge(self._fitted("gates", ("gates.",), fit, *FITS), on="exit")

    def _fitted(
        self,
        what: str,
        prefixes: tuple[str, ...],
        fit: Callable[[], list[dict]],
        *used: Callable,
        **asked: Any,
    ) -> pd.DataFrame:
        """Put kept tensors into the model, which ``fit`` makes if they are not there."""
        tensors = {
            name: tensor.detach()
            for name, tensor in self.model.state_dict().items()
            if name.startswith(prefixes) and "layer_norm" not in name
        }

        def make(path: Path) -> None:
            report = json.dumps(fit())  # it changes the tensors in place
            save_file(tensors, path, {"report": report})

        path = self._kept(what, ".safetensors", make, *used, **asked)
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

        asked = {"document_tokens": self.config.document_tokens}
        path = self._kept(f"trace-{name}", ".parquet", make, *FITS, collect_trace, **asked)
        return ExitTrace.load(path)

    @cached_property
    def certificates(self) -> dict[float, Certificate | Refused]:
        """Run candidates for real on the certification part, and return ε → certificate or refusal.

        The candidates are fitted to losses from far below every ε, since a real run loses more than the
        trace promises, to above; see :mod:`earlyexit.calibration.certify`.
        """
        c, fit = self.config, self.trace("fit")
        targets = np.geomspace(0.02 * min(c.epsilons), 1.2 * max(c.epsilons), c.n_candidates)
        try:
            policies = propose(fit, targets, "gate", costs=policy_costs(self.model, "gate"))
        except Unreachable as error:
            return dict.fromkeys(c.epsilons, Refused(str(error)))

        def make(path: Path) -> None:
            split, eos = self.split("certify"), self.corpus.eos_id
            with self.model.shared_start():
                losses = window_losses(self.model, split, eos, policies, BATCH)
            with open(path, "wb") as file:
                np.savez(file, **{k: np.asarray(v) for k, v in vars(losses).items()})

        asked = {"policies": [policy.to_dict() for policy in policies]}
        asked["document_tokens"] = c.document_tokens
        path = self._kept("losses", ".npz", make, *FITS, *RUNS, window_losses, **asked)
        with np.load(path) as found:
            plain = {k: v if v.ndim else v.item() for k, v in found.items()}
        losses = WindowLosses(**plain)
        ceilings = ceiling_table(fit, policies, losses, c.epsilons, c.delta)
        by_unit = certify_each(policies, losses, ceilings, c.delta)
        return {epsilon: by_unit[epsilon, "document"] for epsilon in c.epsilons}

    @cached_property
    def policies(self) -> pd.DataFrame:
        """Return the certified and fitted policies, run for real on the test split, and their rivals.

        Quality is kept. Times are measured anew, so that they are of this machine as it is now.
        """
        c, candidates = self.config, candidates_of(self.model, self.trace("fit"), self.certificates)
        asked = {"candidates": [(each.key, each.policy.to_dict()) for each in candidates]}
        asked |= {"epsilons": list(c.epsilons), "document_tokens": c.document_tokens}

        def make(path: Path) -> None:
            test = list(loader(self.split("test"), self.model.n_seq, BATCH, self.corpus.eos_id))
            size = 4 * BATCH * self.model.n_seq * self.model.config.d_model * self.model.n_layers
            with self.model.shared_start(max(1, min(len(test), SHARED_BYTES // size))):
                existing_policies(
                    self.model, self.trace("test"), candidates, c.epsilons, test
                ).to_parquet(path)

        used = (*FITS, *RUNS, collect_trace, existing_policies)
        table = pd.read_parquet(self._kept("policies", ".parquet", make, *used, **asked))
        times = policy_times(self.model, candidates, self._batch(c.timed_windows), c.repeats)
        return table.merge(times, on=["criterion", "epsilon"], how="left")

    def left_behind(self, epsilon: float) -> pd.DataFrame:
        """Run the policy fitted to ``epsilon`` with all that exited tokens may leave behind."""
        (found,) = fitted(self.model, self.trace("fit"), ["gate"], [epsilon])
        asked = {"policy": found.policy.to_dict(), "document_tokens": self.config.document_tokens}

        def make(path: Path) -> None:
            test = list(loader(self.split("test"), self.model.n_seq, BATCH, self.corpus.eos_id))
            table = ways_left_behind(self.model, self.trace("test"), found.policy, test)
            table.to_parquet(path)

        used = (*FITS, *RUNS, collect_trace, ways_left_behind)
        return pd.read_parquet(self._kept("left-behind", ".parquet", make, *used, **asked))

    @cached_property
    def peers(self) -> pd.DataFrame:
        """Return how fast early exits decode, here and elsewhere; empty if it was not asked for."""
        if not self.config.assisted_tokens:
            return pd.DataFrame()
        prompts = self._batch(2)[0][:, : min(32, self.model.n_seq // 2)]
        room = self.model.n_seq + 1 - prompts.shape[1]
        return peer_table(
            self.model, prompts, min(room, self.config.assisted_tokens), self.config.repeats
        )

    def exit_table(self) -> pd.DataFrame:
        """Return the quality of every exit on the test split."""
        return existing_exits(self.trace("test"), self.model.config.stage_layers)

    def sentence(self, epsilon: float) -> str:
        """Return the verdict at ``epsilon``."""
        return verdict(self.policies, epsilon, int(self.exits["tokens"].iloc[0]))

    def _batch(self, windows: int) -> tuple[Tensor, Tensor]:
        """Return windows evenly spread over the test split, inputs and targets ``(B, N)``."""
        inputs, targets = loader(
            self.split("test"), self.model.n_seq, 1, self.corpus.eos_id
        ).dataset.tensors
        rows = torch.linspace(0, len(inputs) - 1, min(windows, len(inputs))).long()
        return inputs[rows], targets[rows]

    @verified
    def _kept(
        self, what: str, suffix: str, make: Callable[[Path], None], *used: Callable, **asked: Any
    ) -> Path:
        """Return the path of a step's result, which ``make`` writes if it is not there.

        Args:
            used: what makes it, besides the model; asked: what decides it, besides the probe's own.
        """
        about = {
            "probe": self.about,
            "code": digests.of_code(PretrainedModel, *used, contract=ExitModel),
        }
        path = self.folder / f"{what}-{digests.of_object(about | {'asked': asked})[:16]}{suffix}"
        if not path.is_file():
            log.info("%s …", what)
            with atomic_path(path) as temporary:
                make(temporary)
        return path


@contextmanager
def _more_at_once(model: PretrainedModel) -> Iterator[None]:
    """Let traces and gates judge ``TOKENS`` tokens at once, and traces by what needs no vocabulary.

    Their usual number is made for small vocabularies; with 49,152 words it is one token, for which all
    weights of the output layer are read again, and criteria that read all logits would double the time
    of a trace. Both are constants of theirs, which name what is cached.
    """
    elements, criteria = CHUNK_ELEMENTS, CRITERIA
    collect.CHUNK_ELEMENTS = max(elements, TOKENS * model.vocab_size * model.n_layers)
    gates.CHUNK_ELEMENTS = max(elements, 2 * TOKENS * model.vocab_size)
    collect.CRITERIA = {k: rule for k, rule in criteria.items() if rule.reads == "state"}
    try:
        yield
    finally:
        collect.CHUNK_ELEMENTS = gates.CHUNK_ELEMENTS = elements
        collect.CRITERIA = criteria
