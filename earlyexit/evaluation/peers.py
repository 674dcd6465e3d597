"""Early exits decode with the same model, those fitted here and other libraries'; the rest is quoted.

Decoding by drafts from the first layers that the whole model verifies says the same words as plain
greedy decoding, so that only time is at stake. ``earlyexit/data/peers.csv`` holds figures that authors
give of their own systems, with their source and why they are quoted.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from earlyexit.cost.timing import time_columns
from earlyexit.devices import synchronize
from earlyexit.models.pretrained import PretrainedModel
from earlyexit.models.speculation import Drafts, decode_with_drafts

QUOTED = Path(__file__).parents[1] / "data" / "peers.csv"
PLAIN = "plain greedy decoding"
DRAFTERS = 3  # numbers of first layers that are tried
WHOLE = ("gpt2", "gpt_neox")  # they run all of their layers, whatever a library asks them to
LONGEST, AGREEMENTS = 6, (0.5, 0.8)  # words of a draft here, as long as a gate expects agreement
Way = Callable[[Tensor, int], Tensor]  # prompt (1, N), number of new tokens → these (n,)


def peer_table(model: PretrainedModel, prompts: Tensor, n_new: int, repeats: int) -> pd.DataFrame:
    """Time the ways of decoding that are installed, and put quoted figures below.

    Args:
        prompts: token ids ``(B, N)``, decoded one at a time with a cache; n_new: new tokens of each.

    Returns:
        One row per system: system, basis (measured or quoted), tokens_per_second, speedup_time with its
        90 % interval over prompts and repeats, both of a word; agreement (share of new tokens that are
        those of plain decoding); and source, which says of quoted figures where they stand, and on what
        they were got.
    """
    measured = decoding_times(ways_to_decode(model), prompts, n_new, repeats)
    return pd.concat([measured.assign(basis="measured"), quoted()], ignore_index=True)


def quoted() -> pd.DataFrame:
    """Return the figures that authors give of their own systems: system, speedup_time, source."""
    return pd.read_csv(QUOTED, comment="#").assign(basis="quoted")


def ways_to_decode(model: PretrainedModel) -> dict[str, Way]:
    """Return plain greedy decoding, drafts by exits with gates, and by each library that knows it."""
    decoder, stages = model.decoder, np.linspace(1, model.n_layers - 1, DRAFTERS).round()
    stages = [int(stage) for stage in dict.fromkeys(stages)]
    depths = [model.config.stage_layers * stage for stage in stages]
    ends = model.decoder.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends

    def greedy(prompt: Tensor, n_new: int, **drafts: int) -> Tensor:
        mask = torch.ones_like(prompt)
        with _own_attention(model):
            ids = decoder.generate(
                prompt, attention_mask=mask, max_new_tokens=n_new, do_sample=False, **drafts
            )
        return ids[0, prompt.shape[1] :]

    def drafted(prompt: Tensor, n_new: int, drafts: Drafts) -> Tensor:
        return decode_with_drafts(model, prompt, n_new, drafts, stop=ends).ids[0, prompt.shape[1] :]

    ways: dict[str, Way] = {PLAIN: greedy, "here, no drafts": partial(drafted, drafts=Drafts())}
    for stage, depth in zip(stages, depths, strict=True):
        for least in AGREEMENTS if model.gates.trained else ():
            drafts = Drafts(stage - 1, LONGEST, least)
            ways[f"here, drafts from layer {depth}, gate {least:g}"] = partial(
                drafted, drafts=drafts
            )
    if decoder.config.model_type in WHOLE:
        return ways
    for depth in depths:
        ways[f"transformers, drafts from layer {depth}"] = lambda prompt, n_new, depth=depth: (
            greedy(prompt, n_new, assistant_early_exit=depth)
        )
    if find_spec("economize"):
        import economize
        from economize.techniques.early_exit import EarlyExitConfig

        for depth in depths:
            with _own_attention(model):
                config = EarlyExitConfig(exit_layer=depth, head="shared")
                other = economize.apply(decoder, config)

            def economized(prompt: Tensor, n_new: int, other=other) -> Tensor:
                with _own_attention(model):
                    return other.decode(prompt, n_new, stop=ends or None).tokens

            ways[f"economize, drafts from layer {depth}"] = economized
    return ways


@torch.no_grad()
def decoding_times(
    ways: Mapping[str, Way], prompts: Tensor, n_new: int, repeats: int
) -> pd.DataFrame:
    """Time ways of decoding, in a new random order for each prompt, against the first of them.

    Returns:
        The measured columns of :func:`peer_table`.
    """
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}  # of a word
    said: dict[str, list[list[int]]] = {name: [] for name in ways}
    steps = [
        (r, p, name)
        for r in range(repeats + 1)
        for p in prompts.split(1)
        for name in order.sample(list(ways), len(ways))
    ]
    with _quiet_transformers():
        for repeat, prompt, name in tqdm(steps, desc="decoding", mininterval=2):
            synchronize(prompt.device)
            start = time.perf_counter()
            new = ways[name](prompt, n_new).tolist()
            taken = time.perf_counter() - start
            if repeat:  # the first warms up
                seconds[name].append(taken / max(1, len(new)))
                said[name].append(new)
    (plain, *_), rows = ways, []
    for name in ways:
        pairs = list(zip(said[name], said[plain], strict=True))
        same = sum(a == b for found, usual in pairs for a, b in zip(found, usual, strict=False))
        rows.append(
            {"system": name, "tokens_per_second": 1 / np.mean(seconds[name])}
            | time_columns(np.array(seconds[plain]), np.array(seconds[name]))
            | {"agreement": same / sum(max(map(len, pair)) for pair in pairs)}
        )
    return pd.DataFrame(rows)


@contextmanager
def _own_attention(model: PretrainedModel) -> Iterator[None]:
    """Let the decoder attend by torch's own function, the one that other libraries know.

    What they change of its configuration is put back, also after an error.
    """
    config = model.decoder.config
    usual = config._attn_implementation, config.num_hidden_layers
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation, config.num_hidden_layers = usual


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the library's warnings, which are of the settings that it makes itself."""
    library = logging.getLogger("transformers")
    level = library.level
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.setLevel(level)
