"""Turn a threshold, or a tolerated loss, and see quality, speedups, exits and a text change.

Everything is read off exit traces, so that no layer runs again when a slider moves; a text that the
reader gives is run once, at full depth. :class:`Explorer` computes, and shows itself as a widget.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from earlyexit.calibration.collect import collect_trace
from earlyexit.calibration.thresholds import Unreachable, fit_policy
from earlyexit.calibration.trace import ExitTrace
from earlyexit.corpus.corpus import Corpus
from earlyexit.corpus.load import encode_texts
from earlyexit.cost.parts import Load, policy_flops
from earlyexit.cost.time_model import TimeModel, unpriced
from earlyexit.evaluation.words import as_written
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.policy import ExitPolicy
from earlyexit.exits.statistics import layers_executed
from earlyexit.runs.published import load, published_prices, published_trace

if TYPE_CHECKING:
    from ipywidgets import VBox

SHOWN = 300  # words of a passage
BATCH = 32  # windows of the batch whose time is predicted
POINTS = 60  # of a slider over thresholds: quantiles of the scores
EPSILONS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2)


def explore(
    profile: str = "cpu", seed: int = 0, *, data_dir: str | None = None, device: str = "auto"
) -> Explorer:
    """Return the explorer of a published model; a notebook shows it as sliders.

    The first call in a clone runs the model once over two parts of its text, which takes a minute and
    is kept in the cache. Nothing is trained.

    Args:
        profile, seed, data_dir, device: see :func:`earlyexit.load`, which raises what is raised here.
    """
    published = load(profile, seed, data_dir, device)
    fit, test = (published_trace(published, profile, seed, split) for split in ("fit", "test"))
    return Explorer(published.model, published.corpus, fit, test, published_prices(profile))


@dataclass(frozen=True, eq=False)
class Passage:
    """A passage is a text with its trace.

    Attributes:
        words: the first of its words, at most ``SHOWN``, as the text has them.
        known: whether each is in the vocabulary.
        trace: trace of the whole text.
    """

    words: list[str]
    known: np.ndarray
    trace: ExitTrace


@dataclass(frozen=True, eq=False)
class Explorer:
    """An explorer reads policies of one threshold for all layers off a model's traces.

    Attributes:
        model, corpus: the model and its text.
        fit: trace of the fit part, on which the threshold for a tolerated loss is chosen.
        test: trace of the test split, which reports.
        prices: prices of a machine, by which wall-clock is predicted; None: it is not.
        epsilon: tolerated loss at which the slider stands first.
    """

    model: EarlyExitModel
    corpus: Corpus
    fit: ExitTrace
    test: ExitTrace
    prices: TimeModel | None = None
    epsilon: float = 0.05

    # ------------------------------------------------------------------ policies

    @property
    def criteria(self) -> list[str]:
        """Return the criteria that can be turned, learned gates first where there are some."""
        return sorted(self.test.criteria, key=lambda name: name != "gate")

    def thresholds(self, criterion: str) -> list[float]:
        """Return thresholds worth trying: rounded quantiles of the test split's scores."""
        early = self.test.score(criterion)[:, : max(1, self.test.n_layers - 1)]
        found = np.nanquantile(early, np.linspace(0, 1, POINTS))
        return sorted({float(f"{value:.3g}") for value in found})

    def at(self, criterion: str, threshold: float) -> ExitPolicy:
        """Return the policy of one threshold for all layers; who reaches the last is not judged."""
        never = CRITERIA[criterion].never
        return ExitPolicy(criterion, (threshold,) * (self.test.n_layers - 1) + (never,))

    def within(self, criterion: str, epsilon: float) -> ExitPolicy:
        """Return the fastest such policy within ``epsilon`` on the fit part; else full depth."""
        try:
            return fit_policy(self.fit, criterion, epsilon, "global")
        except Unreachable:
            return ExitPolicy.static(self.test.n_layers, self.test.n_layers)

    # ------------------------------------------------------------------ numbers

    def read_out(self, policy: ExitPolicy) -> pd.Series:
        """Return what a policy does on the test split.

        Returns:
            ``perplexity``, ``quality_loss``, ``speedup_layers``, ``speedup_flops`` (checks, propagation
            and output head counted), and ``speedup_time``: predicted wall-clock of a batch, output head
            included, or NaN where work of it has no price.
        """
        read, shares = self.test.evaluate(policy), self.shares(policy)
        flops = policy_flops(self.model, shares, policy)["speedup_flops"]
        return pd.Series(
            {name: read[name] for name in ("perplexity", "quality_loss", "speedup_layers")}
            | {"speedup_flops": flops, "speedup_time": self._speedup_time(policy, shares)}
        )

    def shares(self, policy: ExitPolicy) -> np.ndarray:
        """Return the share of test tokens that execute 1 … L layers and leave there ``(L + 1,)``.

        The last is of tokens that no threshold let go.
        """
        return self.test.exit_distribution(self.test.exit_layers(policy))

    def _speedup_time(self, policy: ExitPolicy, shares: np.ndarray) -> float:
        if self.prices is None:
            return np.nan
        if not any(map(policy.checks, range(self.test.n_layers))):
            return 1.0  # nothing is checked: it is the run at full depth
        load = Load(self.model.config, BATCH, self.test.n_seq, policy.criterion, tuple(shares))
        return np.nan if unpriced(self.prices, load) else self.prices.speedup(load)

    # ------------------------------------------------------------------ texts

    @cached_property
    def first_words(self) -> Passage:
        """Return the beginning of the test split."""
        ids = self.test.target[:SHOWN]
        return Passage(self.corpus.decode(ids), ids != self.corpus.unk_id, self.test)

    def passage(self, text: str) -> Passage:
        """Run the model once, at full depth, over a text of the reader's own.

        Raises:
            TypeError, ValueError: the text is no string, or has no word.
        """
        split = encode_texts(self.corpus, [text], "pasted")
        trace = collect_trace(self.model, split, self.corpus.eos_id)
        words = self.corpus.decode(split.ids[:SHOWN])
        known = split.ids[:SHOWN] != self.corpus.unk_id
        own = as_written(self.corpus, text, SHOWN)
        shown = [w if k else o for w, k, o in zip(words, known, own, strict=False)]
        return Passage(shown, known, trace)

    def read(self, policy: ExitPolicy, passage: Passage) -> pd.DataFrame:
        """Return a passage word by word: columns word, known, layers (executed), nll (at the exit)."""
        trace, shown = passage.trace, len(passage.words)
        layers = layers_executed(trace.exit_layers(policy), trace.n_layers)[:shown]
        nll = trace.nll[np.arange(shown), layers - 1]
        return pd.DataFrame(
            {"word": passage.words, "known": passage.known, "layers": layers, "nll": nll}
        )

    # ------------------------------------------------------------------ what is shown

    def numbers_html(self, policy: ExitPolicy) -> str:
        """Return a table of :meth:`read_out`, and bars of :meth:`shares`."""
        read, full = self.read_out(policy), np.exp(self.test.full_nll)
        time, unit = f"{read['speedup_time']:.2f}×", self._unit_of_time()
        if np.isnan(read["speedup_time"]):
            time, unit = "–", "no price of this work is known"
        rows = [
            ("quality loss", f"{read['quality_loss']:+.1%}",
             f"perplexity {read['perplexity']:.1f} beside {full:.1f} at full depth, test split"),
            ("speedup, layers", f"{read['speedup_layers']:.2f}×", "layers executed"),
            ("speedup, FLOPs", f"{read['speedup_flops']:.2f}×", "checks and output head counted"),
            ("speedup, wall-clock", time, unit),
        ]  # fmt: skip
        cells = "".join(
            f"<tr><td>{name}</td><td><b>{value}</b></td><td>{html.escape(note)}</td></tr>"
            for name, value, note in rows
        )
        bars = "".join(
            f"<tr><td>{name}</td><td>{share:.1%}</td><td><div style='background:{colour};"
            f"width:{max(1, round(300 * share))}px;height:1em'></div></td></tr>"
            for name, share, colour in self._bars(policy)
        )
        style = "<style>.exits td{padding:1px 6px;line-height:1.3;text-align:left}</style>"
        return f"{style}<table class='exits'>{cells}</table><table class='exits'>{bars}</table>"

    def passage_html(self, policy: ExitPolicy, passage: Passage) -> str:
        """Return a passage on the colours of the layers executed, and its own quality."""
        from earlyexit.figures.study import coloured_words  # matplotlib is slow to import

        table, read = self.read(policy, passage), passage.trace.evaluate(policy)
        total, unknown = passage.trace.n_tokens, int((~passage.known).sum())
        text = coloured_words(passage.words, table["layers"], self.test.n_layers, ~passage.known)
        said = f"The first {len(table)} of {total:,} words." if total > len(table) else ""
        said += f" {unknown} unknown, struck out." if unknown else ""
        return (
            f"<p>{said} All of the text: perplexity {read['perplexity']:.1f}"
            f" ({read['quality_loss']:+.1%} against full depth), {read['layers']:.2f} layers.</p>{text}"
        )

    def _unit_of_time(self) -> str:
        where = self.prices.machine if self.prices else {}
        on, told = "this machine", ""
        if hardware := where.get("hardware"):
            on = f"{hardware['cpu']}, {hardware['threads']} thread(s)"
            told = f", measured by {where['made_by']} of this project"
        return f"{BATCH} × {self.test.n_seq} tokens, predicted from prices of work on {on}{told}"

    def _bars(self, policy: ExitPolicy) -> list[tuple[str, float, str]]:
        from earlyexit.figures.style import layer_colours, layers_text

        shares, n_layers = self.shares(policy), self.test.n_layers
        executed = [*shares[: n_layers - 1], shares[n_layers - 1 :].sum()]
        names = [layers_text(k + 1) for k in range(n_layers)]
        return list(zip(names, executed, layer_colours(n_layers), strict=True))

    def widget(self) -> VBox:
        """Return the sliders, and what they move."""
        import ipywidgets as w

        def wide(kind: type, description: str, **options):
            shape = {"layout": w.Layout(width="34em"), "style": {"description_width": "9em"}}
            return kind(description=description, **shape, **options)

        labels = [(CRITERIA[name].label, name) for name in self.criteria]
        criterion = wide(w.Dropdown, "signal", options=labels)
        turned = w.ToggleButtons(options=["tolerated loss", "threshold"])
        losses = [(f"{e:.1%}", e) for e in sorted({*EPSILONS, self.epsilon})]
        epsilon = wide(
            w.SelectionSlider, "tolerated loss",
            options=losses, value=self.epsilon, continuous_update=False,
        )  # fmt: skip
        threshold = wide(w.SelectionSlider, "threshold", options=[0.0])
        hint = "Paste a text of your own, then click elsewhere."
        pasted = wide(w.Textarea, "text", placeholder=hint, continuous_update=False)
        numbers, coloured, passages = w.HTML(), w.HTML(), [self.first_words]

        def show(_=None) -> None:
            by_loss = turned.value == "tolerated loss"
            epsilon.layout.display = None if by_loss else "none"
            threshold.layout.display = "none" if by_loss else None
            name = criterion.value
            policy = self.within(name, epsilon.value) if by_loss else self.at(name, threshold.value)
            numbers.value = self.numbers_html(policy)
            coloured.value = self.passage_html(policy, passages[0])

        def rescale(_=None) -> None:
            found = self.thresholds(criterion.value)
            threshold.options = [(f"{value:.3g}", value) for value in found]
            show()

        def read(_=None) -> None:
            given = pasted.value.strip()
            passages[0] = self.passage(given) if given else self.first_words
            show()

        rescale()
        criterion.observe(rescale, "value")
        pasted.observe(read, "value")
        for control in (turned, epsilon, threshold):
            control.observe(show, "value")
        return w.VBox([criterion, turned, epsilon, threshold, numbers, pasted, coloured])

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """Return the widget, and for pages without a kernel how it stands first."""
        policy = self.within(self.criteria[0], self.epsilon)
        still = self.numbers_html(policy) + self.passage_html(policy, self.first_words)
        return self.widget()._repr_mimebundle_(**kwargs) | {"text/html": still}
