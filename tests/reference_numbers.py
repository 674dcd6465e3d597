"""Weights, traces, policies and certificates of small trainings, as digests.

``python tests/reference_numbers.py`` prints one line per thing: two commits that print the same compute
the same, bit for bit, on the same machine at one thread.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import earlyexit as ee
from earlyexit.calibration.temperature import fit_temperatures
from earlyexit.calibration.thresholds import fit_policy_to_cost
from earlyexit.corpus.load import encode_texts
from earlyexit.exits.original import original_early_exit
from earlyexit.models import (
    ACTLanguageModel,
    ACTMultiScaleLanguageModel,
    MultiScaleLanguageModel,
    SparseBKLanguageModel,
    convert_act_multi_scale,
    convert_act_to_early_exit,
)
from earlyexit.models.checkpoints import load_model

warnings.filterwarnings("ignore")


def digest(*things) -> str:
    sha = hashlib.sha256()
    for thing in things:
        if isinstance(thing, torch.Tensor):
            thing = thing.detach().cpu().numpy()
        if isinstance(thing, np.ndarray):
            sha.update(
                f"{thing.dtype}{thing.shape}".encode() + np.ascontiguousarray(thing).tobytes()
            )
        else:
            sha.update(json.dumps(thing, sort_keys=True, default=str).encode())
    return sha.hexdigest()[:16]


def say(name: str, *values) -> None:
    print(name, *values, sep="\t", flush=True)


SIZES = {"d_model": 32, "n_layers": 3, "n_seq": 32, "bk_heads": 4}


def trace_digest(trace) -> str:
    scores = [trace.scores[k] for k in sorted(trace.scores)]
    return digest(trace.nll, trace.kl, trace.prediction, sorted(trace.scores), *scores)


def study(name: str, model, corpus, x, y, criteria) -> None:
    """Everything that exits make of a trained model."""
    fit = corpus.splits["fit"].limit(3000)
    trace = ee.collect_trace(model, fit, corpus.eos_id)
    say(f"{name}/weights", model.fingerprint())
    say(f"{name}/trace", trace_digest(trace))
    full = model.nll(x, y)
    say(f"{name}/full depth", digest(full))
    for criterion in criteria:
        for kind in ("global", "per_layer"):
            try:
                policy = ee.fit_policy(trace, criterion, 0.2, kind)
            except ValueError as error:
                say(f"{name}/{criterion}/{kind}", type(error).__name__)
                continue
            say(f"{name}/{criterion}/{kind}", digest(policy.to_dict()))
        cut = np.nanquantile(trace.score(criterion)[:, :-1], 0.5)
        policy = ee.ExitPolicy.constant(float(cut), model.n_layers, criterion)
        for execution in ("compacted", "dense"):
            nll, exits = model.nll(x, y, policy, execution)
            say(f"{name}/{criterion}/{execution}", digest(nll), exits.float().mean().item())
        nll = ee.EarlyExitEvaluator(model, "cpu").evaluate_policy([(x, y)], policy)
        say(f"{name}/{criterion}/evaluated", digest(nll), nll["perplexity"])


def main() -> None:
    torch.set_num_threads(1)
    corpus = ee.load_corpus(ee.CorpusConfig("sotu", vocab_size=500))
    say("corpus", corpus.data_hash, *(digest(s.ids, s.document) for s in corpus.splits.values()))
    say("other text", digest(encode_texts(corpus, ["one two\nthree", "four"], "o").ids))
    short = replace(corpus, splits=corpus.splits | {"fit": corpus.splits["fit"].limit(2000)})
    x, y = next(iter(ee.loader(corpus.splits["test"].limit(6000), 32, 16, corpus.eos_id)))
    all_criteria = list(ee.CRITERIA)

    def trained(model, **changes):
        config = ee.TrainingConfig(epochs=1, batch_size=8, learning_rate=1e-2, **changes)
        history = ee.train(model, short, config, "cpu", max_tokens=6000)
        return model, digest(history)

    def gated(model, source):
        model.load_state_dict(source.state_dict(), strict=False)
        report = ee.train_gates(model, corpus.splits["train"], corpus.eos_id, 2000, steps=60)
        return model.eval(), digest(report)

    recipes = {
        "tokens": {"exit_sampling": "tokens"},
        "one": {"exit_sampling": "one"},
        "all": {"exit_sampling": "all", "exit_loss_weight": 1.5, "exit_ramp": 0.5},
        "dropout": {"exit_sampling": "one", "layer_dropout": 0.2},
        "distilled": {"exit_sampling": "one", "distillation": 0.5},
    }
    for head in ("linear", "adaptive"):
        for name, change in recipes.items():
            if head == "adaptive" and name == "distilled":
                continue
            torch.manual_seed(0)
            model = ee.EarlyExitLanguageModel(corpus.vocab_size, output_head=head, **SIZES)
            model, history = trained(model, **change)
            say(f"{head}/{name}", model.fingerprint(), history)
            if name != "tokens":
                continue
            frozen, history = trained(model, freeze_backbone=True)
            say(f"{head}/frozen", frozen.fingerprint(), history)
            for hidden in (0, 8):
                torch.manual_seed(1)
                kind = ee.EarlyExitLanguageModel
                own = kind(corpus.vocab_size, output_head=head, gate_hidden=hidden, **SIZES)
                own, report = gated(own, model)
                say(f"{head}/gates {hidden}", report)
            study(head, own, corpus, x, y, all_criteria)
            temperatures = fit_temperatures(own, corpus.splits["fit"], corpus.eos_id, 3000)
            say(f"{head}/temperatures", digest(temperatures))
            trace = ee.collect_trace(own, corpus.splits["fit"].limit(3000), corpus.eos_id)
            say(
                f"{head}/to cost",
                digest(fit_policy_to_cost(trace, "gate", 2.0, [1, 2, 3]).to_dict()),
            )
            say(
                f"{head}/decaying",
                digest(ee.fit_policy(trace, "max_probability", 0.2, "decaying").to_dict()),
            )
            part = corpus.splits["certify"].truncate(64)
            for criterion in ("gate", "max_probability"):
                try:
                    c = ee.certify(
                        own, trace, part, corpus.eos_id, epsilon=0.3, criterion=criterion
                    )
                    say(f"{head}/certificate {criterion}", digest(json.loads(c.to_json())), c.bound)
                except ValueError as error:
                    say(f"{head}/certificate {criterion}", type(error).__name__)
            logits, exits = original_early_exit(own, x, 0.1)
            say(f"{head}/original", digest(logits, exits))
            static = ee.ExitPolicy.static(1, 3)
            say(f"{head}/generated", digest(*own.generate(x[:2, :5], 6, static)))

    kinds = {
        "sparse": (SparseBKLanguageModel, {"keep": 0.5}),
        "act": (ACTLanguageModel, {"ponder_weight": 0.02}),
        "act sparse": (ACTLanguageModel, {"ponder_weight": 0.02, "keep": 0.5}),
        "scales": (MultiScaleLanguageModel, {"n_layers": 5}),
        "scales sparse": (MultiScaleLanguageModel, {"n_layers": 5, "keep": 0.5}),
        "act scales": (ACTMultiScaleLanguageModel, {"n_layers": 5, "ponder_weight": 0.02}),
    }
    for name, (kind, change) in kinds.items():
        torch.manual_seed(0)
        weight = 0.0 if name.startswith("act") else 0.3
        model = kind(corpus.vocab_size, **(SIZES | change))
        model, history = trained(model, exit_sampling="one", exit_loss_weight=weight)
        say(f"{name}/trained", model.fingerprint(), history)
        if name.startswith("act"):
            convert = convert_act_multi_scale if "scales" in name else convert_act_to_early_exit
            own, criteria = convert(model), ["agreement", "saturation", "max_probability"]
            say(f"{name}/act", digest(model.nll(x, y)), digest(own.nll(x, y, own.act_policy())[0]))
        else:
            torch.manual_seed(1)
            own, report = gated(kind(corpus.vocab_size, gate_hidden=0, **(SIZES | change)), model)
            say(f"{name}/gates", report)
            criteria = ["gate", "max_probability", "patience", "saturation", "entropy", "depth"]
        study(name, own, corpus, x, y, criteria)
        say(
            f"{name}/generated",
            digest(*own.generate(x[:1, :5], 4, ee.ExitPolicy.static(1, own.n_layers))),
        )

    for path in sorted(Path(__file__).parents[1].glob("results/*/model_seed*.safetensors")):
        say(f"{path.parent.name}/{path.stem}", load_model(path).fingerprint())


if __name__ == "__main__":
    main()
