"""The benchmark measures ratios of median times, interleaved, and compares them with targets.

Models have random weights and constructed exits unless a checkpoint is given, because time depends on
how many tokens run each layer, not on their meaning. Quality is not measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from earlyexit.cost.breakdown import ORIGINAL, compaction_speedups, part_functions
from earlyexit.cost.parts import FULL_DEPTH, batch_speedups
from earlyexit.cost.synthetic import (
    geometric_shares,
    policy_for_shares,
    random_model,
    random_tokens,
)
from earlyexit.cost.timing import interleaved_times, median_ratio
from earlyexit.exits.api import EarlyExitModel
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.original import original_early_exit
from earlyexit.nn.bk_core import BKCore
from earlyexit.nn.block import MoEResNetBKLayer
from earlyexit.nn.config import ModelConfig

NAME = 58  # characters of a row's name
LAYERS_ONLY = 2  # words: with so small a vocabulary, only the layers take time
SMALL = ModelConfig(10_000, 64, 4, dropout_p=0.0, gate_hidden=0)
LARGE = ModelConfig(10_000, 256, 8, dropout_p=0.0, gate_hidden=0)


@dataclass(frozen=True)
class Row:
    """A row holds one measured ratio and its target.

    Attributes:
        name: what was measured.
        value: the ratio of medians; low, high: its bootstrap interval over repeats, NaN without one.
        unit: "×", "share" or "slope".
        target: the value to reach; ``at_least`` says whether it is a lower or an upper limit.
        note: which speedup it is, and the sizes it was measured with.
    """

    name: str
    value: float
    unit: str
    target: float | None
    at_least: bool
    note: str
    low: float = float("nan")
    high: float = float("nan")

    @classmethod
    def measured(cls, name: str, ratio: Sequence[float], *rest) -> Row:
        """Build a row from a name, the result of :func:`median_ratio`, and the fields after value."""
        value, low, high = map(float, ratio)
        return cls(name, value, *rest, low, high)

    @property
    def verdict(self) -> str:
        """Return "met" or "missed" if the whole interval agrees, else "unclear"; "" without target."""
        if self.target is None:
            return ""
        ends = [self.value] if np.isnan(self.low) else [self.low, self.high]
        reached = [(end >= self.target) if self.at_least else (end <= self.target) for end in ends]
        return "met" if all(reached) else "unclear" if any(reached) else "missed"

    def to_dict(self) -> dict:
        """Return the fields and the verdict as plain JSON, in which NaN is null."""
        row = asdict(self) | {"verdict": self.verdict}
        return {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()}


@dataclass(frozen=True)
class Bench:
    """A benchmark has sections, and each section yields rows.

    Args:
        device: where the models run.
        repeats: interleaved repeats of each run; medians are taken over them.
        quick: whether sizes are small, so that it takes seconds instead of minutes.
        model: a trained model, used for the end-to-end rows instead of random ones.
    """

    device: torch.device
    repeats: int = 7
    quick: bool = False
    model: EarlyExitModel | None = None

    @property
    def batch(self) -> int:
        """Return the number of windows in a batch."""
        return 8 if self.quick else 32

    def sections(self) -> dict[str, Callable[[], Iterator[Row]]]:
        """Return the function that measures each section, by the section's name."""
        out = {
            "BK-Core": self.recursion,
            "BK-Core, length": self.recursion_length,
            "gate check": self.gate_check,
            "compaction": self.compaction,
            "length": self.length,
        }
        if self.model is not None:
            return out | {"end to end, given model": partial(self.end_to_end, self.model, None)}
        for config, depth in ((SMALL, 2.0), (LARGE, 4.0)):
            for head in ("linear", "adaptive"):
                name = f"end to end, d={config.d_model}, {head} head"
                sized = replace(config, output_head=head, tie_embeddings=None)
                out[name] = partial(self._random_end_to_end, sized, depth)
        return out

    # ------------------------------------------------------------------ sections

    def recursion(self) -> Iterator[Row]:
        """Time BK-Core, and its diagonal alone, against a loop over positions and against a layer."""
        layer = MoEResNetBKLayer(**asdict(SMALL)).to(self.device).eval()
        core, u = layer.mixing.bk_core, torch.randn(32, 128, SMALL.d_model, device=self.device)
        given = layer.contribution(u).detach()
        diagonal, v = BKCore(core.n_heads).to(self.device), given[..., : core.n_heads].contiguous()
        runs = {
            "loop": partial(position_loop, core, given),
            "core": partial(core, given),
            "loop of g": partial(position_loop, diagonal, v),
            "g": partial(diagonal, v),
            "layer": partial(layer, u),
        }
        seconds = self._times(runs)
        ms = {name: f"{1e3 * np.median(taken):.2g} ms" for name, taken in seconds.items()}
        sizes = f"batch 32, N=128, {core.n_heads} heads"
        valued = f"{sizes} of {core.n_values} values, d={SMALL.d_model}"
        ratio = median_ratio(seconds["loop"], seconds["core"])
        note = f"wall-clock, {ms['loop']} / {ms['core']}; {valued}"
        yield Row.measured("BK-Core against a loop over positions", ratio, "×", 20, True, note)
        ratio = median_ratio(seconds["loop of g"], seconds["g"])
        note = f"wall-clock, {ms['loop of g']} / {ms['g']}; {sizes}"
        yield Row.measured("its diagonal against a loop over positions", ratio, "×", 20, True, note)
        share = median_ratio(seconds["core"], seconds["layer"])
        note = f"of a layer's wall-clock without gradients, {ms['core']} / {ms['layer']}; {valued}"
        yield Row.measured("BK-Core in a layer", share, "share", None, False, note)

    def recursion_length(self) -> Iterator[Row]:
        """Measure how the time of BK-Core on values grows with the length N."""
        # So few heads that the features of 65,536 positions stay below the 32 MB from which the C
        # library maps new pages at every call, which takes longer than the recursion.
        core = BKCore(8, n_values=4).to(self.device)
        lengths = [1024, 4096, 16384] if self.quick else [1024, 4096, 16384, 65536]
        rows = {n: torch.randn(1, n, 8 + 8 * 4, device=self.device) for n in lengths}
        slope = self._slope({n: partial(core, row) for n, row in rows.items()})
        note = f"slope of log time over log N, N={lengths[0]:,} … {lengths[-1]:,}; linear is 1"
        note += "; 8 heads of 4 values"
        yield Row("BK-Core, growth with the length", slope, "slope", 1.1, False, note)

    def gate_check(self) -> Iterator[Row]:
        """Time a gate's check as a share of the layer before it."""
        config = replace(LARGE, vocab_size=LAYERS_ONLY, n_layers=2)
        model = random_model(config).to(self.device)
        functions = part_functions(model, self._tokens(config))
        runs = {
            "check": functions["check", CRITERIA["gate"].label],
            "layer": functions["whole", "block"],
        }
        share = self._ratio(runs, "check", "layer", 3)
        note = f"of a layer's wall-clock; d=256, batch {self.batch} × 128; score, compare, one transfer"
        yield Row.measured("gate check", share, "share", 0.03, False, note)

    def compaction(self) -> Iterator[Row]:
        """Measure the share of the FLOP speedup that wall-clock time shows, in the layers alone."""
        config = replace(LARGE, vocab_size=LAYERS_ONLY)
        model, x = random_model(config).to(self.device), self._tokens(config)
        depths = (2.0, 4.0) if self.quick else (2.0, 3.0, 4.0, 5.0, 6.0)
        policies = {
            depth: policy_for_shares(model, x, geometric_shares(config.n_layers, depth))
            for depth in depths
        }
        for row in compaction_speedups(model, x, policies, self.repeats).itertuples():
            ratio = np.array([row.speedup_time, row.low, row.high])
            note = (
                f"wall-clock {row.speedup_time:.2f}× / FLOPs {row.speedup_flops:.2f}× / layers"
                f" {row.speedup_layers:.2f}×; d=256, L=8, no vocabulary"
            )
            name = f"compacted, mean depth {row.depth:g} of 8: wall-clock / FLOPs"
            yield Row.measured(name, ratio / row.speedup_flops, "share", 0.9, True, note)

    def length(self) -> Iterator[Row]:
        """Measure how the time of the whole model grows with the length of its windows."""
        lengths = [128, 512, 2048] if self.quick else [128, 512, 2048, 8192]
        config = replace(SMALL, vocab_size=LAYERS_ONLY, n_seq=lengths[-1])
        model, runs = random_model(config).to(self.device), {}
        shares = geometric_shares(config.n_layers, 2.0)
        for n in lengths:
            x = random_tokens(config, 4, n).to(self.device)
            runs[n] = partial(model.nll, x, x, policy_for_shares(model, x, shares))
        slope = self._slope(runs)
        note = (
            f"slope of log time over log N, N={lengths[0]} … {lengths[-1]}, 4 windows, d=64, L=4,"
            " compacted, mean depth 2, no vocabulary; linear is 1"
        )
        yield Row("compacted, growth with the length", slope, "slope", 1.1, False, note)

    def end_to_end(self, model: EarlyExitModel, depth: float | None) -> Iterator[Row]:
        """Time scoring, head included, against full depth and against the original's procedure."""
        config = model.config
        x = random_tokens(config, self.batch, min(128, config.n_seq)).to(self.device)
        depth = depth or (config.n_layers + 1) / 2
        shares = geometric_shares(config.n_layers, depth)
        criterion = "gate" if model.gates is not None and model.gates.trained else "saturation"
        policy = policy_for_shares(model, x, shares, criterion)
        first = policy_for_shares(model, x[: max(1, len(x) // 8)], shares, "max_probability")
        threshold = next((t for t in first.thresholds if np.isfinite(t)), 1.0)
        runs = {
            FULL_DEPTH: partial(model.nll, x, x),
            "compacted": partial(model.nll, x, x, policy),
            ORIGINAL: partial(original_early_exit, model, x, threshold),
        }
        seconds = self._times(runs, max(3, self.repeats // 2))
        flops = batch_speedups(model, x, x, policy)["speedup_flops"]
        what = f"d={config.d_model}, L={config.n_layers}, V={config.vocab_size:,}"
        what += f", {config.output_head} head"
        setting = f"{what}; {criterion}, mean depth {depth:g}; quality is not measured here"
        hoped = {64: 1.6, 256: 2.0}.get(config.d_model) if self.model is None else None
        ratio = np.array(median_ratio(seconds[FULL_DEPTH], seconds["compacted"]))
        note = f"wall-clock, head included, same head; FLOPs {flops:.2f}×; {setting}"
        yield Row.measured(f"{what}: full depth / compacted", ratio, "×", hoped, True, note)
        name = f"{what}: wall-clock / FLOPs"
        yield Row.measured(name, ratio / flops, "share", 0.9, True, setting)
        ratio = median_ratio(seconds[ORIGINAL], seconds["compacted"])
        note = f"wall-clock, same weights, exits of the same mean depth; {setting}"
        yield Row.measured(f"{what}: {ORIGINAL} / compacted", ratio, "×", 10, True, note)

    # ------------------------------------------------------------------ tools

    def _random_end_to_end(self, config: ModelConfig, depth: float) -> Iterator[Row]:
        yield from self.end_to_end(random_model(config).to(self.device), depth)

    def _tokens(self, config: ModelConfig) -> Tensor:
        return random_tokens(config, self.batch, 128).to(self.device)

    @torch.no_grad()
    def _times(self, runs: dict, repeats: int | None = None) -> dict:
        return interleaved_times(runs, self.device, repeats or self.repeats)

    def _ratio(
        self, runs: dict, top: str, bottom: str, more: int = 1
    ) -> tuple[float, float, float]:
        seconds = self._times(runs, more * self.repeats)
        return median_ratio(seconds[top], seconds[bottom])

    def _slope(self, runs: dict[int, Callable[[], object]]) -> float:
        seconds = self._times(runs)
        medians = [np.median(seconds[n]) for n in runs]
        return float(np.polyfit(np.log(list(runs)), np.log(medians), 1)[0])


@torch.no_grad()
def position_loop(core: BKCore, given: Tensor) -> Tensor:
    """Compute a causal BK-Core's features ``(B, N, 2H + 2H·P)`` by a loop in torch over positions."""
    eta, t, out = core.eta, core.t, []
    v, b = given.tensor_split([core.n_heads], dim=-1)
    alpha = torch.complex(v - 2 * t, (-eta).expand_as(v))
    b = b.unflatten(-1, (core.n_heads, core.n_values))
    g, y = torch.zeros_like(alpha[:, 0]), torch.zeros_like(b[:, 0])
    for i in range(given.shape[1]):
        g = 1 / (alpha[:, i] - t**2 * g)
        y = g[..., None] * (b[:, i] - t[:, None] * y)
        out.append(torch.cat([g.real, g.imag, y.real.flatten(1), y.imag.flatten(1)], dim=-1))
    return torch.stack(out, dim=1)


def conditions(device: torch.device) -> dict:
    """Describe the machine; a load above 0 before the start means that others used it too."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load_before": round(load, 2),
        "torch": torch.__version__,
    }


def table(rows: Sequence[Row]) -> str:
    """Format rows as lines of text, whose columns stand below each other however they are cut."""
    lines = []
    for row in rows:
        value, target, interval = _amount(row.value, row.unit), "", ""
        if row.target is not None:
            target = f"{'≥' if row.at_least else '≤'} {_amount(row.target, row.unit)}"
        if not np.isnan(row.low):
            interval = f"[{_amount(row.low, row.unit)}, {_amount(row.high, row.unit)}]"
        lines.append(
            f"{row.name:<{NAME}}  {value:>8}  {interval:<18}  {target:>9}  {row.verdict:<7}  {row.note}"
        )
    return "\n".join(lines)


def _amount(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{value:.2f}" + ("×" if unit == "×" else "")
