"""The fields of a frozen dataclass are validated when an instance is made, or read from JSON."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import fields
from functools import cache, wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

Count = Annotated[int, Field(ge=1)]
Limit = Annotated[int, Field(ge=0)]  # 0: none
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(gt=0, lt=1)]
LARGEST_RATE = 1e6  # of learning: the step of an optimizer still is a finite float32
T = TypeVar("T")

# Kind of pydantic's error → what the value must be; braces name the bounds in the error's context.
_RULES = {
    "greater_than_equal": "must be ≥ {ge}",
    "greater_than": "must be > {gt}",
    "less_than_equal": "must be ≤ {le}",
    "less_than": "must be < {lt}",
    "literal_error": "must be {expected}",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a dictionary",
    "too_short": "must have at least {min_length} values",
    "too_long": "must have at most {max_length} values",
    "value_error": "{error}",
}


def brief(value: object) -> str:
    """Return the beginning of a value's ``repr``, on one line."""
    return " ".join(repr(value).split())[:60]


def whole(name: str, value: object, low: int = 0, high: int = 2**63 - 1) -> int:
    """Return a whole number from ``low`` to ``high``.

    Raises:
        TypeError: the value is no whole number.
        ValueError: it is smaller or larger.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}={brief(value)}: must be a whole number")
    if (number := int(value)) < low:
        raise ValueError(f"{name}={number}: must be ≥ {low}")
    if number > high:
        raise ValueError(f"{name}={number}: must be ≤ {high}")
    return number


def real(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Return a finite number ≥ ``least``, > ``above`` and < ``below``.

    Raises:
        TypeError: the value is no number.
        ValueError: it lies outside, or is NaN or infinite.
    """
    if isinstance(value, (str, bool)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}={brief(value)}: must be a number")
    number, bounds = float(value), {"≥": least, ">": above, "<": below}
    if not (least <= number < below and number > above and math.isfinite(number)):
        told = " and".join(f" {sign} {x:g}" for sign, x in bounds.items() if math.isfinite(x))
        raise ValueError(f"{name}={number}: must be a finite number{told}")
    return number


def bounded(**most: float) -> Callable[[T], T]:
    """Refuse numbers above their bounds before a function is called, or an instance of a class made.

    It only refuses, so a decorator says it: digests of code leave this one out, and a new bound makes no
    result stale (see :mod:`earlyexit.runs.digests`).

    Args:
        most: name of an argument → the largest value that is let through.

    Raises:
        ValueError: of the decorated: a number is larger.
    """

    def decorate(kind: T) -> T:
        call = kind.__init__ if isinstance(kind, type) else kind
        signature = inspect.signature(call)

        @wraps(call)
        def checked(*args: Any, **named: Any) -> Any:
            try:
                given = signature.bind(*args, **named).arguments
            except TypeError:  # which the call itself says better
                given = {}
            for name in most.keys() & given.keys():
                if _exceeds(given[name], most[name]):
                    raise ValueError(f"{name}={brief(given[name])}: must be ≤ {most[name]:g}")
            return call(*args, **named)

        if not isinstance(kind, type):
            return checked
        kind.__init__ = checked
        return kind

    return decorate


def listed(*names: str) -> Callable[[T], T]:
    """Refuse arguments that are no lists, before a function is called; None is let through.

    It only refuses, as :func:`bounded` does, and is no part of a digest either.

    Raises:
        TypeError: of the decorated: what it is given by one of these names cannot be gone through.
    """

    def decorate(call: T) -> T:
        signature = inspect.signature(call)

        @wraps(call)
        def checked(*args: Any, **named: Any) -> Any:
            given = signature.bind_partial(*args, **named).arguments
            for name in names:
                if (value := given.get(name)) is not None and not _can_be_gone_through(value):
                    raise TypeError(f"{name}={brief(value)}: must be a list")
            return call(*args, **named)

        return checked

    return decorate


def _can_be_gone_through(value: object) -> bool:
    try:
        iter(value)
    except TypeError:
        return False
    return True


def refused(kind: type[Exception], told: str) -> Callable[[T], T]:
    """Turn a library's own kind of error into a ValueError of one line.

    It only refuses, as :func:`bounded` does, and is no part of a digest either.

    Args:
        told: the line, in which braces name arguments of the decorated function, or ``{error}``.
    """

    def decorate(call: T) -> T:
        signature = inspect.signature(call)

        @wraps(call)
        def checked(*args: Any, **named: Any) -> Any:
            try:
                return call(*args, **named)
            except kind as error:
                given = signature.bind(*args, **named).arguments
                why = str(error).partition("\n")[0]
                raise ValueError(told.format(**given | {"error": why})) from error

        return checked

    return decorate


def _exceeds(value: object, most: float) -> bool:
    """Tell whether a number is too large; what is no number is left to the call itself."""
    try:
        return not isinstance(value, str) and float(value) > most
    except OverflowError:
        return True
    except (TypeError, ValueError, RuntimeError):
        return False


class Checked:
    """A base of frozen dataclasses enforces annotations such as ``Annotated[int, Field(ge=1)]``.

    Types are strict: text is no number, and ``True`` or 2.0 is no whole number. But a whole number
    becomes a float for a float field, and a list a tuple where the annotation allows it.

    Raises:
        ValueError: fields are wrong; the message names each, its value and its rule, in one line.
    """

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        try:
            valid = _schema(type(self)).model_validate(values)
        except ValidationError as error:
            first: dict = {}  # of each field: what follows from it says nothing new
            for wrong in error.errors(include_url=False):
                first.setdefault(wrong["loc"][0], wrong)
            raise ValueError("; ".join(map(_sentence, first.values()))) from None
        for name in values:
            object.__setattr__(self, name, getattr(valid, name))


@cache
def _schema(kind: type) -> type[BaseModel]:
    """Return the pydantic model with the fields of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    config = ConfigDict(
        strict=True, allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=()
    )
    # Every field is given a value, so the schema needs no defaults.
    types = {field.name: hints[field.name] for field in fields(kind)}
    return create_model(kind.__name__, __config__=config, **types)


def _sentence(error: dict[str, Any]) -> str:
    name, *inside = error["loc"]
    where = name + "".join(f"[{step!r}]" for step in inside if not isinstance(step, str))
    bounds = {
        key: f"{value:g}" if isinstance(value, float) else value
        for key, value in error.get("ctx", {}).items()
    }
    rule = _RULES.get(error["type"], error["msg"])
    return f"{where}={error['input']!r}: {rule.format(**bounds)}"


def exact_fields(data: object, kind: type) -> dict[str, Any]:
    """Return a JSON object that has the fields of a dataclass, no more and no fewer.

    Raises:
        ValueError: it is no object, or fields are missing or unknown; the message names them.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{data!r:.80} is not a JSON object with named fields")
    names = {field.name for field in fields(kind)}
    wrong = {"missing": sorted(names - set(data)), "unknown": sorted(set(data) - names)}
    if told := "; ".join(
        f"{what}: {', '.join(map(str, some))}" for what, some in wrong.items() if some
    ):
        raise ValueError(f"fields {' '.join(told.split()):.300}")  # on one line
    return data


def parse(text: str | bytes, make: Callable[[object], T] = lambda data: data) -> T:
    """Parse JSON, and make of it what ``make`` does.

    Raises:
        ValueError: the text is no JSON or nested too deeply, or ``make`` refuses it.
    """
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"no JSON ({error})") from None
    except RecursionError:
        raise ValueError("nested too deeply to be read") from None
    return make(data)


def read_document(path: str | Path, make: Callable[[object], T]) -> T:
    """Read a JSON file, and make of it what ``make`` does.

    Raises:
        ValueError: the file holds no JSON, or ``make`` refuses it; the message names the file.
    """
    try:
        return parse(Path(path).read_bytes(), make)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
