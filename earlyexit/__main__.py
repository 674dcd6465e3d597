"""Command line: ``python -m earlyexit run | status | readme``.

Exit codes: 0 done, 1 something failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from earlyexit.runner import Plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("earlyexit").setLevel(logging.INFO)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        return _complain("interrupted; what was finished before is kept", 130)
    except OSError as error:  # disk full, no such project, missing results
        return _complain(str(error), 1)
    except (ValueError, RuntimeError) as error:
        from earlyexit.receipts import RunError
        from earlyexit.settings import UsageError

        if isinstance(error, UsageError | RunError):
            return _complain(str(error), 2 if isinstance(error, UsageError) else 1)
        raise  # a bug: its traceback is wanted


def _run(options: argparse.Namespace) -> int:
    from earlyexit import runner
    from earlyexit.settings import Settings

    settings = Settings(
        profile=options.profile,
        seeds=tuple(options.seeds),
        sets=tuple(options.set),
        data_dir=options.data_dir,
        device=options.device,
    )
    if options.dry_run:
        _show(runner.plan(settings, tuple(options.only)))
    else:
        runner.run(settings, tuple(options.only), force=options.force)
    return 0


def _status(options: argparse.Namespace) -> int:
    from earlyexit import runner

    plans = runner.status(options.profile)
    for plan in plans:
        _show(plan)
    if not plans:
        print("no results yet; `python -m earlyexit run --dry-run` shows what would be made")
    return 0


def _readme(options: argparse.Namespace) -> int:
    from earlyexit import readme
    from earlyexit.paths import project

    path = project().readme
    if not options.check:
        print("\n".join(f"regenerated: {name}" for name in readme.update(path)) or "up to date")
        return 0
    stale = readme.check(path)
    print("\n".join(f"differs from the results: {name}" for name in stale) or "up to date")
    return 1 if stale else 0


def _show(plan: Plan) -> None:
    """One line per notebook; the expected time where something is to be done."""
    print(f"{plan.label}: {plan.command}")
    stale = [step for step in plan.steps if step.reasons]
    for step in plan.steps:
        state = "stale" if step.reasons else "fresh"
        print(f"  {step.notebook:<28} {state}  {_time(step.minutes, step.basis)}")
        for reason in step.reasons:
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
    print(f"earlyexit: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m earlyexit", description="Early exit, measured."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="execute the notebooks that are not fresh")
    run.set_defaults(command=_run)
    run.add_argument("--profile", default="cpu", help="table of sizes (default: cpu)")
    run.add_argument("--only", nargs="+", action="extend", default=[], metavar="NN")
    run.add_argument("--seeds", nargs="+", type=int, default=[], help="instead of the profile's")
    run.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="change a profile field or notebook parameter; results get a label of their own",
    )  # fmt: skip
    run.add_argument("--data-dir", default="", metavar="DIR", help="folder with local text")
    run.add_argument("--device", default="auto", help="auto, cpu or cuda")
    run.add_argument("--force", action="store_true", help="also what is fresh")
    run.add_argument("--dry-run", action="store_true", help="show what would run, why, how long")

    status = commands.add_parser("status", help="what is fresh, what is stale and why")
    status.set_defaults(command=_status)
    status.add_argument("--profile", help="only this one")

    readme = commands.add_parser("readme", help="regenerate the README's number blocks")
    readme.set_defaults(command=_readme)
    readme.add_argument("--check", action="store_true", help="only say which differ")
    return parser


if __name__ == "__main__":
    sys.exit(main())
