"""The README's number blocks, written from the results they quote.

A block stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. ``BLOCKS`` maps its name
to a function from the project's root to Markdown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from earlyexit.artifacts import MissingResult, read_table
from earlyexit.atomic import atomic_path
from earlyexit.paths import project
from earlyexit.profiles import PROFILES
from earlyexit.receipts import all_receipts

QUOTED = ("cpu", "wikitext2")  # the profiles whose results the README may quote
PROFILE = "cpu"  # whose numbers the blocks quote, unless their name says otherwise
SAMPLE = "wikitext2~max_eval_tokens=40000"  # a shorter evaluation of the same models
BUDGET = 0.05  # the tolerated quality loss they speak of
_BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def status_block(root: Path) -> str:
    """Which profiles have results, from which commit and day, on which processor."""
    lines = ["| profile | notebooks | commit | day | processor |", "|---|---|---|---|---|"]
    receipts = all_receipts(project(root))
    for profile in QUOTED:
        own = [r for r in receipts if r["label"] == profile]
        if not own:
            lines.append(f"| {profile} | none yet: `{_command(profile)}` | | | |")
            continue
        last = max(own, key=lambda r: r["time"])
        commit = (last["commit"] or "none")[:10] + (" + changes" if last["dirty"] else "")
        day, processor = last["time"][:10], last["hardware"]["cpu"]
        lines.append(f"| {profile} | {len(own)} | {commit} | {day} | {processor} |")
    return "\n".join(lines)


def answer_block(root: Path) -> str:
    """What early exit saves, in three sentences."""
    front = read_table(PROFILE, "front", root)
    gates = front[(front["criterion"] == "gate") & (front["threshold"] == BUDGET)]
    gate = gates.mean(numeric_only=True)
    fitted = read_table(PROFILE, "policies", root)
    fitted = fitted[(fitted["tolerance"] == BUDGET) & (fitted["thresholds"] == "per_layer")]
    fitted = fitted.groupby("criterion").mean(numeric_only=True)
    equal = read_table(PROFILE, "equal_cost", root)
    row = equal[equal["depth"] == equal["depth"].max()].mean(numeric_only=True)
    naive, cut, oracle = (
        fitted.loc["max_probability", "speedup_layers"],
        fitted.loc["gate", "static_speedup"],
        fitted.loc["gate", "oracle_speedup"],
    )
    tokens = PROFILES[PROFILE].recipe_tokens
    amount = f"both on {tokens:,} tokens" if tokens else "on the same text"
    return (
        f"At a tolerated loss of {BUDGET:.0%}, a learned gate that never touches the vocabulary"
        f" saves **{gate['speedup_layers']:.2f}× in layers, {gate['speedup_flops']:.2f}× in FLOPs"
        f" and {gate['speedup_time']:.2f}× in time**, at a loss of {gate['quality_loss']:+.1%} on"
        " the test split: every token still pays for its projection to the vocabulary."
        f" In layers, maximum probability saves {naive:.2f}×, cutting layers off {cut:.2f}×, and"
        f" hindsight about the last layer's prediction {oracle:.2f}×."
        f" Against a model of {row['depth']:.0f} layers that costs the same and was trained without"
        f" exits ({amount}), the adaptive model's perplexity is {_verdict(row)}:"
        f" {row['difference']:+.1%} (95 % interval {row['low']:+.1%} to {row['high']:+.1%})."
    )


def claims_block(root: Path) -> str:
    """The original's table beside the same thresholds, run for real."""
    table = read_table(PROFILE, "claims", root).groupby("threshold").mean()
    lines = [
        "| threshold | claimed | measured: layers | FLOPs | wall-clock | loss | leave early |"
        " certified within the claimed loss (layers) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for threshold, row in table.iterrows():
        certified = row["certified_speedup_layers"]
        lines.append(
            f"| {threshold:.2f} | {row['claimed_speedup']:.1f}× at {row['claimed_loss']:+.1%}"
            f" | {row['measured_speedup_layers']:.2f}× | {row['measured_speedup_flops']:.2f}×"
            f" | {row['measured_speedup_time']:.2f}× | {row['measured_loss']:+.1%}"
            f" | {row['exited_early']:.1%}"
            f" | {'none' if math.isnan(certified) else f'{certified:.2f}×'} |"
        )
    return "\n".join(lines)


def guarantee_block(root: Path) -> str:
    """Certified policies, what they achieve on the test split, and the audit."""
    table = read_table(PROFILE, "certificates", root)
    audit = read_table(PROFILE, "audit", root)
    lines = [
        "| ε | policy | units | speedup (layers), test | loss, test |",
        "|---|---|---|---|---|",
    ]
    for (epsilon, policy), rows in table.groupby(["epsilon", "policy"], sort=False):
        row = rows.mean(numeric_only=True)
        units = "" if math.isnan(row.get("n", math.nan)) else f"{row['n']:.0f}"
        refused = math.isnan(row.get("test_speedup_layers", math.nan))
        speed = "refused" if refused else f"{row['test_speedup_layers']:.2f}×"
        loss = "" if refused else f"{row['test_quality_loss']:+.1%}"
        lines.append(f"| {epsilon:.1%} | {policy} | {units} | {speed} | {loss} |")
    worst = audit.loc[audit.groupby("procedure", sort=False)["rate"].idxmax()]
    told = "; ".join(f"{row.procedure}: {row.rate:.1%}" for row in worst.itertuples())
    lines += ["", f"Largest violation rate over resampled units (allowed: 5 %): {told}."]
    return "\n".join(lines)


def text_block(root: Path) -> str:
    """Text, model and machine behind the numbers."""
    text = read_table(PROFILE, "text", root).set_index("split")
    front = read_table(PROFILE, "front", root)
    full = (front["perplexity"] / (1 + front["quality_loss"])).mean()
    hardware = next(r["hardware"] for r in all_receipts(project(root)) if r["label"] == PROFILE)
    return (
        f"Profile `{PROFILE}`: {text.loc['train', 'tokens']:,} training tokens,"
        f" {front['seed'].nunique()} seed(s), test perplexity {full:.0f} at full depth,"
        f" {text.loc['test', 'unknown_share']:.1%} unknown words in the test split;"
        f" {hardware['cpu']}, {hardware['usable_cpus']} cores, no GPU."
    )


def wikitext2_block(root: Path) -> str:
    """Fitted and certified gate policies on the original's test set, over the seeds."""
    certified = read_table("wikitext2", "certificates", root)
    exits = read_table("wikitext2", "exits_after_training", root)
    per_exit = exits.groupby("exit")["perplexity"].mean()
    lines = [
        f"Validation perplexity per exit {' / '.join(f'{p:.0f}' for p in per_exit)}, mean of"
        f" {exits['seed'].nunique()} seeds. Below, the whole test set; least to largest over the"
        " seeds in brackets.",
        "",
        "| ε | policy | units | speedup (layers), test | loss, test |",
        "|---|---|---|---|---|",
    ]
    for (epsilon, policy), rows in certified.groupby(["epsilon", "policy"], sort=False):
        units = "" if rows["n"].isna().all() else f"{rows['n'].max():.0f}"
        shown = rows.dropna(subset="test_speedup_layers")
        speed = f"{_span(shown['test_speedup_layers'])}×" if len(shown) else "refused"
        loss = _span(shown["test_quality_loss"], "+.1%") if len(shown) else ""
        lines.append(f"| {epsilon:.1%} | {policy} | {units} | {speed} | {loss} |")
    return "\n".join([*lines, "", _wikitext2_sample(root)])


def _wikitext2_sample(root: Path) -> str:
    """Criteria, the original's threshold and a shallow model, on a part of the test set."""
    fitted = read_table(SAMPLE, "policies", root)
    fitted = fitted[(fitted["tolerance"] == BUDGET) & (fitted["thresholds"] == "per_layer")]
    fitted = fitted.groupby("criterion").mean(numeric_only=True)
    claim = read_table(SAMPLE, "original_claims", root).groupby("threshold").mean().iloc[0]
    quality = read_table(SAMPLE, "exit_quality", root).groupby("exit")["perplexity"].mean()
    recipes = read_table(SAMPLE, "recipes", root)
    last = (
        recipes[recipes["exit"] == recipes["exit"].max()].groupby("recipe").mean(numeric_only=True)
    )
    equal = read_table(SAMPLE, "equal_cost", root).mean(numeric_only=True)
    joint, gate = last.loc["joint"], fitted.loc["gate"]
    return (
        f"On 40,000 tokens of the test set (one seed, perplexity {quality.iloc[-1]:.0f} at full depth),"
        f" within {BUDGET:.0%}, in layers: gate {gate['speedup_layers']:.2f}×, maximum probability"
        f" {fitted.loc['max_probability', 'speedup_layers']:.2f}×, entropy"
        f" {fitted.loc['entropy', 'speedup_layers']:.2f}×, cutting layers off"
        f" {gate['static_speedup']:.2f}×, hindsight about the last layer"
        f" {gate['oracle_speedup']:.2f}×. The original's lowest threshold gives"
        f" {claim['measured_speedup_layers']:.2f}× where {claim['claimed_speedup']:.1f}× is claimed."
        f" Joint training moves the last layer by {joint['last_vs_twin']:+.1%}"
        f" (± {joint['last_vs_twin_half_interval']:.1%}) against a twin without exits. Against a model"
        f" of {equal['depth']:.0f} layers that costs the same FLOPs and was trained without exits, the"
        f" adaptive perplexity is {_verdict(equal)}: {equal['difference']:+.1%}"
        f" ({equal['low']:+.1%} to {equal['high']:+.1%})."
    )


def _verdict(row: pd.Series) -> str:
    """What the interval of a perplexity difference says."""
    return "better" if row["high"] < 0 else "worse" if row["low"] > 0 else "not distinguishable"


def _span(values: pd.Series, form: str = ".2f") -> str:
    """Mean, and least to largest where they differ."""
    mean, ends = f"{values.mean():{form}}", [f"{v:{form}}" for v in (values.min(), values.max())]
    return mean if ends[0] == ends[1] else f"{mean} [{ends[0]}, {ends[1]}]"


BLOCKS: dict[str, Callable[[Path], str]] = {
    "answer": answer_block,
    "claims": claims_block,
    "guarantee": guarantee_block,
    "text": text_block,
    "wikitext2": wikitext2_block,
    "status": status_block,
}


def update(readme: Path, root: str | Path | None = None) -> list[str]:
    """Rewrite the blocks that differ; returns their names.

    Raises:
        ValueError: a block of a name that is not in ``BLOCKS``.
    """
    stale = check(readme, root)
    if stale:
        text = _render(readme.read_text(encoding="utf-8"), project(root).root)
        with atomic_path(readme) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return stale


def check(readme: Path, root: str | Path | None = None) -> list[str]:
    """The names of the blocks that differ from the results.

    Raises:
        ValueError: a block of a name that is not in ``BLOCKS``.
    """
    before = readme.read_text(encoding="utf-8")
    after = _render(before, project(root).root)
    pairs = zip(_BLOCK.findall(before), _BLOCK.findall(after), strict=True)
    return [old[1] for old, new in pairs if old != new]


def _render(text: str, root: Path) -> str:
    def block(match: re.Match[str]) -> str:
        start, name, _, end = match.groups()
        if name not in BLOCKS:
            raise ValueError(f"README block {name!r} is unknown; there are {', '.join(BLOCKS)}")
        try:
            content = BLOCKS[name](root)
        except MissingResult as error:
            content = f"*Results are missing: {error}.*"
        return f"{start}{content.strip()}\n{end}"

    return _BLOCK.sub(block, text)


def _command(profile: str) -> str:
    return f"python -m earlyexit run --profile {profile}"
