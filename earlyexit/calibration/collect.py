"""A trace is collected in one full-depth pass, in which every exit is judged by every criterion."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from earlyexit.calibration.trace import ExitTrace
from earlyexit.checked import listed, real, whole
from earlyexit.corpus.splits import Split
from earlyexit.corpus.windows import IGNORE, windows
from earlyexit.exits.criteria import CRITERIA
from earlyexit.exits.execution import scored_states
from earlyexit.exits.protocol import ExitModel, exit_state
from earlyexit.nn.borrowed import borrowed
from earlyexit.nn.cross_entropy import CHUNK_ELEMENTS, precise


@listed("temperatures")
@torch.no_grad()
def collect_trace(
    model: ExitModel,
    split: Split,
    eos_id: int,
    *,
    temperatures: Sequence[float] | None = None,
    batch_size: int = 32,
) -> ExitTrace:
    """Run ``model`` at full depth over ``split`` and record what every exit says.

    Args:
        temperatures: one per exit, by which its logits are divided; by default 1.

    Raises:
        FloatingPointError: an NLL is not finite.
        TypeError: temperatures are no list, or one is no number.
        ValueError: the number of temperatures differs from that of exits, one is not > 0, or the
            split is empty or of another text than the model was trained on.
    """
    model.check_text(split)
    batch_size = whole("batch_size", batch_size, 1)
    device, exits = next(model.parameters()).device, model.n_layers
    temperatures = [1.0] * exits if temperatures is None else list(temperatures)
    if len(temperatures) != exits:
        raise ValueError(f"{len(temperatures)} temperatures for {exits} exits")
    temperatures = [real("temperature", t, above=0) for t in temperatures]
    if not split.n_tokens:
        raise ValueError(f"the split {split.name!r} holds no token")
    gated = model.gates is not None and bool(model.gates.trained)
    names = [c.name for c in CRITERIA.values() if not c.derived and (gated or not c.needs_gates)]
    kept: dict[str, list[np.ndarray]] = {k: [] for k in ("nll", "kl", "prediction", *names)}
    w = windows(split, model.n_seq, eos_id)
    inputs, targets = (torch.as_tensor(a) for a in (w.inputs, w.targets))
    batches = tqdm(range(0, len(inputs), batch_size), desc=f"trace {split.name}", mininterval=2)
    with borrowed(model):
        for start in batches:
            x, y = (a[start : start + batch_size].to(device) for a in (inputs, targets))
            states, target = scored_states(model, x, y)
            rows = max(1, CHUNK_ELEMENTS // (model.vocab_size * exits))
            for chunk in torch.arange(len(target), device=device).split(rows):
                part = _judge(model, [h[chunk] for h in states], target[chunk], temperatures, names)
                for name, values in part.items():
                    kept[name].append(precise(torch.stack(values, dim=1)).cpu().numpy())
    arrays = {name: np.concatenate(parts) for name, parts in kept.items()}
    if not np.isfinite(arrays["nll"]).all():
        raise FloatingPointError("the model's NLL is not finite: its weights hold NaN or infinity")
    scored = w.targets != IGNORE
    position = np.broadcast_to(np.arange(model.n_seq), scored.shape)[scored]
    document = np.broadcast_to(np.asarray(w.document)[:, None], scored.shape)[scored]
    return ExitTrace(
        split=split.name,
        document=document.astype(np.int32),
        position=position.astype(np.int32),
        target=np.asarray(w.targets)[scored].astype(np.int32),
        nll=arrays.pop("nll"),
        kl=arrays.pop("kl"),
        prediction=arrays.pop("prediction").astype(np.int32),
        scores=arrays,
        n_seq=model.n_seq,
        model_hash=model.fingerprint(),
        data_hash=split.data_hash,
    )


def _judge(model, states, target, temperatures, names) -> dict[str, list]:
    """Return all that the trace keeps of one chunk: name → one ``(T,)`` per exit."""
    out: dict[str, list] = {k: [] for k in ("nll", "kl", "prediction", *names)}
    log_p = [
        (model.head(layer)(states[layer + 1]) / temperatures[layer]).log_softmax(dim=-1)
        for layer in range(model.n_layers)
    ]
    last = log_p[-1].exp()
    negentropy = (last * log_p[-1]).sum(dim=-1)
    for layer, scores in enumerate(log_p):
        out["nll"].append(-scores.gather(1, target[:, None]).squeeze(1))
        out["kl"].append((negentropy - (last * scores).sum(dim=-1)).clamp_min(0))
        out["prediction"].append(scores.argmax(dim=-1))
        state = exit_state(model, layer, states[layer + 1], states[layer])
        for name in names:
            rule = CRITERIA[name]
            out[name].append(rule.score(scores if rule.reads == "logits" else state))
    return out
