"""Where the time goes: the parts of a layer and of a check, timed one by one on real states."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from earlyexit.exits import CRITERIA, ExitState
from earlyexit.model import EarlyExitLanguageModel
from earlyexit.timing import interleaved_times
from earlyexit.vocabulary import logit_chunks, softmax_


def part_functions(
    model: EarlyExitLanguageModel, x: Tensor, layer: int = 0
) -> dict[tuple[str, str], Callable[[], object]]:
    """(group, part) → a call that runs just that part of ``layer`` on the batch ``x`` ``(B, N)``.

    Groups: "whole" (the block), "block" (its parts), "check" (deciding by each criterion), "head" (the
    final head without and with its softmax).
    """
    states = model.hidden_states(x)
    block, before, after = model.blocks[layer], states[layer], states[layer + 1]
    bk = block.bk_layer
    u = block.layer_norm(before)
    v = bk.potentials(u)
    features = bk.bk_core(v)
    mixed = u + bk.bk_scale * bk.output_proj(features)
    head = model.blocks[-1].exit_classifier
    flat = head.features(states[-1]).flatten(0, 1)
    linear = head.unembedding
    state = ExitState(layer, after.flatten(0, 1), before.flatten(0, 1))

    def project(and_then: Callable[[Tensor], object]) -> None:
        for _, logits in logit_chunks(flat, linear.weight, linear.bias):
            and_then(logits)

    functions: dict[tuple[str, str], Callable[[], object]] = {
        ("whole", "block"): lambda: block.hidden(before),
        ("block", "layer norm"): lambda: block.layer_norm(before),
        ("block", "potentials"): lambda: bk.potentials(u),
        ("block", "BK-Core"): lambda: bk.bk_core(v),
        ("block", "projection"): lambda: u + bk.bk_scale * bk.output_proj(features),
        ("block", "experts and router"): lambda: bk.moe(mixed),
        ("head", "unembedding"): lambda: project(lambda logits: None),
        ("head", "unembedding and softmax"): lambda: project(softmax_),
    }
    for name, rule in CRITERIA.items():
        if rule.reads == "logits":
            check = lambda rule=rule: project(rule.score)  # noqa: E731
        else:
            check = lambda rule=rule: rule.score(state)  # noqa: E731
        if name != "depth":
            functions["check", rule.label] = check
    return functions


@torch.no_grad()
def part_times(model: EarlyExitLanguageModel, x: Tensor, repeats: int) -> pd.DataFrame:
    """Median time of every part, interleaved.

    Returns:
        Columns group, part, milliseconds, share_of_block (of the whole block's median).
    """
    model.eval()
    functions = part_functions(model, x)
    names = {" / ".join(key): key for key in functions}
    seconds = interleaved_times(
        {name: functions[key] for name, key in names.items()}, x.device, repeats
    )
    medians = {key: float(pd.Series(seconds[name]).median()) for name, key in names.items()}
    whole = medians["whole", "block"]
    return pd.DataFrame(
        [
            {
                "group": group,
                "part": part,
                "milliseconds": 1e3 * median,
                "share_of_block": median / whole,
            }
            for (group, part), median in medians.items()
        ]
    )
