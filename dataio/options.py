"""Base of dataio's options: validated when they are made, frozen, and nested as they are in the schema of a run."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Self

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class Options(BaseModel):
    """Options that cannot be changed. Raises pydantic's ValidationError, a ValueError, where one has no meaning."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, validated."""
        return type(self)(**dict(self) | changes)


_Options = TypeVar("_Options", bound=Options)


def parse_options(options: type[_Options], **values: Any) -> _Options:
    """Options from values that a user gave. Raises ValueError with one line for each fault."""
    try:
        return options(**values)
    except ValidationError as error:
        raise ValueError("\n".join(describe_fault(fault) for fault in error.errors())) from error


def describe_fault(fault: Any) -> str:
    """One line about an entry of `ValidationError.errors()`: the option, its value, what is allowed."""
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    name = ".".join(str(part) for part in fault["loc"])
    return f"{name} is {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
