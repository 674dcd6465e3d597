"""Commands about time: measured on this machine, or told from prices."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import fields

import torch
from tqdm.auto import tqdm

from earlyexit.commands.common import Add, add_machine, device_of
from earlyexit.cost import bench, predict
from earlyexit.cost.parts import Load
from earlyexit.cost.synthetic import geometric_shares
from earlyexit.cost.time_model import TimeModel, unpriced
from earlyexit.exits.criteria import CRITERIA
from earlyexit.models.checkpoints import CheckpointError, load_model
from earlyexit.nn.config import ModelConfig
from earlyexit.runs import cache
from earlyexit.runs.paths import project
from earlyexit.runs.published import published_prices
from earlyexit.runs.settings import UsageError

log = logging.getLogger("earlyexit")


def add_commands(add: Add) -> None:
    """Add bench and predict."""
    ratios = add(_bench, "ratios of times, beside their targets", "bench --quick")
    ratios.add_argument("--quick", action="store_true", help="small sizes, three repeats")
    ratios.add_argument("--repeats", type=int, default=7, help="of each run (default: 7)")
    ratios.add_argument("--model", metavar="FILE", help="checkpoint for the end-to-end rows")
    add_machine(ratios)

    prediction = add(
        _predict, "time of a configuration that was never run",
        "predict --d-model 512 --n-layers 12 --vocab 32000",
        description="Time of scoring a batch with and without exits, from prices of work: this"
        " machine's, once --refit has measured them, or else published ones.",
    )  # fmt: skip
    required = {"d_model": "D", "n_layers": "L", "vocab_size": "V"}
    others = {"n_seq": "N", "bk_heads": "H", "num_experts": "E", "top_k": "K"}
    for name, sign in (required | others).items():
        prediction.add_argument(
            f"--{name.replace('_', '-')}", type=int, metavar=sign,  # `--vocab` is enough
            required=name in required, default=getattr(ModelConfig, name, None),
        )  # fmt: skip
    prediction.add_argument("--batch", type=int, default=32, metavar="B")
    prediction.add_argument("--output-head", default="linear", help="linear or adaptive")
    prediction.add_argument("--criterion", default="gate", help="what decides (default: gate)")
    exits = prediction.add_mutually_exclusive_group()
    exits.add_argument("--mean-depth", type=float, help="layers executed (default: (L + 1) / 2)")
    exits.add_argument(
        "--exit-shares", type=float, nargs="+", metavar="P",
        help="share of tokens leaving at each layer, and last those that leave at none",
    )  # fmt: skip
    prediction.add_argument("--refit", action="store_true", help="measure this machine again")
    add_machine(prediction)


def _bench(options: argparse.Namespace) -> int:
    device = device_of(options.device, options.threads)
    if options.repeats < 1:
        raise UsageError(f"--repeats {options.repeats} must be at least 1")
    try:
        model = load_model(options.model, device=device) if options.model else None
    except CheckpointError as error:
        raise UsageError(f"--model: {error}") from None
    repeats = min(3, options.repeats) if options.quick else options.repeats
    plan = bench.Bench(device, repeats, options.quick, model)
    conditions, rows = bench.conditions(device), []
    bar = tqdm(plan.sections().items(), desc="bench", file=sys.stderr)
    try:
        for name, section in bar:
            bar.set_postfix_str(name)
            for row in section():
                rows.append(row)
                if not options.json:
                    tqdm.write(bench.table([row]), file=sys.stdout)
                    sys.stdout.flush()
    finally:  # what was measured before an interruption is not lost
        if options.json:
            plain = [row.to_dict() for row in rows]
            print(json.dumps({"conditions": conditions, "rows": plain}, indent=2))
    if options.json:
        return 0
    print(
        f"\nMedians of interleaved repeats ({repeats}) with 90 % intervals, {conditions['threads']}"
        f" threads on {conditions['cpus']} CPUs, load before the start {conditions['load_before']}."
    )
    weights = "the weights given" if model is not None else "random weights"
    print(f"Rows end to end: {weights}; all rows: exits constructed, so no quality is claimed.")
    return 0


def _predict(options: argparse.Namespace) -> int:
    load = _load(options)
    device = device_of(options.device, options.threads)
    prices = None if options.refit else _published_prices(device, options.threads, load)
    prices = prices or cache.time_model(project().cache, device, options.refit)
    answer = predict.answer(prices, load)
    print(json.dumps(answer, indent=2) if options.json else predict.text(answer))
    return 0


def _published_prices(device: torch.device, threads: int, load: Load) -> TimeModel | None:
    """Return published prices that can tell the time of ``load``, unless this machine's are known.

    A GPU, or other threads than the published ones, are this machine's own matter.
    """
    own = cache.time_model_path(project().cache, device)
    prices = None if own.is_file() or device.type != "cpu" else published_prices()
    if prices is None or threads not in (0, prices.machine["hardware"]["threads"]):
        return None
    if parts := unpriced(prices, load):
        log.info("the published prices say nothing of: %s", ", ".join(parts))
        return None
    return prices


def _load(options: argparse.Namespace) -> Load:
    """Return the run that the options of ``predict`` describe.

    Raises:
        UsageError: the sizes, the criterion, the mean depth or the exit shares are invalid.
    """
    known = [name for name in CRITERIA if name != "depth"]
    if options.criterion not in known:
        raise UsageError(f"--criterion {options.criterion}: choose one of {', '.join(known)}")
    asked = {f.name: getattr(options, f.name) for f in fields(ModelConfig) if f.name in options}
    try:
        config = ModelConfig(**asked, dropout_p=0.0, gate_hidden=0)
        config.check_trainable()
        shares = options.exit_shares
        if shares is None:
            depth = options.mean_depth
            depth = (config.n_layers + 1) / 2 if depth is None else depth
            shares = geometric_shares(config.n_layers, depth)
        shares = tuple(map(float, shares))
        return Load(config, options.batch, config.n_seq, options.criterion, shares)
    except ValueError as error:
        raise UsageError(str(error)) from None
