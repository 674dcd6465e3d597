"""The README's number blocks, written from the results they quote.

A block stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. ``BLOCKS`` maps its name
to a function from the project's root to Markdown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

from earlyexit import claims
from earlyexit.artifacts import MissingResult, read_table
from earlyexit.atomic import atomic_path
from earlyexit.exits import CRITERIA
from earlyexit.paths import project
from earlyexit.receipts import all_receipts

QUOTED = ("cpu", "wikitext2")  # the profiles whose results the README may quote
PROFILE = "cpu"  # whose numbers the blocks quote
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
    """What early exit saves in the default study, in three sentences."""
    real = read_table(PROFILE, "real_runs", root)
    parts = read_table(PROFILE, "part_times", root).set_index(["group", "part"])["share_of_block"]
    speed = read_table(PROFILE, "speedups", root)
    fitted = read_table(PROFILE, "policies", root)
    fitted = fitted[(fitted["tolerance"] == 0.05) & (fitted["thresholds"] == "per_layer")]
    fitted = fitted.groupby("criterion").mean(numeric_only=True)
    gate, naive = fitted.loc["gate"], fitted.loc["max_probability"]
    maximum, cheap = (CRITERIA[c].label for c in ("max_probability", "saturation"))
    original = speed[speed["execution"] == "original's procedure"]["speedup_time"]
    gap = (real["real_perplexity"] / real["trace_perplexity"] - 1).abs().max()
    return " ".join(
        [
            f"At a tolerated loss of 5 %, a learned gate that never touches the vocabulary saves"
            f" **{gate['speedup_layers']:.2f}×** in layers (loss on the test split"
            f" {gate['quality_loss']:.1%}); maximum probability saves {naive['speedup_layers']:.2f}×,"
            f" simply cutting layers off {gate['static_speedup']:.2f}×, and perfect hindsight about"
            f" the last layer's prediction {gate['oracle_speedup']:.2f}×.",
            f"A check that reads the vocabulary takes **{parts['check', maximum]:.0%}** of a layer's"
            f" time (documented: {claims.CHECK_SHARE + claims.CONFIDENCE_SHARE:.0%}), one that reads"
            f" the hidden state {parts['check', cheap]:.1%}; the original's procedure runs at"
            f" **{original.min():.2f}× to {original.max():.2f}×** the speed of its own plain model.",
            f"Run for real, with exited tokens leaving the computation, the perplexity differs from"
            f" the trace's promise by at most {gap:.2%}.",
        ]
    )


def claims_block(root: Path) -> str:
    """The original's table beside the same thresholds, run for real."""
    table = read_table(PROFILE, "original_claims", root).groupby("threshold").mean()
    lines = [
        "| threshold | claimed speedup | claimed loss | measured speedup (layers) | measured loss"
        " | tokens leaving early |",
        "|---|---|---|---|---|---|",
    ]
    for threshold, row in table.iterrows():
        lines.append(
            f"| {threshold:.2f} | {row['claimed_speedup']:.1f}× | {row['claimed_quality_loss']:+.1%}"
            f" | {row['measured_speedup_layers']:.2f}× | {row['measured_quality_loss']:+.1%}"
            f" | {row['exited_early']:.1%} |"
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
        lines.append(f"| {epsilon:.0%} | {policy} | {units} | {speed} | {loss} |")
    worst = audit.loc[audit.groupby("procedure", sort=False)["rate"].idxmax()]
    told = "; ".join(f"{row.procedure}: {row.rate:.1%}" for row in worst.itertuples())
    lines += ["", f"Largest violation rate over resampled units (allowed: 5 %): {told}."]
    return "\n".join(lines)


def text_block(root: Path) -> str:
    """Text, model and machine behind the numbers."""
    text = read_table(PROFILE, "text", root).set_index("split")
    exits = read_table(PROFILE, "exits_after_training", root)
    last = exits[exits["exit"] == exits["exit"].max()]["perplexity"].mean()
    hardware = next(r["hardware"] for r in all_receipts(project(root)) if r["label"] == PROFILE)
    return (
        f"Profile `{PROFILE}`: {text.loc['train', 'tokens']:,} training tokens,"
        f" {exits['exit'].nunique()} layers, validation perplexity {last:.0f} at full depth,"
        f" {text.loc['test', 'unknown_share']:.1%} unknown words in the test split;"
        f" {hardware['cpu']}, {hardware['cores']} cores, no GPU."
    )


BLOCKS: dict[str, Callable[[Path], str]] = {
    "answer": answer_block,
    "claims": claims_block,
    "guarantee": guarantee_block,
    "text": text_block,
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
