"""A certificate says what is guaranteed of a policy, and tells where that holds.

It is bound to what it speaks of: a digest binds its policy, ε and all other fields, and ``check``
compares model, policy, text, split, length of documents and length of windows.
:mod:`earlyexit.calibration.certify` makes certificates.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from earlyexit.atomic import atomic_path
from earlyexit.calibration.bounds import METHODS
from earlyexit.calibration.unit_losses import Unit
from earlyexit.checked import (
    Checked,
    Count,
    Limit,
    Positive,
    Probability,
    Share,
    exact_fields,
    read_document,
)
from earlyexit.corpus.corpus import Corpus
from earlyexit.corpus.splits import Split
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.policy import ExitPolicy

log = logging.getLogger(__name__)

COVERED = ("certify", "test")  # splits that neither the weights nor the candidates were fitted to


@dataclass(frozen=True)
class Certificate(Checked):
    """A certificate says what was certified, of which policy, on which units.

    A changed copy is refused, unless it is made on purpose by ``replace(certificate, …, digest="")``.
    The digest finds slips; it is no signature, and anyone can make another.

    Attributes:
        policy: the certified policy.
        epsilon, delta: tolerated quality loss, and the probability with which it may be broken.
        unit, n: what the units are, and how many there were.
        longest_unit: tokens of the longest unit.
        ceiling: B in nats; clipped_share: share of units above it.
        method: the test; p_value: its p-value for the certified policy.
        bound: upper bound (1 − δ) on the policy's mean clipped loss, nats; only the certified level is
            covered by the family-wise guarantee.
        mean_gap, token_gap: the policy's mean loss over units (unclipped), and over tokens, nats.
        layers: mean layers executed on the certification part, of the model's n_layers.
        smallest_level: the least mean loss that any valid test could certify on so many units if no
            loss were negative, nats.
        candidates, accepted: how many policies were on the path, and how many passed.
        model_hash, data_hash: hashes of the weights and of the text.
        n_seq: length of the windows in which the model read, tokens; 0: not known, nothing is covered.
        cut: length to which documents were cut, tokens; 0: they were whole.
        digest: 16 hexadecimal digits of the SHA-256 of all other fields; "" is filled in.

    Raises:
        ValueError: a field is of a wrong type, impossible or at odds with another, or the digest is of
            other content.
    """

    policy: ExitPolicy
    epsilon: Positive
    delta: Probability
    unit: Unit
    n: Annotated[int, Field(ge=2)]
    longest_unit: Count
    ceiling: Positive
    clipped_share: Share
    method: str
    p_value: Share
    bound: float
    mean_gap: float
    token_gap: float
    layers: Annotated[float, Field(ge=1)]
    n_layers: Count
    smallest_level: float
    candidates: Count
    accepted: Count
    model_hash: str
    data_hash: str
    n_seq: Limit
    cut: Limit
    digest: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        thresholds = len(self.policy.thresholds)
        odd = {
            f"{thresholds} thresholds for n_layers={self.n_layers}": thresholds != self.n_layers,
            f"method={self.method!r}: known are {', '.join(METHODS)}": self.method not in METHODS,
            f"layers={self.layers} of n_layers={self.n_layers}": self.layers > self.n_layers,
            f"accepted={self.accepted} of candidates={self.candidates}": self.accepted
            > self.candidates,
            f"p_value={self.p_value} above delta={self.delta}": self.p_value > self.delta,
        }
        if found := [told for told, wrong in odd.items() if wrong]:
            raise ValueError(f"not a certificate: {'; '.join(found)}")
        if not self.digest:
            object.__setattr__(self, "digest", self._digest())
        self._check_digest()

    def __str__(self) -> str:
        """Say in one sentence what is guaranteed, of what, and from how much."""
        what = (
            f"the mean NLL gap to full depth over {self.unit}s, clipped at {self.ceiling:.3g} nats, is"
            f" within a quality loss of {self.epsilon:.1%}"
        )
        if self.unit == "document":
            told = f"Except with probability {self.delta:g}, {what}"
        else:
            told = f"Tested on {self.unit}s, which guarantees nothing where they depend: {what}"
        policy = f"{self.policy.criterion!r} at {self.speedup_layers:.2f}× in layers"
        return f"{told}, for {policy}, by {self.n} {self.unit}s that nothing was fitted to."

    @property
    def speedup_layers(self) -> float:
        return self.n_layers / self.layers

    def check(
        self,
        model: EarlyExitModel,
        text: Corpus | Split,
        *,
        policy: ExitPolicy | None = None,
        n_seq: int | None = None,
    ) -> bool:
        """Tell whether the guarantee covers this model on this text.

        It speaks of the mean over documents like those it was made on: drawn from a split in
        ``COVERED``, cut to the same length, and read in windows of the same length.

        Args:
            text: a split as it is read; a corpus stands for its splits in ``COVERED``, cut alike.
            policy: policy that is to run; None: the certified one.
            n_seq: length of the windows in which the text is read; None: the model's.

        Returns:
            True on the text that it was made on; False, with a warning in the log, on another, and on
            a text without ``data_hash``.

        Raises:
            ValueError: the certificate was changed, or it is for another model, policy, split, length
                of documents or length of windows.
        """
        self._check_digest()
        if (found := model.fingerprint()) != self.model_hash:
            raise ValueError(
                f"the certificate is for model {self.model_hash}, not {found}: certify again"
            )
        if policy not in (None, self.policy):
            raise ValueError(f"{policy} is not certified: run certificate.policy, or certify again")
        if (length := model.n_seq if n_seq is None else n_seq) != self.n_seq:
            raise ValueError(
                f"n_seq={length}: the certificate is for windows of {self.n_seq} tokens, read in those"
            )
        if not self.data_hash or text.data_hash != self.data_hash:
            log.warning("another text: the policy runs, but nothing is certified there")
            return False
        if isinstance(text, Split):
            self._check_split(text)
        return True

    def _check_split(self, split: Split) -> None:
        """Raise ValueError unless a split of the certified text is covered as it is cut."""
        if split.name not in COVERED:
            raise ValueError(
                f"split {split.name!r} is not covered: something was fitted to it, or nobody knows; give"
                f" {' or '.join(map(repr, COVERED))}"
            )
        longest = int(split.spans()[1].max(initial=0))
        whole = not split.cut or longest < split.cut
        if split.cut != self.cut and not (whole and (not self.cut or longest <= self.cut)):
            read = f"documents cut to {split.cut}" if split.cut else f"documents of up to {longest}"
            raise ValueError(
                f"{read} tokens: the certificate is for documents "
                + (
                    f"cut to {self.cut}: give split.truncate({self.cut})"
                    if self.cut
                    else "that are whole"
                )
                + ", or certify again on documents cut alike"
            )

    def _content(self) -> dict:
        """Return all fields but the digest, as plain JSON."""
        content = asdict(self) | {"policy": self.policy.to_dict()}
        del content["digest"]
        return content

    def _digest(self) -> str:
        content = json.dumps(self._content(), sort_keys=True, allow_nan=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _check_digest(self) -> None:
        """Raise ValueError if a field was changed after the digest was made."""
        if (found := self._digest()) != self.digest:
            raise ValueError(
                f"the certificate has digest {self.digest!r}, its content {found}: a field was changed"
                " (epsilon, a threshold, …), and what it says now was never tested; certify again"
            )

    def to_json(self) -> str:
        """Return the certificate as JSON."""
        return json.dumps(self._content() | {"digest": self.digest}, indent=2)

    @classmethod
    def from_dict(cls, data: object) -> Certificate:
        """Make the certificate that :meth:`to_json` gave.

        Raises:
            ValueError: a field is missing, unknown or of a wrong type, or the content was changed.
        """
        given = exact_fields(data, cls)
        if not given["digest"]:
            raise ValueError(f"digest={given['digest']!r}: nothing says that it was not changed")
        return cls(**given | {"policy": ExitPolicy.from_dict(given["policy"])})

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_json` to a file."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is no certificate, or was changed; the message names it.
        """
        return read_document(path, cls.from_dict)
