"""What a run is asked for, checked before anything starts.

Papermill passes on whatever it is given: a misspelt parameter, a number that is a string. Here a
value must fit the type of the profile field or notebook parameter it is meant for.
"""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from earlyexit.runs import digests, profiles

# The parameters every notebook has; they have options of their own instead of ``--set``.
COMMON = {
    "profile": "str",
    "seeds": "list",
    "data_dir": "str",
    "device": "str",
    "overrides": "dict",
}


class UsageError(ValueError):
    """The request itself is wrong; nothing has been run or written."""


@dataclass(frozen=True)
class Settings:
    """The options of ``python -m earlyexit run`` that decide what is computed.

    Attributes:
        profile: a name in ``profiles.PROFILES``.
        seeds: instead of the profile's, if any.
        sets: ``key=value`` for profile fields and notebook parameters; they change the label, as
            other seeds do.
        data_dir: folder with local text, if the corpus needs one.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.
    """

    profile: str = "cpu"
    seeds: tuple[int, ...] = ()
    sets: tuple[str, ...] = ()
    data_dir: str = ""
    device: str = "auto"

    def command(self, *only: str) -> str:
        """The command line that asks for this, without the name of any local folder."""
        options = ["--profile", self.profile, *(f"--only={name}" for name in only)]
        options += ["--seeds", *map(str, self.seeds)] if self.seeds else []
        options += [f"--set={pair}" for pair in self.sets]
        options += ["--data-dir=DIR"] if self.data_dir else []
        options += [f"--device={self.device}"] if self.device != "auto" else []
        return shlex.join(["python", "-m", "earlyexit", "run", *options])


@dataclass(frozen=True)
class Resolved:
    """Settings with every value typed and in its place.

    Attributes:
        label: folder of the results.
        profile: with its overrides applied.
        seeds: those that are really used.
        asked: profile, seeds and sets as they were asked for.
        parameters: per notebook (by name), all its parameters.
    """

    label: str
    profile: profiles.Profile
    seeds: tuple[int, ...]
    asked: dict[str, Any]
    parameters: dict[str, dict[str, Any]]


def resolve(settings: Settings, notebooks: list[Path]) -> Resolved:
    """Sort the settings into profile overrides and the parameters of each notebook.

    Raises:
        UsageError: unknown profile, key or data folder, a value of the wrong type, or a notebook
            whose parameters cell is not as it should be.
    """
    if settings.data_dir and not Path(settings.data_dir).is_dir():
        raise UsageError(f"--data-dir: no folder {settings.data_dir}")
    try:
        declared = {path.stem: digests.notebook_parameters(path) for path in notebooks}
    except ValueError as error:
        raise UsageError(str(error)) from None
    for name, parameters in declared.items():
        _check_common(name, parameters)

    types = _profile_types(settings.profile)
    overrides: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {name: {} for name in declared}
    for pair in settings.sets:
        key, equals, text = pair.partition("=")
        users = [name for name in declared if key in declared[name] and key not in COMMON]
        if not equals:
            raise UsageError(f"--set {pair}: expected key=value")
        if key in COMMON:
            raise UsageError(f"--set {key}: {_instead(key)}")
        if key in types:
            overrides[key] = parse_value(key, text, types[key])
        elif not users:
            raise UsageError(f"--set {key}: no such key; {_available(types, declared)}")
        for name in users if key not in types else ():
            own[name][key] = parse_value(key, text, declared[name][key][0])
    try:
        profile = profiles.get_profile(settings.profile, overrides)
        changed = overrides | {k: v for values in own.values() for k, v in values.items()}
        label = profiles.label(settings.profile, changed, settings.seeds)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if Path(label).name != label:
        raise UsageError(f"no folder can be called {label!r}")

    common = {
        "profile": settings.profile,
        "seeds": list(settings.seeds),
        "data_dir": str(Path(settings.data_dir).resolve()) if settings.data_dir else "",
        "device": settings.device,
        "overrides": overrides,
    }
    parameters = {
        name: {key: default for key, (_, default) in declared[name].items()} | common | own[name]
        for name in declared
    }
    asked = {key: getattr(settings, key) for key in ("profile", "seeds", "sets")}
    return Resolved(label, profile, settings.seeds or profile.seeds, asked, parameters)


def parse_value(key: str, text: str, kind: str) -> Any:
    """``text`` as a value of type ``kind``: bool, int, float, str, list, tuple or dict.

    Raises:
        UsageError: it is not one; ``1.0`` is no int, ``1`` no bool, NaN no float.
    """
    try:
        match kind:
            case "str":
                return text
            case "bool":
                return {"true": True, "false": False}[text.lower()]
            case "int":
                return int(text)
            case "float":
                if math.isfinite(number := float(text)):
                    return number
            case "list" | "tuple" | "dict":
                value = json.loads(text)
                if isinstance(value, dict if kind == "dict" else list):
                    return value
    except (ValueError, KeyError):
        pass
    hint = {"bool": " (true or false)", "list": " (JSON)", "tuple": " (JSON list)"}.get(kind, "")
    raise UsageError(f"--set {key}={text}: expected {kind}{hint}")


def _profile_types(name: str) -> dict[str, str]:
    """Field → type of what ``--set`` may change in a profile."""
    if name not in profiles.PROFILES:
        raise UsageError(f"unknown profile {name!r}; choose one of {', '.join(profiles.PROFILES)}")
    profile = profiles.PROFILES[name]
    names = (field.name for field in fields(profile) if field.name not in ("name", "about"))
    return {name: type(getattr(profile, name)).__name__ for name in names}


def _check_common(name: str, parameters: dict[str, tuple[str, Any]]) -> None:
    for key, kind in COMMON.items():
        if parameters.get(key, ("",))[0] != kind:
            raise UsageError(f"{name}: its parameters cell needs `{key}: {kind}`")


def _instead(key: str) -> str:
    return {
        "overrides": "name the profile's fields themselves: --set epochs=2.0",
    }.get(key, f"use --{key.replace('_', '-')}")


def _available(types: dict[str, str], declared: dict[str, dict[str, tuple[str, Any]]]) -> str:
    """The keys that exist, as one line."""
    own = sorted({key for parameters in declared.values() for key in parameters} - set(COMMON))
    return f"profile fields: {', '.join(types)}; notebook parameters: {', '.join(own) or 'none'}"
