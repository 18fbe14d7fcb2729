"""Converts the text of a config field, as the shell gives it, to a value of the field's type."""

import ast
import math
from typing import Any

from klbox_jax.config.family import ConfigError
from klbox_jax.config.field_types import ELEMENT_TYPES, LENGTHS, STEPS_OR_SHARES

_TRUE, _FALSE = ("true", "t", "yes", "y", "1", "on"), ("false", "f", "no", "n", "0", "off")
_WHOLE, _NUMBER = "a whole number", "a number"


class _UnfitError(ValueError):
    """A text does not fit; the message says what is allowed."""


def parse_value(name: str, text: str, current: Any) -> Any:
    """Returns the value of a field.

    Args:
        name: dotted name of the field.
        text: as written in the shell. A tuple is `3,4`, `cat,dog`, `(3, 4)` or one value; `()` or nothing is empty.
        current: value of the field so far, which determines the type.

    Raises:
        ConfigError: the text does not fit; the message names the field, the text and what is allowed.
    """
    try:
        if isinstance(current, tuple):
            return _parse_tuple(name, text, current)
        if name in STEPS_OR_SHARES:
            return _steps_or_share(text)
        return _parse_scalar(text, current)
    except _UnfitError as error:
        raise ConfigError(
            f"--config.{name}={text}: {name} is {error}; its value so far is {current!r}"
        ) from None


def _parse_scalar(text: str, current: Any) -> Any:
    if current is None:
        return _literal(text)
    if isinstance(current, bool):
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
        raise _UnfitError("true or false")
    if isinstance(current, int):
        return _whole(text)
    if isinstance(current, float):
        return _number(text)
    if isinstance(current, str):
        return text
    raise _UnfitError(
        f"of the type {type(current).__name__}, which the command line cannot set; set it in a config file"
    )


def _whole(text: Any) -> int:
    try:
        return int(str(text))
    except ValueError:
        raise _UnfitError(_WHOLE) from None


def _number(text: Any) -> float:
    try:
        value = float(str(text))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _UnfitError(_NUMBER)
    return value


def _steps_or_share(text: Any) -> int | float:
    """Returns a whole number of steps as an int, or a share of the training as a float."""
    allowed = "a number of steps (such as 500), or a share of the training between 0.0 and 1.0 (such as 0.05)"
    try:
        return int(str(text))
    except ValueError:
        pass
    try:
        value = float(str(text))
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise _UnfitError(allowed)
    return value


def _parse_tuple(name: str, text: str, current: tuple) -> tuple:
    kind = _kind(name, current)
    is_plain = kind is str and not text.strip().startswith(("(", "[", '"', "'"))
    value = _split_texts(text) if is_plain else _literal(text)
    if isinstance(value, list | set):
        value = tuple(value)
    if not isinstance(value, tuple):
        value = () if value == "" else (value,)
    elements = _elements(name, value, current)
    length = LENGTHS.get(name)
    if length is not None and len(elements) != length:
        raise _UnfitError(f"a tuple of {length} numbers, separated by commas")
    return elements


def _elements(name: str, value: tuple, current: tuple) -> tuple:
    """Returns the elements of a tuple, each with the type of the elements so far."""
    if name in STEPS_OR_SHARES:
        return tuple(map(_steps_or_share, value))
    like = current[0] if current else None
    if isinstance(like, tuple):
        if value and not any(isinstance(inner, tuple | list) for inner in value):
            value = (value,)  # one row, such as one canvas
        if not all(isinstance(inner, tuple | list) for inner in value):
            raise _UnfitError(f"a tuple of tuples, such as {current!r}")
        is_pair = all(len(inner) == 2 for inner in current) and name.endswith("canvases")
        if is_pair and not all(len(inner) == 2 for inner in value):
            raise _UnfitError("a tuple of pairs (height, width), such as (320,448),(448,320)")
        return tuple(_elements(f"{name}[]", tuple(inner), like) for inner in value)
    kind = _kind(name, current)
    parse = {int: _whole, float: _number, str: str}.get(kind)
    what = {int: "whole numbers", float: "numbers", str: "texts"}.get(kind)
    if kind is None:
        return value
    try:
        if kind is not str and any(isinstance(inner, bool | tuple | list) for inner in value):
            raise _UnfitError(what)
        return tuple(parse(inner) for inner in value)
    except _UnfitError:
        raise _UnfitError(f"a tuple of {what}, separated by commas") from None


def _kind(name: str, current: tuple) -> type | None:
    """Returns the type of the elements of a tuple, None if it is not known."""
    return ELEMENT_TYPES.get(name) or (type(current[0]) if current else None)


def _split_texts(text: str) -> tuple[str, ...]:
    return tuple(part for part in map(str.strip, text.split(",")) if part)


def _literal(text: str) -> Any:
    """Returns a Python literal, or for any other text the text, a tuple of texts if it has commas."""
    text = text.strip()
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    inner = text
    for opening, closing in ("()", "[]"):
        if text.startswith(opening) and text.endswith(closing):
            inner = text[1:-1]
    if "," not in inner and inner == text:
        return _unquoted(text)
    return tuple(map(_unquoted, _split_texts(inner)))


def _unquoted(text: str) -> str:
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if is_quoted else text
