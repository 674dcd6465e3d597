"""The README's number blocks, written from the results they quote.

A block stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. ``BLOCKS`` maps its name
to a function from the project's root to Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from earlyexit.atomic import atomic_path
from earlyexit.calibration.audit import PROCEDURES
from earlyexit.runs.artifacts import MissingResult, read_json, read_table
from earlyexit.runs.freshness import all_receipts
from earlyexit.runs.paths import project
from earlyexit.runs.profiles import PROFILES

# The profiles whose results the README may quote; the first answers, its text is the original's.
QUOTED = ("wikitext2", "wikitext2-d256", "cpu", "recipes", "combinations")


BUDGET = 0.05  # the tolerated quality loss that the sentences speak of


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
        commits = dict.fromkeys(
            (r["commit"] or "none")[:10] + (" + changes" if r["dirty"] else "")
            for r in sorted(own, key=lambda r: r["time"])
        )
        commit = ", ".join(commits)
        day, processor = last["time"][:10], last["hardware"]["cpu"]
        lines.append(f"| {profile} | {len(own)} | {commit} | {day} | {processor} |")
    return "\n".join(lines)


def answer(profile: str, root: Path) -> str:
    """What early exit saves, in three sentences."""
    front = read_table(profile, "front", root)
    gate = front[(front["criterion"] == "gate") & (front["threshold"] == BUDGET)]
    fitted = read_table(profile, "policies", root)
    fitted = fitted[(fitted["tolerance"] == BUDGET) & (fitted["thresholds"] == "per_layer")]
    naive = fitted[fitted["criterion"] == "max_probability"]
    learned = fitted[fitted["criterion"] == "gate"]
    return (
        f"At a tolerated loss of {BUDGET:.0%}, a learned gate that never touches the vocabulary"
        f" saves **{_span(gate['speedup_layers'])}× in layers, {_span(gate['speedup_flops'])}× in"
        f" FLOPs and {_time(gate)}× in time**, output head included, at a loss of"
        f" {_span(gate['quality_loss'], '+.1%')} on the test split. In layers, maximum probability saves"
        f" {_span(naive['speedup_layers'])}×, cutting layers off"
        f" {_span(learned['static_speedup'])}× (at {_span(learned['static_loss'], '+.1%')}), and"
        f" hindsight about the last layer's prediction {_span(learned['oracle_speedup'])}×."
        f" {_against_shallow(profile, root)}"
    )


def _against_shallow(profile: str, root: Path) -> str:
    """The adaptive model against shallow ones of the same FLOPs."""
    tokens = PROFILES[profile].parameters("03_threshold_sweep").recipe_tokens
    amount = f", all on {tokens:,} tokens" if tokens else ""
    told = [
        f"{_span(rows['difference'], '+.1%')} against {depth:.0f} layer{'s' if depth > 1 else ''}"
        f" ({_verdict(rows)}{_dearer(rows)})"
        for depth, rows in read_table(profile, "equal_cost", root).groupby("depth")
    ]
    return (
        "Set to cost the same FLOPs as a shallow model trained without exits"
        f"{amount}, the adaptive model's perplexity differs by {'; '.join(told)}."
    )


def _verdict(rows: pd.DataFrame) -> str:
    """What the intervals of perplexity differences say, a seed each."""
    ends = f"95 % over documents: {rows['low'].min():+.1%} to {rows['high'].max():+.1%}"
    if (rows["low"] > 0).all():
        return f"worse; {ends}"
    return f"better; {ends}" if (rows["high"] < 0).all() else f"not told apart; {ends}"


def _dearer(rows: pd.DataFrame) -> str:
    """By how much the adaptive model costs more, where it cannot cost as little."""
    ratio = rows["adaptive_cost"].mean()
    return f"; at {ratio:.2f} times its cost, no exit being cheaper" if ratio > 1.01 else ""


def claims_block(profile: str, root: Path) -> str:
    """The original's table beside the same thresholds, run for real."""
    table = read_table(profile, "claims", root)
    lines = [
        "| threshold | claimed | measured: layers | FLOPs | wall-clock | loss | leave early |"
        " certified within the claimed loss (layers) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for threshold, rows in table.groupby("threshold"):
        claim, certified = rows.iloc[0], rows["certified_speedup_layers"].dropna()
        lines.append(
            f"| {threshold:.2f} | {claim['claimed_speedup']:.1f}× at {claim['claimed_loss']:+.1%}"
            f" | {_span(rows['measured_speedup_layers'])}×"
            f" | {_span(rows['measured_speedup_flops'])}×"
            f" | {_time(rows, 'measured_speedup_time')}× | {_span(rows['measured_loss'], '+.1%')}"
            f" | {_span(rows['exited_early'], '.1%')}"
            f" | {f'{_span(certified)}×' if len(certified) else 'none'} |"
        )
    return "\n".join(lines)


def guarantee_block(profile: str, root: Path) -> str:
    """Certified policies, what they achieve on the test split, and the audit."""
    audit = read_table(profile, "audit", root)
    lines = [
        "| ε | policy | units | speedup (layers), test | loss, test |",
        "|---|---|---|---|---|",
    ]
    certified = read_table(profile, "certificates", root)
    for (epsilon, policy), rows in certified.groupby(["epsilon", "policy"], sort=False):
        units = "" if rows["n"].isna().all() else f"{rows['n'].max():.0f}"
        shown = rows.dropna(subset="test_speedup_layers")
        speed = f"{_span(shown['test_speedup_layers'])}×" if len(shown) else "refused"
        loss = _span(shown["test_quality_loss"], "+.1%") if len(shown) else ""
        unsure = ", no guarantee" if policy == "certified by window" else ""
        lines.append(f"| {epsilon:.1%} | {policy}{unsure} | {units} | {speed} | {loss} |")
    documents = audit[audit["units"] == "documents, resampled"]
    good, bad = (documents[documents["procedure"] == p]["rate"].max() for p in PROCEDURES)
    lines += [
        "",
        f"Over certification documents drawn again and again, a certificate broke its ε in at most"
        f" {good:.1%} of the trials (allowed: 5 %); a known-bad control, which takes the first policy"
        f" that fails, in up to {bad:.1%}.",
    ]
    return "\n".join(lines)


def text_block(profile: str, root: Path) -> str:
    """Text, model and machine behind the numbers."""
    text = read_table(profile, "text", root).set_index("split")
    front, p = read_table(profile, "front", root), PROFILES[profile]
    front = front[front["criterion"] == "static"]  # read on the whole split
    full = front["perplexity"] / (1 + front["quality_loss"])
    hardware = read_json(project(root).results / profile / "front.meta.json")["hardware"]
    seeds = front["seed"].nunique()
    return (
        f"Profile `{profile}`: {p.model.n_layers} layers of width {p.model.d_model},"
        f" {p.training.epochs:g} passes over"
        f" {text.loc['train', 'tokens']:,} training tokens, {seeds} seed{'s' if seeds > 1 else ''},"
        f" perplexity {_span(full.groupby(front['seed']).mean(), '.1f')} at full depth on the test"
        f" split, {text.loc['test', 'unknown_share']:.1%} of whose words are unknown"
        f"{_against_twin(profile, root)}; timed on {hardware['cpu']},"
        f" {hardware.get('threads') or hardware['usable_cpus']} thread(s),"
        f" {'no GPU' if hardware['gpu'] is None else hardware['gpu']}."
    )


def _against_twin(profile: str, root: Path) -> str:
    """What training exits cost the last layer, where the twin saw the same text as the model."""
    p = PROFILES[profile]
    if p.parameters("03_threshold_sweep").recipe_tokens:
        return ""
    recipes = read_table(profile, "recipes", root)
    joint = recipes[(recipes["recipe"] == "joint") & (recipes["exit"] == p.model.n_layers - 1)]
    return f", {_span(joint['last_vs_twin'], '+.1%')} against its twin trained without exits"


def products_block(profile: str, root: Path) -> str:
    """The original's factors and products beside the measured ones."""
    measures = ["positions", "layer FLOPs", "layer time", "total time"]
    lines = [f"| | claimed | {' | '.join(measures)} |", "|---|---|---|---|---|---|"]
    for claim, rows in read_table(profile, "claimed_products", root).groupby("claim", sort=False):
        spans = [_time(rows, m) if f"{m}_low" in rows else _span(rows[m]) for m in measures]
        claimed = rows["claimed"].iloc[0]
        said = "" if pd.isna(claimed) else f"{claimed:g}×"
        lines.append(f"| {claim} | {said} | {' | '.join(f'{s}×' for s in spans)} |")
    return "\n".join(lines)


def _time(rows: pd.DataFrame, column: str = "speedup_time") -> str:
    """Mean of a ratio of times, and the ends of all its intervals."""
    low, high = rows[f"{column}_low"].min(), rows[f"{column}_high"].max()
    return f"{rows[column].mean():.2f} [{low:.2f}, {high:.2f}]"


def _span(values: pd.Series, form: str = ".2f") -> str:
    """Mean, and least to largest where they differ."""
    mean, ends = f"{values.mean():{form}}", [f"{v:{form}}" for v in (values.min(), values.max())]
    return mean if ends[0] == ends[1] else f"{mean} [{ends[0]}, {ends[1]}]"


BLOCKS: dict[str, Callable[[Path], str]] = {
    "answer": partial(answer, "wikitext2"),
    "answer-wide": partial(answer, "wikitext2-d256"),
    "answer-default": partial(answer, "cpu"),
    "claims": partial(claims_block, "wikitext2"),
    "guarantee": partial(guarantee_block, "wikitext2"),
    "text": partial(text_block, "wikitext2"),
    "text-wide": partial(text_block, "wikitext2-d256"),
    "text-default": partial(text_block, "cpu"),
    "products": partial(products_block, "combinations"),
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
        except KeyError as error:
            content = f"*Results are older than this page: they say nothing of {error}.*"
        return f"{start}{content.strip()}\n{end}"

    return _BLOCK.sub(block, text)


def _command(profile: str) -> str:
    return f"python -m earlyexit run --profile {profile}"
