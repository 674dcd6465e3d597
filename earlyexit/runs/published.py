"""A published model is loaded with its text and the policy that is certified for it."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from earlyexit.calibration.certificate import Certificate
from earlyexit.calibration.trace import ExitTrace
from earlyexit.corpus.corpus import Corpus
from earlyexit.corpus.load import load_corpus
from earlyexit.cost.time_model import TimeModel
from earlyexit.devices import resolve_device
from earlyexit.evaluation.speed import read_prices
from earlyexit.evaluation.words import score
from earlyexit.exits.policy import ExitPolicy
from earlyexit.models.checkpoints import CheckpointError, checkpoint_about, load_model
from earlyexit.models.resnet_bk import EarlyExitLanguageModel
from earlyexit.runs import cache, digests
from earlyexit.runs.artifacts import MissingResult, owner_of, read_table
from earlyexit.runs.paths import project
from earlyexit.runs.profiles import get_profile

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Published:
    """A published model with its text and its certificate.

    Attributes:
        model: the model with its gates, in evaluation mode.
        corpus: text that it was trained on.
        certificate: certificate of this model on this text; None if there is none.
        policy: policy that it certifies, or None.
    """

    model: EarlyExitLanguageModel
    corpus: Corpus
    certificate: Certificate | None
    policy: ExitPolicy | None

    def score(self, text: str) -> pd.DataFrame:
        """Run the model over a text of the reader's own, with its certified policy if it has one.

        The certificate says nothing of such a text: it is about documents like those of ``corpus``.

        Returns:
            One row per word; see :func:`earlyexit.evaluation.words.score`, also for errors.
        """
        return score(self.model, self.corpus, text, self.policy)


def model_path(label: str, seed: int) -> Path:
    """Return the path of the published weights of a profile's model."""
    return project().results / label / f"model_seed{seed}.safetensors"


def load(
    profile: str = "cpu", seed: int = 0, data_dir: str | None = None, device: str = "auto"
) -> Published:
    """Load a published model with its text and its certified policy, and check all their hashes.

    A certificate is made for the model of one seed; the models of other seeds have none.

    Args:
        profile: profile with published weights, such as ``"cpu"`` or ``"wikitext2"``.
        data_dir: folder with the text; None: the text comes from the hub, or is embedded.

    Raises:
        CheckpointError: no model of this profile and seed is published, or its file was changed.
        ValueError: the text is not the one that the model was trained on.
        ConnectionError: the text is not stored here and cannot be downloaded.
    """
    path = model_path(profile, seed)
    if not path.is_file():
        raise CheckpointError(
            f"no published model of profile {profile!r} with seed {seed}; there are {_known()}. "
            f"`python -m earlyexit run --profile NAME --only 01` trains the models of a profile"
        )
    check_bytes(path)
    model = load_model(path, device=resolve_device(device))
    corpus = load_corpus(get_profile(profile, data_dir=data_dir).corpus, project().cache / "corpus")
    trained_on = checkpoint_about(path)["text"]
    if trained_on != corpus.data_hash:
        raise ValueError(
            f"the text has digest {corpus.data_hash[:16]}, but this model was trained on one with digest"
            f" {trained_on[:16]}: " + ("give another data_dir" if data_dir else "give its data_dir")
        )
    certified = path.with_name("certificate.json")
    if certified.is_file():
        check_bytes(certified)
        try:
            certificate = Certificate.load(certified)
            if certificate.check(model, corpus):
                return Published(model, corpus, certificate, certificate.policy)
        except ValueError as error:
            log.info("no certified policy: %s", error)
    return Published(model, corpus, None, None)


def published_trace(published: Published, profile: str, seed: int, split: str) -> ExitTrace:
    """Return the trace of a published model over a split, as notebooks read it, from the cache or made.

    Args:
        published: what :func:`load` returned for this profile and seed.
    """
    name = checkpoint_about(model_path(profile, seed))["model_hash"]
    trained = cache.Trained(published.model, pd.DataFrame(), name, pd.DataFrame())
    part = published.corpus.splits[split].limit(get_profile(profile).max_eval_tokens)
    return cache.exit_trace(trained, part, published.corpus, project().cache)


def published_prices(profile: str = "cpu") -> TimeModel | None:
    """Return the prices of work that 04 measured under a profile, or else under ``cpu``, or None.

    ``machine`` says where: ``profile``, ``hardware`` and ``made_by``, which version of the project.
    """
    for label in dict.fromkeys((profile, "cpu")):
        with suppress(MissingResult):
            prices, checked = (read_table(label, name) for name in ("time_prices", "time_check"))
            record = owner_of(f"results/{label}/time_prices.csv", project().published(label))
            about = {"hardware": record.hardware, "made_by": record.made_by}
            return read_prices(prices, checked, profile=label, **about)
    return None


def _known() -> str:
    """List the published models, as part of a sentence."""
    seeds: dict[str, list[str]] = {}
    for path in sorted(project().results.glob("*/model_seed*.safetensors")):
        seeds.setdefault(path.parent.name, []).append(re.sub(r"\D", "", path.stem))
    return ", ".join(f"{name} (seed {', '.join(found)})" for name, found in seeds.items()) or "none"


def check_bytes(path: Path) -> None:
    """Compare a file with the record of the run that wrote it.

    Raises:
        CheckpointError: the file was changed, or never finished.
    """
    name = project().relative(path)
    record = owner_of(name, path.parent)
    if record is None or record.files[name].sha256 != digests.of_file(path):
        raise CheckpointError(f"{path} is not the file that was published: fetch it again")
