"""YAML for a pydantic schema: values that the schema types as text stay as written.

Plain YAML 1.1 turns `output: 2024` into a number, `on` into a boolean and `2024-05-01` into a date, reads `0100` as
octal and `1:30` in base 60, and takes the last of two values for one key. config.py reads files and overrides with it.
"""

import re
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

_TAG = "tag:yaml.org,2002:"
_NULLS = ("", "~", "null", "Null", "NULL")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers of YAML 1.2, such as `1e-3`, and without dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.removeprefix(_TAG) in ("bool", "null", "merge")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in {
    "int": r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+",
    "float": r"[-+]?([0-9][0-9_]*(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+|[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+)"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"(?:{_pattern})$"), list("-+.0123456789"))


def read_yaml(text: str | bytes, schema: Any, origin: str) -> Any:
    """Return the value of a YAML document for `schema`, a type or a model; an empty section is {}.

    Raises ValueError, one line that begins with `origin`, for invalid YAML, a key that is set twice, and an alias
    within its own value.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(_as_written(node, schema))
    except yaml.YAMLError as error:
        quotes = "; put quotes around text that holds ': '" if "mapping values" in str(error) else ""
        raise ValueError(f"{origin} is not YAML: {' '.join(str(error).split())}{quotes}") from error
    except _RepeatedKeyError as error:
        raise ValueError(f"{origin}: {error}") from error
    except RecursionError:
        raise ValueError(f"{origin} has an alias within the value that it stands for; write that out") from None


def read_value(text: str, schema: Any, origin: str) -> Any:
    """Return the value of `text` from a command line: the text itself if `schema` is text, else YAML. None for null.

    `~` alone is the home folder if the schema does not allow null.
    """
    if is_text(schema):
        is_null = text in _NULLS and (text != "~" or NoneType in _value_types(schema))
        return None if is_null else text
    return read_yaml(text, schema, origin)


def is_text(schema: Any) -> bool:
    """Return whether values of this type are strings, paths or null."""
    return _value_types(schema) - {NoneType} <= {str, Path} and schema is not None


def field_type(schema: Any, name: Any) -> Any:
    """Return the type of a model's field, or None if there is no such field or `schema` is not a model."""
    field = schema.model_fields.get(name) if _is_model(schema) else None
    return None if field is None else field.annotation


def _is_model(schema: Any) -> bool:
    return isinstance(schema, type) and issubclass(schema, BaseModel)


def _value_types(schema: Any) -> set[Any]:
    """Return the types that values may have: `Literal["a"] | None` → {str, NoneType}."""
    if get_origin(schema) is Annotated:
        return _value_types(get_args(schema)[0])
    if get_origin(schema) is Literal:
        return {type(value) for value in get_args(schema)}
    alternatives = get_args(schema) if NoneType in get_args(schema) else ()
    return {kind for alternative in alternatives for kind in _value_types(alternative)} or {schema}


class _RepeatedKeyError(Exception):
    """A key that is set twice in one mapping."""


def _as_written(node: yaml.Node, schema: Any) -> yaml.Node:
    """Return the node with scalars as plain text where the schema types them as text."""
    if isinstance(node, yaml.MappingNode):
        _check_repeated_keys(node)
        node.value = [(key, _as_written(value, _schema_under(key, schema))) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):  # a list of models occurs only under <<
        node.value = [_as_written(item, schema if _is_model(schema) else None) for item in node.value]
    elif node.tag == f"{_TAG}null" and (_is_model(schema) or get_origin(schema) is dict):
        # a section whose lines are all commented out
        return yaml.MappingNode(f"{_TAG}map", [], node.start_mark, node.end_mark)
    elif node.tag != f"{_TAG}null" and is_text(schema):
        return yaml.ScalarNode(f"{_TAG}str", node.value, node.start_mark, node.end_mark)
    return node


def _schema_under(key: yaml.Node, schema: Any) -> Any:
    """Return the type of a key's value; the value of `<<` has the type of the whole mapping."""
    return schema if key.tag == f"{_TAG}merge" else field_type(schema, key.value)


def _check_repeated_keys(node: yaml.MappingNode) -> None:
    """Raise _RepeatedKeyError if a mapping has a key twice."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            raise _RepeatedKeyError(f"{name} is set twice, on lines {lines[name]} and {line}; keep one")
        lines[name] = line
