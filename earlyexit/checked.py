"""Frozen dataclasses whose fields are validated when an instance is made."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

Count = Annotated[int, Field(ge=1)]
Limit = Annotated[int, Field(ge=0)]  # 0: none
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(gt=0, lt=1)]

# What a value must be, by the kind of pydantic's error; braces name what its bounds are called.
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


class Checked:
    """Base of frozen dataclasses: an annotation such as ``Annotated[int, Field(ge=1)]`` is enforced.

    Types are taken strictly: no number is read from text, and no whole number from ``True`` or 2.0. A
    whole number becomes a float where a float is meant, and a list becomes a tuple where one is meant.

    Raises:
        ValueError: naming each wrong field, its value and what it must be, in one line.
    """

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        try:
            valid = _schema(type(self)).model_validate(values)
        except ValidationError as error:
            raise ValueError("; ".join(map(_sentence, error.errors(include_url=False)))) from None
        for name in values:
            object.__setattr__(self, name, getattr(valid, name))


@cache
def _schema(kind: type) -> type[BaseModel]:
    """The pydantic model with the fields of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    config = ConfigDict(
        strict=True, allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=()
    )
    # Values are given for every field: defaults are the dataclass's affair.
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
