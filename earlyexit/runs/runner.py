"""The runner executes notebooks in order, each only if something it depends on has changed."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from earlyexit.atomic import remove_leftovers
from earlyexit.corpus.documents import CorpusConfig, check_hub, read_documents
from earlyexit.runs import freshness, publish
from earlyexit.runs.decoders import lacking
from earlyexit.runs.execute import execute
from earlyexit.runs.freshness import RunError
from earlyexit.runs.paths import Project, project
from earlyexit.runs.provenance import Fingerprint, Record
from earlyexit.runs.settings import Resolved, Settings, UsageError, resolve

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One notebook of a plan, with what it needs, why it must run (empty: fresh), and its time.

    Attributes:
        published: whether it has results.
        here: whether it ran here, so that there is an executed copy.
        lacks: what to install before it can run; it is left out.
    """

    notebook: str
    needs: list[str]
    reasons: list[str]
    minutes: float | None
    basis: str
    published: bool
    here: bool
    lacks: str = ""

    @property
    def state(self) -> str:
        """Say in words how its results stand."""
        if self.lacks:
            return "left out"
        if not self.published:
            return "not run yet"
        if not self.here:
            return "published, not run here"
        return "stale" if self.reasons else "fresh"


@dataclass(frozen=True)
class Plan:
    """A plan lists what a run would do under one label."""

    label: str
    command: str
    steps: list[Step]


@dataclass(frozen=True)
class _Request:
    """A request names the notebooks to run.

    Attributes:
        chosen: their paths, in order; named: whether by name, or because there are no others.
        needs: notebook → notebooks whose tables it reads.
    """

    place: Project
    chosen: list[Path]
    named: bool
    resolved: Resolved
    needs: dict[str, list[str]]

    def check(self, notebook: str) -> tuple[list[str], Fingerprint, Record | None]:
        """Return why a notebook must run, its fingerprint now, and its record."""
        path, needs = self.place.notebook(notebook), self.needs[notebook]
        current = freshness.fingerprint(self.place, path, self.resolved, needs)
        record = freshness.published(self.place, self.resolved.label, notebook)
        return freshness.reasons(self.place, record, current), current, record

    def lacks(self, notebook: str, force: bool = False) -> str:
        """Return what to install before a notebook can run; "" if nothing, or if it is fresh.

        Raises:
            UsageError: the notebook was asked for by name.
        """
        decoder = self.resolved.parameters[notebook].get("decoder")
        found = "" if decoder is None else lacking(decoder, self.place.cache)
        if not found or not (force or self.check(notebook)[0]):
            return ""
        if self.named:
            raise UsageError(f"{notebook}: {found}")
        return found

    def inputs_left_out(self) -> set[str]:
        """Return the notebooks that are not chosen but whose tables are read."""
        names = {path.stem for path in self.chosen}
        return {other for name in names for other in self.needs[name]} - names


def plan(settings: Settings, only: tuple[str, ...] = (), root: str | Path | None = None) -> Plan:
    """Return what ``run`` would do, and why, without writing anything.

    Args:
        only: notebooks by number or name, such as ``"3"``, ``"03"``, ``"03_threshold_sweep"``.

    Raises:
        UsageError: a setting is wrong, a notebook is unknown, one reads results that are missing, one
            that is named lacks a package, or one must run and its text is neither cached nor reachable.
    """
    request = _request(project(root), settings, only)
    label, needs = request.resolved.label, request.needs
    known = freshness.all_published(request.place)
    work = freshness.training_work(request.resolved.profile, len(request.resolved.seeds))
    steps: list[Step] = []
    for name in (path.stem for path in request.chosen):
        why, _, record = request.check(name)
        if lacks := request.lacks(name):
            steps.append(Step(name, needs[name], [], None, lacks, record is not None, False, lacks))
            continue
        again = [s.notebook for s in steps if s.reasons and s.notebook in needs[name]]
        why = why or [f"input {other} will be made again" for other in again]
        time, basis = freshness.minutes(name, label, work, known)
        basis += ", by an earlier version" if record and record.is_old else ""
        here = request.place.executed(label, name).is_file()
        steps.append(Step(name, needs[name], why, time, basis, record is not None, here))
    _check_hub(request.resolved.profile.corpus, (step.reasons for step in steps))
    return Plan(label, settings.command(*only), steps)


def run(
    settings: Settings,
    only: tuple[str, ...] = (),
    force: bool = False,
    root: str | Path | None = None,
) -> list[str]:
    """Execute the notebooks that are not fresh, or all with ``force``; return their names.

    A notebook whose packages are not installed is left out, unless ``only`` names it.

    Raises:
        UsageError: see :func:`plan`; nothing has been run then.
        RunError: a notebook failed or wrote nothing, or another run is writing the same results.
    """
    request = _request(project(root), settings, only)
    place, resolved = request.place, request.resolved
    for name in sorted(request.inputs_left_out()):
        if why := request.check(name)[0]:
            log.warning("%s is stale (%s); its tables are used as they are", name, "; ".join(why))
    chosen = []
    for path in request.chosen:
        if lacks := request.lacks(path.stem, force):
            log.warning("%s is left out: %s", path.stem, lacks)
        else:
            chosen.append(path)
    every = (request.check(path.stem)[0] for path in chosen)
    _check_hub(resolved.profile.corpus, ["forced"] if force else every)
    done = []
    for position, path in enumerate(chosen, start=1):
        with _only_writer(place, resolved.label, path.stem):
            why, current, record = request.check(path.stem)
            if not why and not force:
                old = ", made by an earlier version: --force makes it anew"
                log.info("%s is fresh%s", path.stem, old if record.is_old else "")
                continue
            log.info("%s: %s", path.stem, "; ".join(why) or "forced")
            title = f"[{position}/{len(chosen)}] {path.stem}"
            execute(place, path, resolved, settings.command(path.stem), current, title)
            done.append(path.stem)
    if resolved.label in publish.QUOTED and place.readme.is_file():
        for name in publish.update(place.readme, place.root):
            log.info("README: block %s regenerated", name)
    return done


def status(profile: str | None = None, root: str | Path | None = None) -> list[Plan]:
    """Return the plan of every label that has results, of one profile or of all.

    Raises:
        UsageError: the profile is unknown.
    """
    # A label that is a profile's name is compared with the profile's defaults, as `run` does.
    wanted = {profile: Settings(profile)} if profile else {}
    for record in freshness.all_published(project(root)):
        asked, label = record.settings, record.label
        if asked.profile and profile in (None, asked.profile):
            plain = label == asked.profile
            changes = {} if plain else {"seeds": asked.seeds, "sets": asked.sets}
            wanted[label] = Settings(asked.profile, data_dir=None, **changes)
    plans = []
    for label, settings in wanted.items():
        try:
            plans.append(plan(settings, root=root))
        except UsageError as error:
            if label == profile:
                raise
            log.warning("%s cannot be run any more: %s", label, error)  # e.g. a field was removed
    return plans


def _request(place: Project, settings: Settings, only: tuple[str, ...]) -> _Request:
    """Return the chosen notebooks with their typed parameters; raise as :func:`plan` does."""
    notebooks = freshness.discover(place)
    chosen = sorted({_find(name, notebooks) for name in only}) or notebooks
    needs = {path.stem: freshness.needs(path, notebooks) for path in notebooks}
    # A key of an upstream notebook is part of the label whose tables are read.
    relevant = {path.stem for path in chosen}
    for path in reversed(notebooks):
        relevant |= set(needs[path.stem]) if path.stem in relevant else set()
    resolved = resolve(settings, [path for path in notebooks if path.stem in relevant])
    if settings.data_dir:
        _check_text(resolved.profile.corpus)
    request = _Request(place, chosen, bool(only), resolved, needs)
    for other in sorted(request.inputs_left_out()):
        if freshness.published(place, resolved.label, other) is None:
            reader = next(path.stem for path in chosen if other in needs[path.stem])
            raise UsageError(
                f"{reader} needs {other}, which has no results under {resolved.label}: "
                f"add `--only {other}` or leave out --only"
            )
    return request


def _check_text(corpus: CorpusConfig) -> None:
    """Raise UsageError unless a text of the user's own can be read and fills every split."""
    try:
        read_documents(corpus)
    except (ValueError, OSError) as error:
        raise UsageError(f"--data-dir: {error}") from None


def _check_hub(corpus: CorpusConfig, reasons: Iterable) -> None:
    """Raise UsageError if a notebook must run whose text is the hub's, and neither cached nor reachable.

    Args:
        reasons: of each notebook; empty if it is fresh.
    """
    if corpus.is_wikitext and corpus.data_dir is None and any(reasons):
        try:
            check_hub(corpus)
        except ConnectionError as error:
            raise UsageError(f"--data-dir: {error}") from None


def _find(name: str, notebooks: list[Path]) -> Path:
    number = name.zfill(2) if name.isdigit() else None
    for path in notebooks:
        if path.stem == name.removesuffix(".ipynb") or path.stem.split("_")[0] == number:
            return path
    raise UsageError(f"--only {name}: no such notebook; {', '.join(p.stem for p in notebooks)}")


@contextmanager
def _only_writer(place: Project, label: str, notebook: str) -> Iterator[None]:
    """Hold the lock of a label's notebook, which is released when the process ends; remove leftovers."""
    folder = place.build / label
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / f".{notebook}.lock").acquire(timeout=0):
            place.executed(label, f".{notebook}.tmp").unlink(missing_ok=True)
            for home in (place.results / label, place.figures / label, place.cache):
                remove_leftovers(home)
            yield
    except Timeout:
        raise RunError(
            f"another run is writing {label}/{notebook}; wait for it or stop it"
        ) from None
