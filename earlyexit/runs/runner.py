"""Runs the notebooks in order, each only if something it depends on has changed.

A notebook is executed in ``build/``; what it wrote is published when it has succeeded, and its record
last. Killed at any moment, the next run finds either a record that matches its files or work to do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from earlyexit.runs import freshness, publish
from earlyexit.runs.execute import execute
from earlyexit.runs.freshness import RunError
from earlyexit.runs.paths import Project, project
from earlyexit.runs.provenance import FORMAT, Fingerprint, Record
from earlyexit.runs.settings import Resolved, Settings, UsageError, resolve

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One notebook of a plan: what it depends on, why it must run (if so), how long it may take."""

    notebook: str
    needs: list[str]
    reasons: list[str]
    minutes: float | None
    basis: str


@dataclass(frozen=True)
class Plan:
    """What a run would do under one label."""

    label: str
    command: str
    steps: list[Step]


def plan(settings: Settings, only: tuple[str, ...] = (), root: str | Path | None = None) -> Plan:
    """What ``run`` would do, and why; writes nothing.

    Args:
        only: notebooks by number or name, such as ``"3"``, ``"03"``, ``"03_threshold_sweep"``.

    Raises:
        UsageError: a wrong setting, an unknown notebook, or one that reads missing results.
    """
    place = project(root)
    chosen, resolved, upstream = _prepare(place, settings, only)
    known = freshness.all_published(place)
    work = freshness.training_work(resolved.profile, len(resolved.seeds))
    steps: list[Step] = []
    for path in chosen:
        why, _, record = _check(place, path, resolved, upstream[path.stem])
        again = [s.notebook for s in steps if s.reasons and s.notebook in upstream[path.stem]]
        why = why or [f"input {name} will be made again" for name in again]
        time, basis = freshness.minutes(path.stem, resolved.label, work, known)
        basis += ", by an earlier version" if _made_before(record) else ""
        steps.append(Step(path.stem, upstream[path.stem], why, time, basis))
    return Plan(resolved.label, settings.command(*only), steps)


def run(
    settings: Settings,
    only: tuple[str, ...] = (),
    force: bool = False,
    root: str | Path | None = None,
) -> list[str]:
    """Execute the notebooks that are not fresh, or all with ``force``; returns their names.

    Raises:
        UsageError: as in ``plan``; nothing has been run then.
        RunError: a notebook failed or wrote nothing, or another run is writing the same label.
    """
    place = project(root)
    chosen, resolved, upstream = _prepare(place, settings, only)
    _warn_of_stale_inputs(place, chosen, resolved, upstream)
    done = []
    with _only_writer(place, resolved.label):
        for position, path in enumerate(chosen, start=1):
            why, current, record = _check(place, path, resolved, upstream[path.stem])
            if not why and not force:
                old = ", made by an earlier version: --force makes it anew"
                log.info("%s is fresh%s", path.stem, old if _made_before(record) else "")
                continue
            log.info("%s: %s", path.stem, "; ".join(why) or "forced")
            title = f"[{position}/{len(chosen)}] {path.stem}"
            execute(place, path, resolved, settings.command(path.stem), current, title)
            done.append(path.stem)
    _refresh_readme(place, resolved.label)
    return done


def status(profile: str | None = None, root: str | Path | None = None) -> list[Plan]:
    """The plan of every label that has results, of one profile or of all.

    Raises:
        UsageError: unknown profile.
    """
    place = project(root)
    asked = {r.label: r.settings for r in freshness.all_published(place) if r.settings}
    # Under its own name a profile is compared with its defaults, as `run` would.
    wanted = {name: Settings(name) for name in ([profile] if profile else [])}
    for label, recorded in asked.items():
        if profile in (None, recorded["profile"]):
            plain = label == recorded["profile"]
            sets = () if plain else tuple(recorded["sets"])
            seeds = () if plain else tuple(recorded["seeds"])
            wanted[label] = Settings(recorded["profile"], seeds, sets, data_dir=None)
    plans = []
    for label, settings in wanted.items():
        try:
            plans.append(plan(settings, root=root))
        except UsageError as error:
            if label == profile:
                raise
            log.warning("%s cannot be run any more: %s", label, error)  # a field has gone, say
    return plans


def _prepare(
    place: Project, settings: Settings, only: tuple[str, ...]
) -> tuple[list[Path], Resolved, dict[str, list[str]]]:
    """The chosen notebooks, their typed parameters, and what every notebook needs."""
    notebooks = freshness.discover(place)
    chosen = sorted({_find(name, notebooks) for name in only}) or notebooks
    upstream = {path.stem: freshness.needs(path, notebooks) for path in notebooks}
    # A key that only an upstream notebook knows names the label whose tables are read.
    relevant = {path.stem for path in chosen}
    for path in reversed(notebooks):
        relevant |= set(upstream[path.stem]) if path.stem in relevant else set()
    resolved = resolve(settings, [path for path in notebooks if path.stem in relevant])
    for path in chosen:
        for other in upstream[path.stem]:
            ready = freshness.published(place, resolved.label, other)
            if place.notebooks / f"{other}.ipynb" not in chosen and ready is None:
                raise UsageError(
                    f"{path.stem} needs {other}, which has no results under {resolved.label}: "
                    f"add `--only {other}` or leave out --only"
                )
    return chosen, resolved, upstream


def _find(name: str, notebooks: list[Path]) -> Path:
    number = name.zfill(2) if name.isdigit() else None
    for path in notebooks:
        if path.stem == name.removesuffix(".ipynb") or path.stem.split("_")[0] == number:
            return path
    raise UsageError(f"--only {name}: no such notebook; {', '.join(p.stem for p in notebooks)}")


def _check(
    place: Project, path: Path, resolved: Resolved, upstream: list[str]
) -> tuple[list[str], Fingerprint, Record | None]:
    """Why a notebook must run, its fingerprint now, and its record."""
    current = freshness.fingerprint(place, path, resolved, upstream)
    record = freshness.published(place, resolved.label, path.stem)
    return freshness.reasons(place, record, current), current, record


def _made_before(record: Record | None) -> bool:
    return record is not None and record.format < FORMAT


@contextmanager
def _only_writer(place: Project, label: str) -> Iterator[None]:
    """Hold the label's lock, which the system releases when its holder dies, and tidy up."""
    folder = place.build / label
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"another run is writing {label}; wait for it or stop it") from None
    try:
        for home in (folder, place.results / label, place.figures / label):
            for leftover in home.glob(".*.tmp*"):
                leftover.unlink()
        yield
    finally:
        lock.release()


def _warn_of_stale_inputs(
    place: Project, chosen: list[Path], resolved: Resolved, upstream: dict[str, list[str]]
) -> None:
    """With ``--only``, the tables of a notebook that is left out are used as they are."""
    used = {other for path in chosen for other in upstream[path.stem]}
    for name in sorted(used - {path.stem for path in chosen}):
        why, *_ = _check(place, place.notebooks / f"{name}.ipynb", resolved, upstream[name])
        if why:
            log.warning("%s is stale (%s); its tables are used as they are", name, "; ".join(why))


def _refresh_readme(place: Project, label: str) -> None:
    """The README quotes some profiles; after a run of one, its numbers are the new ones."""
    if label in publish.QUOTED and place.readme.is_file():
        for name in publish.update(place.readme, place.root):
            log.info("README: block %s regenerated", name)
