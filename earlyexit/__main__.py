"""The command line is ``python -m earlyexit COMMAND``; the ``--help`` of each ends with an example.

Its exit code is 0 if all is done, 1 if something failed, 2 for wrong usage, 130 if interrupted.
"""

from __future__ import annotations

import argparse
import errno
import inspect
import json
import logging
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

import earlyexit
from earlyexit.corpus.documents import CorpusConfig
from earlyexit.corpus.foreign import foreign_corpus
from earlyexit.corpus.load import encode_texts
from earlyexit.cost import bench, predict
from earlyexit.cost.parts import Load
from earlyexit.cost.synthetic import geometric_shares
from earlyexit.cost.time_model import TimeModel, unpriced
from earlyexit.devices import resolve_device
from earlyexit.evaluation.decoding import gated_drafts
from earlyexit.exits.criteria import CRITERIA
from earlyexit.models.attach import attach
from earlyexit.models.checkpoints import CheckpointError, load_model
from earlyexit.nn.config import ModelConfig
from earlyexit.runs import cache
from earlyexit.runs.freshness import RunError
from earlyexit.runs.paths import project
from earlyexit.runs.profiles import PROFILES
from earlyexit.runs.published import Published, published_prices
from earlyexit.runs.settings import Settings, UsageError
from earlyexit.runs.workers import JOBS
from earlyexit.training import parallel

log = logging.getLogger("earlyexit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    for stream in (sys.stdout, sys.stderr):  # a sign that an encoding lacks must not end a run
        if hasattr(stream, "reconfigure"):  # a notebook's own have no encoding
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        return _complain("interrupted; what was finished before is kept", 130)
    except UsageError as error:
        return _complain(str(error), 2)
    except (RunError, OSError, ValueError) as error:  # a notebook, a full disk, missing results
        too_long = getattr(error, "errno", None) == errno.ENAMETOOLONG  # asked for by an option
        return _complain(str(error), 2 if too_long else 1)


def _run(options: argparse.Namespace) -> int:
    from earlyexit.runs import runner  # papermill is slow to import

    _device(options.device)
    if options.jobs is not None:
        if options.jobs < 1:
            raise UsageError(f"--jobs {options.jobs} must be at least 1")
        os.environ[JOBS] = str(options.jobs)
    settings = _settings(options)
    if options.stage:
        return _stage(options, settings)
    if parallel.started() > 1:
        raise UsageError("torchrun shares the trainings of a stage among processes: add --stage")
    if options.dry_run:
        _show(runner.plan(settings, options.only))
    else:
        runner.run(settings, options.only, force=options.force)
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
    usual = getattr(PROFILES.get(settings.profile), "threads", None)
    if options.threads not in (None, usual):
        settings = replace(settings, sets=(*settings.sets, f"threads={options.threads}"))
    return settings


def study_settings(arguments: str) -> Settings:
    """Return the settings of a study, from the options of ``run`` in one line."""
    return _settings(_parser().parse_args(["run", *shlex.split(arguments)]))


def _stage(options: argparse.Namespace, settings: Settings) -> int:
    from earlyexit import stages

    if options.only or options.force or options.dry_run:
        raise UsageError("--stage makes what the cache lacks: no --only, --force or --dry-run")
    name, *seeds = options.stage
    if wrong := [seed for seed in seeds if not seed.isdecimal()]:
        raise UsageError(f"--stage {name} {wrong[0]}: a seed is a whole number")
    stages.run(settings, name, [int(seed) for seed in seeds])
    return 0


def _status(options: argparse.Namespace) -> int:
    from earlyexit.runs import runner

    plans = runner.status(options.profile)
    for plan in plans:
        _show(plan)
    if not plans:
        print("no results yet; `python -m earlyexit run --dry-run` shows what would be made")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from earlyexit.runs import reruns

    other = Path(options.other) if options.other else None
    differences = reruns.compare(options.label, other)
    unexplained = differences[~differences["explained"]]
    for change in reruns.conditions(options.label, other):
        print(f"not the same conditions: {change}")
    if len(differences):
        print(differences.to_string(index=False, float_format=lambda x: f"{x:.2g}", na_rep=""))
    timed = int((differences["kind"] == "time").sum())
    print(
        f"{timed} columns of times differ; of others {len(differences) - timed}, {len(unexplained)} of"
        " them by more than seeds explain"
    )
    return 1 if len(unexplained) else 0


def _readme(options: argparse.Namespace) -> int:
    from earlyexit.runs import publish

    path = project().readme
    stale = publish.check(path) if options.check else publish.update(path)
    what = "differs from the results" if options.check else "regenerated"
    print("\n".join(f"{what}: {name}" for name in stale) or "up to date")
    return 1 if stale and options.check else 0


def _bench(options: argparse.Namespace) -> int:
    device = _device(options.device, options.threads)
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
    device = _device(options.device, options.threads)
    prices = None if options.refit else _published_prices(device, options.threads, load)
    prices = prices or cache.time_model(project().cache, device, options.refit)
    answer = predict.answer(prices, load)
    print(json.dumps(answer, indent=2) if options.json else predict.text(answer))
    return 0


def _probe(options: argparse.Namespace) -> int:
    from earlyexit.runs import decoders, probe, probe_page

    _device("cpu", options.threads)
    try:
        name = options.corpus or ("folder" if options.text else "sotu")
        # Certificates want many documents: as many articles as in the profiles on WikiText.
        certify = PROFILES["wikitext2"].corpus.certify_articles if "wikitext" in name else 0
        text = CorpusConfig(name, data_dir=options.text or None, certify_articles=certify)
        config = probe.ProbeConfig(
            tokens=options.tokens,
            document_tokens=options.document_tokens,
            epsilons=tuple(sorted({*probe.ProbeConfig.epsilons, options.epsilon})),
            assisted_tokens=options.assisted_tokens,
        )
        if options.text and not Path(options.text).is_dir():
            raise ValueError(f"--text {options.text}: there is no such folder")
        folder = project().cache
        decoder, tokenizer = decoders.open_decoder(options.model, folder)
        model = attach(decoder, tokenizer, options.exits, n_seq=options.n_seq)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{options.model} has no fast tokenizer: a probe needs one")
        corpus = foreign_corpus(text, backend, model.eos_id, config.tokens)
        asked = probe.Probe(model, corpus, config, folder / "probe")
    except (ImportError, TypeError, ValueError) as error:
        raise UsageError(str(error)) from None
    log.info("about %.0f minutes, less what is kept of an earlier one", 1 + asked.minutes())
    print(probe_page.page(asked, options.epsilon))
    return 0


def _generate(options: argparse.Namespace) -> int:
    _device("cpu", 1)
    published = earlyexit.load(options.profile, options.seed, options.data_dir or None, "cpu")
    model, corpus = published.model, published.corpus
    try:
        ids = encode_texts(corpus, [options.prompt], "prompt").ids[:-1]  # the line goes on
        how = _decoding(options, published)
        prompt, seed = torch.from_numpy(ids).long()[None], options.seed_of_words
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        # Once unheard: what is refused is refused before a word, and loops are compiled.
        model.decode(prompt, options.words, generator=generators[0], **how)
    except ValueError as error:
        raise UsageError(str(error)) from None
    log.info("%d of %d words are not known", (ids == corpus.unk_id).sum(), len(ids))
    word = corpus.config.tokenizer == "word"

    def told(_: int, words: list[int]) -> None:
        for one in corpus.decode(words):
            text = "\n" if one == "<eos>" else f" {one}" if word else one
            print(text, end="", flush=True)

    print(options.prompt, end="", flush=True)
    start = time.perf_counter()
    made = model.decode(prompt, options.words, generator=generators[1], told=told, **how)
    pace, layers = made.new.sum() / (time.perf_counter() - start), made.layers
    print(f"\n\n{pace:,.0f} words per second, {layers:.2f} of {model.n_layers} layers per word")
    return 0


def _decoding(options: argparse.Namespace, published: Published) -> dict:
    """Return how words are decoded, as arguments of a model's ``decode``."""
    how = {"temperature": options.temperature, "top_p": options.top_p}
    if options.drafts:
        (drafted,) = gated_drafts(published.model.n_layers, [0.8], options.drafts).values()
        return how | drafted
    if options.full_depth:
        return how
    if published.policy is None:
        log.info("no policy is certified for this model: every word takes all layers")
    return how | {"policy": published.policy}


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


def _report(options: argparse.Namespace) -> int:
    from earlyexit.runs import report

    print(report.report(_profile(options.profile)))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from earlyexit.runs import doctor

    worst = 0
    for found in doctor.examine(_profile(options.profile), options.data_dir or None):
        print(f"{found.name:<8} {found.verdict:<8} {found.said}", flush=True)
        if found.remedy:
            print(f"{'':<17} → {found.remedy}")
        worst = max(worst, found.verdict == "stops")
    print("a run would be stopped" if worst else "nothing would stop a run")
    return int(worst)


def _names(_: argparse.Namespace) -> int:
    for name in earlyexit.__all__:
        found = getattr(earlyexit, name)
        told = ", ".join(found) if isinstance(found, dict) else inspect.getdoc(found)
        print(f"{name:<26} {told.splitlines()[0]}")
    return 0


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


def _profile(name: str) -> str:
    """Return the name of a profile.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in PROFILES:
        raise UsageError(f"--profile {name}: choose one of {', '.join(PROFILES)}")
    return name


def _device(name: str, threads: int = 0) -> torch.device:
    """Return the device, and set the threads of torch unless ``threads`` is 0.

    Raises:
        UsageError: the device does not exist, or the number of threads is negative.
    """
    if threads < 0:
        raise UsageError(f"--threads {threads} must be ≥ 0")
    try:
        device = resolve_device(name)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    if threads:
        torch.set_num_threads(threads)
    return device


def _show(plan) -> None:
    """Print a ``runner.Plan``: a line per notebook, and the time of the stale ones."""
    print(f"{plan.label}: {plan.command}")
    stale = [step for step in plan.steps if step.reasons]
    width = max(len(step.state) for step in plan.steps)
    for step in plan.steps:
        print(f"  {step.notebook:<22} {step.state:<{width}}  {_time(step.minutes, step.basis)}")
        for reason in step.reasons if step.published else ():  # else there is no other
            print(f"      {reason}")
    known = [step.minutes for step in stale if step.minutes is not None]
    times = [f"about {math.ceil(sum(known))} min"] if known else []
    if len(known) < len(stale):
        times.append(f"{len(stale) - len(known)} of unknown time")
    if stale:
        print(f"  to do: {len(stale)} of {len(plan.steps)}, {', '.join(times)}")


def _time(minutes: float | None, basis: str) -> str:
    if minutes is None:
        return f"({basis})"
    amount = f"{minutes:.0f} min" if minutes >= 10 else f"{60 * minutes:.0f} s"
    return f"{amount} ({basis})"


def _complain(message: str, code: int) -> int:
    print(f"earlyexit: {' '.join(message.split())}", file=sys.stderr)
    return code


class _Tuple(argparse.Action):
    """An option that takes several values and may be given more than once."""

    def __call__(self, parser, namespace, values, option=None):
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), *values))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m earlyexit", description="Early exit, measured.",
        epilog="Example: python -m earlyexit doctor",
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Callable, told: str, example: str, **options) -> argparse.ArgumentParser:
        """Add a command, named by the first word of the example at the end of its help."""
        text = f"Example: {parser.prog} {example}"
        made = commands.add_parser(example.split()[0], help=told, epilog=text, **options)
        made.set_defaults(command=command)
        return made

    several = {"nargs": "+", "action": _Tuple, "default": ()}

    words = add(
        _generate, "continue a text, and say what it took",
        'generate --profile cpu --prompt "My fellow citizens," --temperature 0.8',
        description="Words leave at the exits that the certified policy of a published model allows."
        " With --drafts they are those of full depth.",
    )  # fmt: skip
    words.add_argument("--prompt", required=True, help="text to continue")
    words.add_argument("--profile", default="cpu", help="with published weights")
    words.add_argument("--seed", type=int, default=0, help="of the model (default: 0)")
    words.add_argument("--words", type=int, default=60, help="new words (default: 60)")
    words.add_argument(
        "--temperature", type=float, default=0.0, help="0: the most probable word (default)"
    )
    words.add_argument(
        "--top-p", type=float, default=1.0, help="draw among the fewest words of this share"
    )
    words.add_argument("--seed-of-words", type=int, default=0, help="of the words that are drawn")
    words.add_argument(
        "--drafts", type=int, default=0, metavar="N",
        help="exits only propose, up to N words; the last layer verifies them",
    )  # fmt: skip
    words.add_argument("--full-depth", action="store_true", help="all layers, no exits")
    words.add_argument("--data-dir", default="", metavar="DIR", help="folder with local text")

    told = "execute the notebooks that are not fresh"
    run = add(_run, told, "run --only 01 03 --set epochs=2.0 --dry-run")
    run.add_argument("--profile", default="cpu", help="table of sizes (default: cpu)")
    run.add_argument("--only", **several, metavar="NN")
    run.add_argument("--seeds", **several, type=int, help="instead of the profile's")
    run.add_argument(
        "--set", **several, dest="sets", metavar="KEY=VALUE",
        help="change a profile field or notebook parameter; results get a label of their own",
    )  # fmt: skip
    run.add_argument("--data-dir", default="", metavar="DIR", help="folder with local text")
    run.add_argument("--device", default="auto", help="auto, cpu or cuda")
    run.add_argument(
        "--threads",
        type=int,
        help="of torch; they belong to the results (default: the profile's, 1)",
    )
    run.add_argument(
        "--jobs",
        type=int,
        help="trainings at the same time; they change no number (default: one for each usable core)",
    )
    run.add_argument(
        "--stage", nargs="+", metavar=("NAME", "SEED"),
        help="only trainings or traces, into the cache; for all seeds, or these: the job of a grid",
    )  # fmt: skip
    run.add_argument("--force", action="store_true", help="also what is fresh")
    run.add_argument("--dry-run", action="store_true", help="show what would run, why, how long")

    status = add(_status, "what is fresh, what is stale and why", "status --profile cpu")
    status.add_argument("--profile", help="only this one")

    rerun = add(
        _compare, "a rerun beside what is published: which differences do seeds explain", "compare cpu",
        description="Exit code 1 if a number that is no time differs by more than between seeds. Times"
        " always differ; all else is the same on a machine of the same kind.",
    )  # fmt: skip
    rerun.add_argument("label", help="folder of the results, such as cpu")
    rerun.add_argument(
        "--with", dest="other", metavar="DIR",
        help="folder with the rerun's tables (default: those in results, against the last commit)",
    )  # fmt: skip

    readme = add(_readme, "regenerate the README's number blocks", "readme --check")
    readme.add_argument("--check", action="store_true", help="only say which differ")

    told = "one HTML page of the executed notebooks, which opens without a network"
    page = add(_report, told, "report --profile cpu")
    page.add_argument("--profile", default="cpu", help="whose notebooks were run (default: cpu)")

    health = add(
        _doctor, "what would stop or disturb a run, and what to do", "doctor --profile cpu"
    )
    health.add_argument("--profile", default="cpu", help="that is to be run (default: cpu)")
    health.add_argument("--data-dir", default="", metavar="DIR", help="folder with local text")

    add(_names, "the package's public names, with a line each", "names")

    ratios = add(_bench, "ratios of times, beside their targets", "bench --quick")
    ratios.add_argument("--quick", action="store_true", help="small sizes, three repeats")
    ratios.add_argument("--repeats", type=int, default=7, help="of each run (default: 7)")
    ratios.add_argument("--model", metavar="FILE", help="checkpoint for the end-to-end rows")
    _add_machine(ratios)

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
    _add_machine(prediction)

    asked = add(
        _probe, "would early exit pay for an existing model?", "probe smollm2 --tokens 20000",
        description="Gives a Hugging Face decoder exits, fits them on a text, certifies policies, and"
        " says on one page what they save. A probe that was stopped goes on where it was.",
    )  # fmt: skip
    asked.add_argument("model", metavar="MODEL", help="name on the hub, folder, or smollm2")
    asked.add_argument(
        "--text", default="", metavar="DIR", help="folder of .txt files (or WikiText)"
    )
    asked.add_argument(
        "--corpus", default=None, help="sotu, wikitext-2 or folder (default: folder, with --text)"
    )
    asked.add_argument("--tokens", type=int, default=100_000, help="to fit on; they set the time")
    asked.add_argument(
        "--document-tokens", type=int, default=256, metavar="N",
        help="to which documents are cut that fit thresholds, certify and test (default: 256)",
    )  # fmt: skip
    asked.add_argument("--exits", type=int, help="number of exits; divides the model's layers")
    asked.add_argument("--n-seq", type=int, default=256, metavar="N", help="tokens of a window")
    asked.add_argument("--epsilon", type=float, default=0.05, help="tolerated loss of the verdict")
    asked.add_argument(
        "--assisted-tokens", type=int, default=0, metavar="N",
        help="also time other libraries' early exits on N new tokens",
    )  # fmt: skip
    asked.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    return parser


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: its own choice)")
    parser.add_argument("--json", action="store_true", help="for machines")


if __name__ == "__main__":
    sys.exit(main())
