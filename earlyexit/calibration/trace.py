"""A trace takes one full-depth pass over a split, and then answers for thousands of policies.

Per token and exit the trace holds the NLL of the target, every criterion's score, the prediction and
its agreement with the last layer, and KL(last ‖ exit). What it cannot know is what exited tokens leave
behind in deeper layers: its read-outs assume full-depth states, and a real run confirms or corrects
them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from earlyexit.atomic import atomic_path
from earlyexit.checked import brief, parse, refused
from earlyexit.exits.policy import ExitPolicy, known_criterion
from earlyexit.exits.protocol import ExitModel
from earlyexit.exits.statistics import layers_executed


@dataclass(frozen=True, eq=False)
class ExitTrace:
    """A trace holds what every exit would have said of T tokens.

    Attributes:
        split: name of the split it was taken on.
        document, position, target: each token's document, place in its window and target ``(T,)``.
        nll: NLL in nats ``(T, L)``.
        kl: KL(last layer ‖ exit) in nats ``(T, L)``.
        prediction: most probable word ``(T, L)``.
        scores: criterion name → scores ``(T, L)``.
        n_seq: window length of the model.
        model_hash, data_hash: hashes of the weights and of the text.
    """

    split: str
    document: np.ndarray
    position: np.ndarray
    target: np.ndarray
    nll: np.ndarray
    kl: np.ndarray
    prediction: np.ndarray
    scores: dict[str, np.ndarray]
    n_seq: int
    model_hash: str = ""
    data_hash: str = ""

    @property
    def n_layers(self) -> int:
        return self.nll.shape[1]

    @property
    def n_tokens(self) -> int:
        return self.nll.shape[0]

    @property
    def agreement(self) -> np.ndarray:
        """Tell whether an exit predicts what the last layer predicts ``(T, L)``."""
        return self.prediction == self.prediction[:, -1:]

    # ------------------------------------------------------------------ read-outs

    def read_out(self, exit_layers: np.ndarray) -> dict[str, float]:
        """Return quality and depth if token i left at ``exit_layers[i]``, n_layers meaning not at all.

        Returns:
            ``perplexity``, ``quality_loss`` (against the same weights at full depth), ``layers`` (mean
            layers executed), ``speedup_layers``, ``agreement`` with the last layer.
        """
        executed = layers_executed(exit_layers, self.n_layers)
        chosen = np.arange(self.n_tokens), executed - 1
        return self._summary(
            self.nll[chosen].mean(dtype=np.float64), executed.mean(), self.agreement[chosen].mean()
        )

    def evaluate(self, policy: ExitPolicy) -> dict[str, float]:
        """Return the :meth:`read_out` of a policy."""
        return self.read_out(self.exit_layers(policy))

    def exit_layers(self, policy: ExitPolicy) -> np.ndarray:
        """Return where each token would leave ``(T,)``.

        Raises:
            TypeError: it is no policy.
            ValueError: the policy is for another model or depth, or of a criterion that is not traced.
        """
        if not isinstance(policy, ExitPolicy):
            raise TypeError(f"policy={brief(policy)}: give an ExitPolicy")
        if policy.model_hash and self.model_hash not in ("", policy.model_hash):
            raise ValueError(
                f"the policy was fitted for model {policy.model_hash}, the trace is of"
                f" {self.model_hash}: give one of the same, or replace(policy, model_hash='')"
            )
        if len(policy.thresholds) != self.n_layers:
            raise ValueError(
                f"the policy has {len(policy.thresholds)} thresholds, the trace {self.n_layers} exits"
            )
        return policy.exit_layers(self.score(policy.criterion), self.position / self.n_seq)

    def score(self, criterion: str) -> np.ndarray:
        """Return the scores of a criterion ``(T, L)``.

        Raises:
            ValueError: the trace does not hold it.
        """
        known_criterion(criterion)
        if criterion == "depth":
            return np.broadcast_to(np.arange(self.n_layers, dtype=np.float32), self.nll.shape)
        if criterion == "patience":
            return self._streaks
        if criterion not in self.scores:
            known = ", ".join((*self.scores, "patience", "depth"))
            raise ValueError(f"the trace holds no {criterion!r:.60}; it holds {known}")
        return self.scores[criterion]

    @cached_property
    def _streaks(self) -> np.ndarray:
        streaks = np.zeros(self.nll.shape, dtype=np.float32)
        for layer in range(1, self.n_layers):
            same = self.prediction[:, layer] == self.prediction[:, layer - 1]
            streaks[:, layer] = np.where(same, streaks[:, layer - 1] + 1, 0)
        return streaks

    @property
    def criteria(self) -> list[str]:
        """Return the criteria that the trace can answer for, but for the constant depth."""
        return [*self.scores, "patience"]

    def exit_distribution(self, exit_layers: np.ndarray) -> np.ndarray:
        """Return the share of tokens per exit layer ``(L + 1,)``, the last for "no early exit"."""
        return np.bincount(exit_layers, minlength=self.n_layers + 1) / self.n_tokens

    def sweep(self, criterion: str, thresholds: Iterable[float] | None = None) -> pd.DataFrame:
        """Read out one global threshold after another, exactly, in O(log T) each.

        A token has left by exit l when the best score up to l passes. Sorting those running bests
        once, with cumulative sums of what leaving at l rather than l + 1 changes, answers every
        threshold by bisection.

        Args:
            thresholds: by default 200 quantiles of the scores, and the one that no score reaches.
        """
        scores, rule = self.score(criterion), known_criterion(criterion)
        sign = 1.0 if rule.exit_above else -1.0
        # Leaving at the last exit is full depth; a model of one layer has no other.
        early = slice(0, max(1, self.n_layers - 1))
        best = np.maximum.accumulate(sign * scores[:, early], axis=1)  # (T, L − 1)
        if thresholds is None:
            found = np.quantile(scores[:, early], np.linspace(0, 1, 200))
            thresholds = [*np.unique(found).tolist(), rule.never]
        thresholds = np.asarray(list(thresholds), dtype=best.dtype)

        totals = np.zeros((3, len(thresholds)))  # Σ NLL, Σ layers, Σ agreement
        totals[0] = self.nll[:, -1].sum(dtype=np.float64)
        totals[1] = self.n_tokens * self.n_layers
        totals[2] = self.n_tokens
        agreement = self.agreement
        for layer in range(self.n_layers - 1):
            order = np.argsort(best[:, layer])
            ranked = best[order, layer]
            at_exit, at_next = self.nll[order, layer], self.nll[order, layer + 1]
            change = np.stack(
                [
                    at_exit.astype(np.float64) - at_next,
                    np.full(self.n_tokens, -1.0),
                    agreement[order, layer].astype(float) - agreement[order, layer + 1],
                ]
            )
            tail = np.concatenate(
                [np.cumsum(change[:, ::-1], axis=1)[:, ::-1], np.zeros((3, 1))], 1
            )
            totals += tail[:, np.searchsorted(ranked, sign * thresholds, side="left")]
        nll, layers, agree = totals / self.n_tokens
        rows = [self._summary(*row) for row in zip(nll, layers, agree, strict=True)]
        return pd.DataFrame({"criterion": criterion, "threshold": thresholds, **_columns(rows)})

    def static(self) -> pd.DataFrame:
        """Read out every token leaving at the same ``exit_layer``, for each of them."""
        rows = [self.evaluate(ExitPolicy.static(i, self.n_layers)) for i in range(self.n_layers)]
        return pd.DataFrame(
            {"criterion": "static", "exit_layer": range(self.n_layers), **_columns(rows)}
        )

    def oracle(self, loss: str = "nll", n_points: int = 60) -> pd.DataFrame:
        """Read out the best front with hindsight: each token's exit minimises depth + price · loss.

        Args:
            loss: ``"nll"`` (the target is known) or ``"kl"`` (the last layer is known).
            n_points: number of prices of a nat, in layers.
        """
        if loss not in ("nll", "kl"):
            raise ValueError(f"loss={loss!r} must be 'nll' or 'kl'")
        harm = self.nll - self.nll[:, -1:] if loss == "nll" else self.kl
        depth = np.arange(1, self.n_layers + 1)
        rows = []
        prices = np.concatenate([[0.0], np.logspace(-2, 4, n_points - 1)])
        for price in prices:
            rows.append(self.read_out((depth + price * harm).argmin(axis=1)))
        return pd.DataFrame({"criterion": f"oracle ({loss})", "price": prices, **_columns(rows)})

    @cached_property
    def full_nll(self) -> float:
        """Return the mean NLL at full depth, nats per token."""
        return self.nll[:, -1].mean(dtype=np.float64)

    def _summary(self, nll: float, layers: float, agreement: float) -> dict[str, float]:
        return {
            "perplexity": float(np.exp(nll)),
            "quality_loss": float(np.exp(nll - self.full_nll) - 1),
            "layers": float(layers),
            "speedup_layers": float(self.n_layers / layers),
            "agreement": float(agreement),
        }

    # ------------------------------------------------------------------ files

    def to_frame(self) -> pd.DataFrame:
        """Return a tidy table with one row per token and exit."""
        n, exits = self.nll.shape
        frame = {
            "token": np.repeat(np.arange(n, dtype=np.int32), exits),
            "exit": np.tile(np.arange(exits, dtype=np.int8), n),
        }
        for name in ("document", "position", "target"):
            frame[name] = np.repeat(getattr(self, name).astype(np.int32), exits)
        for name in ("nll", "kl", "prediction"):
            frame[name] = getattr(self, name).ravel()
        return pd.DataFrame(frame | {name: score.ravel() for name, score in self.scores.items()})

    def save(self, path: Path) -> None:
        """Write Parquet, one row per token and exit, with a digest of all that :meth:`load` returns."""
        about = {k: getattr(self, k) for k in ("split", "n_seq", "model_hash", "data_hash")}
        about |= {"n_layers": self.n_layers, "scores": list(self.scores)}
        table = pa.Table.from_pandas(self.to_frame(), preserve_index=False)
        about["digest"] = _digest(about, table)
        table = table.replace_schema_metadata({"exit_trace": json.dumps(about)})
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    @classmethod
    @refused(pa.ArrowException, "{path} is no exit trace that can be read: {error}")
    def load(cls, path: Path) -> ExitTrace:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: the file holds no trace, or was changed; the message names it.
        """
        try:
            with pq.ParquetFile(path) as file:
                table = file.read()
            about = parse((table.schema.metadata or {}).get(b"exit_trace", ""), dict)
            if about.pop("digest") != _digest(about, table):
                raise ValueError("it was changed after it was written")
            exits = about.pop("n_layers")
            columns = {
                name: table[name].to_numpy().reshape(-1, exits)
                for name in table.column_names
                if name not in ("token", "exit")
            }
            per_token = {k: columns.pop(k)[:, 0] for k in ("document", "position", "target")}
            scores = {name: columns.pop(name) for name in about.pop("scores")}
            return cls(scores=scores, **about, **per_token, **columns)
        except FileNotFoundError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, MemoryError, OSError) as error:
            why = str(error).partition("\n")[0]
            raise ValueError(f"{path} is no exit trace that can be read: {why}") from error


def _digest(about: dict, table: pa.Table) -> str:
    """Return the SHA-256 of what a trace says about itself and of all its columns."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in table.column_names:
        values = table[name].to_numpy()
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values))
    return digest.hexdigest()


def best_within(curve: pd.DataFrame, epsilon: float) -> float:
    """Return the largest speedup in layers at a quality loss ≤ ``epsilon``, between points of a curve.

    Args:
        curve: columns quality_loss and speedup_layers, as :meth:`ExitTrace.oracle` returns.
    """
    front = curve.sort_values("quality_loss")
    speedup = np.maximum.accumulate(front["speedup_layers"].to_numpy())
    return float(np.interp(epsilon, front["quality_loss"], speedup))


def by_document(values: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Return the mean of per-token values ``(T,)`` over each document ``(documents,)``."""
    _, index = np.unique(document, return_inverse=True)
    return np.bincount(index, values) / np.bincount(index)


def _columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def block_trace(trace: ExitTrace, model: ExitModel) -> ExitTrace:
    """Return the trace with each token's scores replaced by those that its block is judged by.

    Patience, which a trace derives from predictions, remains that of the token itself.

    Raises:
        ValueError: the trace does not hold whole windows.
    """
    scores = {name: values.copy() for name, values in trace.scores.items()}
    token = np.arange(trace.n_tokens)
    for layer in range(model.n_layers):
        offset = trace.position % model.unit_size(layer)
        if not (trace.position[token - offset] == trace.position - offset).all():
            raise ValueError("the trace does not hold whole windows")
        for values in scores.values():
            values[:, layer] = values[token - offset, layer]
    return replace(trace, scores=scores)
