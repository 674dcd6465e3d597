"""The command line is ``python -m earlyexit COMMAND``; the ``--help`` of each ends with an example.

Its exit code is 0 if all is done, 1 if something failed, 2 for wrong usage, 130 if interrupted. With
``EARLYEXIT_DEBUG=1`` an error comes with its trace.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from earlyexit.commands import clocks, models, studies
from earlyexit.runs.freshness import RunError
from earlyexit.runs.settings import Settings, UsageError

log = logging.getLogger("earlyexit")
DEBUG = "EARLYEXIT_DEBUG"  # a variable that is set: an error is followed by what led to it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    for stream in (sys.stdout, sys.stderr):  # a sign that an encoding lacks must not end a run
        if hasattr(stream, "reconfigure"):  # a notebook's own have no encoding
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.DEBUG if os.environ.get(DEBUG) else logging.INFO)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        return _complain("interrupted; what was finished before is kept", 130)
    except UsageError as error:
        return _complain(str(error), 2)
    except (RunError, OSError, ValueError) as error:  # a notebook, a full disk, missing results
        log.debug("what led to it", exc_info=error)
        too_long = getattr(error, "errno", None) == errno.ENAMETOOLONG  # asked for by an option
        return _complain(str(error), 2 if too_long else 1)


def study_settings(arguments: str) -> Settings:
    """Return the settings of a study, from the options of ``run`` in one line."""
    return studies.settings_of(_parser().parse_args(["run", *shlex.split(arguments)]))


def _complain(message: str, code: int) -> int:
    print(f"earlyexit: {' '.join(message.split())}", file=sys.stderr)
    return code


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

    for room in (studies, models, clocks):
        room.add_commands(add)
    return parser


if __name__ == "__main__":
    sys.exit(main())
