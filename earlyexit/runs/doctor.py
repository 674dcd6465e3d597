"""The doctor looks for what would stop or disturb a run, and says what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from earlyexit.corpus.documents import check_hub, read_documents
from earlyexit.runs.paths import Project, project
from earlyexit.runs.profiles import Profile, get_profile
from earlyexit.runs.provenance import hardware
from earlyexit.runs.workers import MEMORY, usual_jobs

PYTHON = (3, 11)
GIB = 2**30
LEAST_DISK, DISK = 0.5 * GIB, 2 * GIB  # bytes: below the first a run stops, below the second it may
LEAST_MEMORY = MEMORY / 2  # bytes: a training of the default profile has taken 0.9 GB, with torch


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        verdict: "fine", "careful" (a run works, but slowly or with unreliable times), or "stops".
        said: what was found; remedy: what to do, "" if it is fine.
    """

    name: str
    verdict: Literal["fine", "careful", "stops"]
    said: str
    remedy: str = ""


def examine(
    profile: str = "cpu", data_dir: str | None = None, root: str | Path | None = None
) -> Iterator[Finding]:
    """Look at Python, disk, folders, text, cores and memory, for a run of this profile.

    Raises:
        ValueError: the profile is unknown.
    """
    place, wanted = project(root), get_profile(profile, data_dir=data_dir)
    yield _python()
    yield _disk(place)
    yield _folders(place)
    yield _text(wanted)
    yield _cores(wanted)
    yield _memory(wanted)


def _python() -> Finding:
    said, wanted = platform.python_version(), ".".join(map(str, PYTHON))
    if sys.version_info < PYTHON:
        return Finding("Python", "stops", said, f"install Python {wanted} and set it up again")
    return Finding("Python", "fine", f"{said}, torch {torch.__version__}")


def _disk(place: Project) -> Finding:
    free = shutil.disk_usage(place.root).free
    said = f"{free / GIB:.1f} GiB free at {place.root}"
    if free >= DISK:
        return Finding("disk", "fine", said)
    verdict = "stops" if free < LEAST_DISK else "careful"
    remedy = (
        f"free {DISK / GIB:g} GiB, or move the project; .cache may be deleted, which costs time"
    )
    return Finding("disk", verdict, said, remedy)


def _folders(place: Project) -> Finding:
    wrong = []
    for folder in (place.cache, place.build, place.results, place.figures):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            wrong.append(f"{place.relative(folder)}/ ({error.strerror})")
    if wrong:
        remedy = f"make them writable, or copy the project to where you may write: {place.root}"
        return Finding("folders", "stops", f"cannot write {', '.join(wrong)}", remedy)
    return Finding("folders", "fine", "cache, build, results and figures can be written")


def _text(profile: Profile) -> Finding:
    corpus = profile.corpus
    try:
        if corpus.is_wikitext and corpus.data_dir is None:
            check_hub(corpus)
            return Finding("text", "fine", f"{corpus.name} is cached, or the hub can be reached")
        n = len(read_documents(corpus))
        return Finding("text", "fine", f"{corpus.name}, {n:,} documents, no download")
    except (ValueError, OSError) as error:
        remedy = (
            "give --data-dir a folder with the text, or take profile cpu, which needs no download"
        )
        return Finding("text", "stops", " ".join(str(error).split()), remedy)


def _cores(profile: Profile) -> Finding:
    cores, load = hardware()["usable_cpus"], os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    said = f"{cores} usable, {profile.threads} thread(s) for each training, load {load:.1f}"
    if profile.threads > cores:
        remedy = f"`run --threads {cores}`, whose results get a folder of their own"
        return Finding("cores", "careful", said, remedy)
    if load > cores / 2:
        remedy = "others use this machine: wait, if times matter; all other numbers stay the same"
        return Finding("cores", "careful", said, remedy)
    return Finding("cores", "fine", said)


def _memory(profile: Profile) -> Finding:
    free = psutil.virtual_memory().available
    said = f"{free / GIB:.1f} GiB free, {usual_jobs(profile.threads)} training(s) at a time"
    if free >= MEMORY:
        return Finding("memory", "fine", said)
    verdict = "stops" if free < LEAST_MEMORY else "careful"
    return Finding(
        "memory", verdict, said, f"close other programs, until {MEMORY / GIB:g} GiB are free"
    )
