"""The settings of a run are checked before anything starts.

Papermill accepts any parameter, even a misspelt one or a string for a number. Here every value must
fit the field of the profile or the parameter of the notebooks that it is meant for.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from earlyexit.runs import digests, profiles
from earlyexit.runs.parameters import (
    COMMON,
    NOTEBOOKS,
    Common,
    as_dict,
    declared,
    names,
    plain,
    saved_otherwise,
)
from earlyexit.runs.provenance import Asked

log = logging.getLogger(__name__)


class UsageError(ValueError):
    """The request is wrong; nothing has been run or written."""


@dataclass(frozen=True)
class Settings:
    """Settings are the options of ``python -m earlyexit run`` that decide what is computed.

    Attributes:
        profile, seeds, device: see :class:`earlyexit.runs.parameters.Common`.
        sets: ``key=value`` for profile fields and notebook parameters; they change the label, as
            other seeds do.
        data_dir: folder with local text, or empty; None: unknown, as when ``status`` compares
            earlier results.
    """

    profile: str = "cpu"
    seeds: tuple[int, ...] = ()
    sets: tuple[str, ...] = ()
    data_dir: str | None = ""
    device: str = "auto"

    def command(self, *only: str) -> str:
        """Return the command line of these settings, without the name of a local folder."""
        options = ["--profile", self.profile, *(f"--only={name}" for name in only)]
        options += ["--seeds", *map(str, self.seeds)] if self.seeds else []
        options += [f"--set={pair}" for pair in self.sets]
        options += ["--data-dir=DIR"] if self.data_dir else []
        options += [f"--device={self.device}"] if self.device != "auto" else []
        return shlex.join(["python", "-m", "earlyexit", "run", *options])


@dataclass(frozen=True)
class Resolved:
    """Settings whose values are typed and assigned to the profile or to notebooks.

    Attributes:
        label: folder of the results.
        profile: profile with its overrides applied.
        asked: what was asked for.
        parameters: name of a notebook → all its parameters.
    """

    label: str
    profile: profiles.Profile
    asked: Asked
    parameters: dict[str, dict[str, Any]]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return all seeds that are used."""
        return self.asked.seeds or self.profile.seeds

    def seeds_of(self, notebook: str) -> tuple[int, ...]:
        """Return those that a notebook is about."""
        return self.profile.seeds_of(notebook, self.asked.seeds)


def resolve(settings: Settings, notebooks: list[Path]) -> Resolved:
    """Sort the settings into the profile's overrides and the parameters of each notebook.

    Raises:
        UsageError: a profile, key or data folder is unknown, a field or parameter cannot have its
            value, or the parameters cell of a notebook is invalid.
    """
    if settings.data_dir and not Path(settings.data_dir).is_dir():
        raise UsageError(f"--data-dir: no folder {settings.data_dir}")
    data_dir = profiles.UNKNOWN if settings.data_dir is None else settings.data_dir or None
    try:
        kinds = {path.stem: _declared(path) for path in notebooks}
        overrides, changes = _sorted(settings.sets, kinds)
        profile = profiles.get_profile(settings.profile, overrides, data_dir)
        changed = {key: plain(profiles.value_of(profile, key)) for key in overrides}
        common = {
            "profile": settings.profile,
            "seeds": settings.seeds,
            "data_dir": str(Path(settings.data_dir).resolve()) if settings.data_dir else "",
            "device": settings.device,
            "overrides": dict(changed),
        }
        parameters = {}
        for notebook, kind in kinds.items():
            values = profile.notebooks.get(notebook, {}) if kind is NOTEBOOKS.get(notebook) else {}
            asked = {name: value for users, name, value in changes.values() if notebook in users}
            parameters[notebook] = as_dict(kind(**common | values | asked))
        changed |= {key: parameters[users[0]][name] for key, (users, name, _) in changes.items()}
        label = profiles.label(settings.profile, changed, settings.seeds)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if Path(label).name != label or not label.isprintable():
        raise UsageError(f"no folder can be called {label!r}")
    asked = Asked(settings.profile, settings.seeds, settings.sets)
    return Resolved(label, profile, asked, parameters)


def _declared(path: Path) -> type[Common]:
    """Return the parameters of a notebook, whose cell must have the common ones.

    ``run`` does not read the values in the cell; the log warns if they are not the defaults.
    """
    cell = digests.notebook_parameters(path)
    for name, kind in COMMON.items():
        if cell.get(name, ("",))[0] != kind:
            raise ValueError(f"{path.stem}: its parameters cell needs `{name}: {kind}`")
    if saved := saved_otherwise(path):
        pairs = shlex.join(f"--set={name}={json.dumps(value)}" for name, value in saved.items())
        warning = "%s: run does not take the values saved in its parameters cell; give %s"
        log.warning(warning, path.stem, pairs)
    return declared(path)


def _sorted(
    sets: Sequence[str], kinds: dict[str, type[Common]]
) -> tuple[dict[str, Any], dict[str, tuple[list[str], str, Any]]]:
    """Return overrides of the profile and changes of notebook parameters, by their keys in a label.

    A change is the notebooks that it is for, the parameter and its value.

    Raises:
        ValueError: a pair is no ``key=value``, or its key is unknown, ambiguous, or has an option.
    """
    overrides, changes = {}, {}
    for pair in sets:
        key, equals, text = pair.partition("=")
        if not (key and equals):
            raise ValueError(f"--set {pair}: expected key=value")
        if key == "overrides":
            raise ValueError(f"--set {key}: name the profile's fields themselves: --set epochs=2.0")
        if key in COMMON or key in profiles.ELSEWHERE:
            option = profiles.ELSEWHERE.get(key) or "--" + key.replace("_", "-")
            raise ValueError(f"--set {key}: use {option}")
        notebook, _, name = key.rpartition(".")
        users = [
            user for user, kind in kinds.items()
            if name in names(kind) and notebook in ("", user, user.partition("_")[0])
        ]  # fmt: skip
        known = [k for k in profiles.KEYS if key in (k, profiles.KEYS[k], k.partition(".")[2])]
        if known and (users or not profiles.short_key(key)):
            choice = known + [f"{user}.{name}" for user in users]
            raise ValueError(f"--set {key}: name {' or '.join(choice)}")
        if known:
            overrides[profiles.short_key(key)] = read_value(text)
        elif users:
            shown = f"{users[0].partition('_')[0]}.{name}" if notebook else name
            value = read_value(text, get_type_hints(kinds[users[0]])[name])
            changes[shown] = (users, name, value)
        else:
            fields = ", ".join(profiles.KEYS.values())
            special = ", ".join(sorted({n for kind in kinds.values() for n in names(kind)}))
            raise ValueError(
                f"--set {key}: no such key; profile fields: {fields}; notebook parameters:"
                f" {special or 'none'}"
            )
    return overrides, changes


def read_value(text: str, hint: Any = None) -> Any:
    """Parse ``text`` as JSON, or as Python's True, False or None; else return the text itself.

    Args:
        hint: type of the parameter; with ``str`` the text is returned as it is.
    """
    if hint is str:
        return text
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except (ValueError, RecursionError):
        return text
