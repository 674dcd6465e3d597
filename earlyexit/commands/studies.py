"""Commands about studies: run them, and say how they and the machine stand."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import fields, replace
from pathlib import Path

from earlyexit.commands.common import SEVERAL, Add, device_of, known_profile
from earlyexit.runs.paths import project
from earlyexit.runs.profiles import PROFILES
from earlyexit.runs.settings import Settings, UsageError
from earlyexit.runs.workers import JOBS
from earlyexit.training import parallel


def add_commands(add: Add) -> None:
    """Add run, status, compare, readme, report and doctor."""
    told = "execute the notebooks that are not fresh"
    run = add(_run, told, "run --only 01 03 --set epochs=2.0 --dry-run")
    run.add_argument("--profile", default="cpu", help="table of sizes (default: cpu)")
    run.add_argument("--only", **SEVERAL, metavar="NN")
    run.add_argument("--seeds", **SEVERAL, type=int, help="instead of the profile's")
    run.add_argument(
        "--set", **SEVERAL, dest="sets", metavar="KEY=VALUE",
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
    page.add_argument(
        "--profile", default="cpu", metavar="LABEL",
        help="folder of the results, such as cpu or cpu~epochs=2.0 (default: cpu)",
    )  # fmt: skip

    health = add(
        _doctor, "what would stop or disturb a run, and what to do", "doctor --profile cpu"
    )
    health.add_argument("--profile", default="cpu", help="that is to be run (default: cpu)")
    health.add_argument("--data-dir", default="", metavar="DIR", help="folder with local text")


def _run(options: argparse.Namespace) -> int:
    from earlyexit.runs import runner  # papermill is slow to import

    device_of(options.device)
    if options.jobs is not None:
        if options.jobs < 1:
            raise UsageError(f"--jobs {options.jobs} must be at least 1")
        os.environ[JOBS] = str(options.jobs)
    settings = settings_of(options)
    if options.stage:
        return _stage(options, settings)
    if parallel.started() > 1:
        raise UsageError("torchrun shares the trainings of a stage among processes: add --stage")
    if options.dry_run:
        _show(runner.plan(settings, options.only))
    else:
        runner.run(settings, options.only, force=options.force)
    return 0


def settings_of(options: argparse.Namespace) -> Settings:
    settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
    usual = getattr(PROFILES.get(settings.profile), "threads", None)
    if options.threads not in (None, usual):
        settings = replace(settings, sets=(*settings.sets, f"threads={options.threads}"))
    return settings


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
    if missing := reruns.missing(options.label, other):
        print(f"not in the rerun, so not compared: {', '.join(missing)}")
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


def _report(options: argparse.Namespace) -> int:
    from earlyexit.runs import report

    name, *changed = options.profile.split("~")
    print(report.report("~".join([known_profile(name), *changed])))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from earlyexit.runs import doctor

    worst = 0
    for found in doctor.examine(known_profile(options.profile), options.data_dir or None):
        print(f"{found.name:<8} {found.verdict:<8} {found.said}", flush=True)
        if found.remedy:
            print(f"{'':<17} → {found.remedy}")
        worst = max(worst, found.verdict == "stops")
    print("a run would be stopped" if worst else "nothing would stop a run")
    return int(worst)


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
