"""Base class and constrained types of dataio's options: pydantic models, which launch/config.py's schema nests."""

import argparse
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import Self

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


def add_renamed_flag(parser: argparse._ActionsContainer, old: str, new: str) -> None:
    """Add an option of an earlier version, which is an error that names the new one."""
    parser.add_argument(
        old, action=_RenamedFlag, const=new, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


class _RenamedFlag(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        parser.error(f"{self.option_strings[0]} is now {self.const}")


class Options(BaseModel):
    """Immutable options, validated when made. Raises pydantic's ValidationError, a ValueError, for an invalid one."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with these values changed. Raises ValueError with one line for each invalid one."""
        return parse_options(type(self), **dict(self) | changes)


_Options = TypeVar("_Options", bound=Options)


def parse_options(options: type[_Options], **values: Any) -> _Options:
    """Build options from values that a user gave. Raises ValueError with one line for each invalid one."""
    try:
        return options(**values)
    except ValidationError as error:
        raise ValueError("\n".join(describe_fault(fault) for fault in error.errors())) from error


def describe_fault(fault: ErrorDetails) -> str:
    """Format an entry of `ValidationError.errors()` in one line: the option, its value, what is allowed."""
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    name = ".".join(str(part) for part in fault["loc"])
    return f"{name} is {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
