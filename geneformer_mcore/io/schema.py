"""Files as types: bounded bytes, their text or JSON, every entry of it checked.

    path     ->  read_bytes: bounded, unzipped if it is gzip  ->  read_text, without its mark
                                                              ->  parse_json: plain content
    content  ->  as_type: a dataclass whose entries are all there, of their types and ranges

A plain checker and no library: those that were tried do not name the key of a mapping, skip entries
that a dataclass does not have, and take NaN and whole numbers of any length.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import reprlib
import sys
import types
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from geneformer_mcore.errors import DataError, GeneformerError

MOST_BYTES = 1 << 28
"""Of a file, unzipped."""

T = TypeVar("T")
Check = Callable[[Any], Any]

# Files


def read_bytes(path: str | Path, error: type[GeneformerError] = DataError) -> bytes:
    """The content of a file, unzipped if it is gzip. `error` if it cannot be read or is too big."""
    try:
        with Path(path).open("rb") as file:
            return unzipped(file.read(MOST_BYTES + 1), path, error)
    except OSError as problem:
        raise _unreadable(path, problem, error) from problem


def unzipped(raw: bytes, path: str | Path, error: type[GeneformerError] = DataError) -> bytes:
    """`raw`, or what it holds if it is gzip. `error` if that cannot be read or is too big."""
    if raw[:2] == b"\x1f\x8b":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
                raw = file.read(MOST_BYTES + 1)
        except (OSError, EOFError, zlib.error) as problem:
            raise _unreadable(path, problem, error) from problem
    if len(raw) > MOST_BYTES:
        raise error(
            f"{path}: holds more than {MOST_BYTES:,} bytes, and no file of its kind does. Remedy: "
            "give the right file."
        )
    return raw


def _unreadable(
    path: str | Path, problem: Exception, error: type[GeneformerError]
) -> GeneformerError:
    why = getattr(problem, "strerror", None) or problem
    return error(
        f"{path}: cannot be read: {why}. Remedy: check the path, and that the file is whole."
    )


def read_text(path: str | Path, error: type[GeneformerError] = DataError) -> str:
    """The text of a file (see text_of). `error` if there is none."""
    try:
        return text_of(read_bytes(path, error))
    except UnicodeDecodeError as problem:
        raise error(f"{path}: is no text in UTF-8: {problem}. Remedy: save it as such.") from None


def text_of(raw: bytes) -> str:
    """UTF-8, or UTF-16 with its byte order mark, without the mark. UnicodeDecodeError if neither"""
    return raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def parse_json(raw: bytes | str) -> Any:
    """Plain content; ValueError for anything but JSON, or an object that has a key twice."""
    try:
        text = text_of(raw) if isinstance(raw, bytes) else raw
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has {reprlib.repr(twice)} twice")
    return content


def read_json(path: str | Path, remedy: str, error: type[GeneformerError] = DataError) -> Any:
    """The content of a JSON file. `error`, with the remedy, if it cannot be read or is none."""
    try:
        return parse_json(read_bytes(path, error))
    except ValueError as problem:
        raise error(f"{path}: not valid JSON: {problem}. Remedy: {remedy}.") from None


# Types of entries


@dataclass(frozen=True)
class Between:
    """A range of numbers, both ends included; NaN is in none."""

    low: float = -sys.float_info.max
    high: float = sys.float_info.max

    def __call__(self, found: Any) -> str | None:
        """What it must be, if it is not."""
        if self.low <= found <= self.high:
            return None
        if self == Between():
            return "finite"
        top = "or more" if self.high == sys.float_info.max else f"to {self.high:,}"
        return f"{self.low:,} {top}"


@dataclass(frozen=True)
class Matching:
    """Text that a pattern matches as a whole; what: in words."""

    pattern: str
    what: str

    def __call__(self, found: Any) -> str | None:
        return None if re.fullmatch(self.pattern, found) else self.what


Count = Annotated[int, Between(0)]
Positive = Annotated[int, Between(1)]
Share = Annotated[float, Between(0, 1)]
Finite = Annotated[float, Between()]
Digest = Annotated[str, Matching("[0-9a-f]{64}", "a SHA-256 of 64 digits")]

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class _WrongEntryError(ValueError):
    """An entry that is not as its type says; place: where it is, from the inside out."""

    place = ""


def as_type(
    content: Any,
    kind: type[T],
    path: str | Path,
    remedy: str,
    error: type[GeneformerError] = DataError,
) -> T:
    """`content`, plain JSON, as `kind`: a dataclass, whose entries are as they are annotated, or
    list, tuple, dict, `X | None`, Annotated by Between or Matching, Any.

    Raises `error` that names the file, the first wrong entry and the remedy.
    """
    try:
        checked: T = _check_of(kind)(content)  # type: ignore[arg-type]
        return checked
    except _WrongEntryError as wrong:
        place = wrong.place.removeprefix(".") or "the content"
        raise error(f"{path}: {place} {wrong}. Remedy: {remedy}.") from None
    except GeneformerError as problem:  # of the dataclass itself
        raise error(f"{path}: {problem}") from None


@cache
def _check_of(kind: Any) -> Check:
    origin, of = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda found: found
    if origin is Annotated:
        return partial(_within, _check_of(of[0]), of[1:])
    if origin in (Union, types.UnionType):
        (some,) = (each for each in of if each is not type(None))
        check = _check_of(some)
        return lambda found: None if found is None else check(found)
    if is_dataclass(kind):
        return _record_check(kind)
    if origin in (dict, Mapping):
        return partial(_mapping, _check_of(of[1]))
    if origin is tuple and of[-1] is not Ellipsis:
        return partial(_row, [*map(_check_of, of)])
    if origin in (list, tuple):
        return partial(_sequence, origin, _check_of(of[0]))
    assert kind in _NAMES, kind
    return partial(_plain, kind)


def _must_be(what: str, found: Any) -> _WrongEntryError:
    return _WrongEntryError(f"must be {what}, and is {reprlib.repr(found)}")


def _plain(kind: type, found: Any) -> Any:
    is_it = type(found) is kind or (kind is float and type(found) is int)
    if not is_it or (type(found) is int and not -(1 << 63) <= found < 1 << 64):
        raise _must_be(f"{_NAMES[kind]}{' of 64 bits' * (type(found) is kind is int)}", found)
    if kind is str and not found.isascii():
        try:
            found.encode()
        except UnicodeEncodeError:
            raise _must_be("text that UTF-8 can hold", found) from None
    return float(found) if kind is float else found


def _within(check: Check, rules: Iterable[Callable[[Any], str | None]], found: Any) -> Any:
    value = check(found)
    for rule in rules:
        what = rule(value)
        if what:
            raise _must_be(what, found)
    return value


def _entries(found: Iterable[tuple[Any, Check, Any]], place: str) -> list[Any]:
    """The values of (key, check, value), each checked; place: of a key, a format."""
    checked = []
    for key, check, value in found:
        try:
            checked.append(check(value))
        except _WrongEntryError as wrong:
            wrong.place = place.format(key) + wrong.place
            raise
    return checked


def _mapping(check: Check, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise _must_be("an object", found)
    values = _entries(((key, check, value) for key, value in found.items()), "[{!r:.80}]")
    _entries(((key, partial(_plain, str), key) for key in found), "[{!r:.80}], its name,")
    return dict(zip(found, values, strict=True))


def _sequence(kind: type, check: Check, found: Any) -> Any:
    if not isinstance(found, list | tuple):
        raise _must_be("a list", found)
    return kind(_entries(((i, check, value) for i, value in enumerate(found)), "[{}]"))


def _row(checks: list[Check], found: Any) -> tuple:
    if not isinstance(found, list | tuple) or len(found) != len(checks):
        raise _must_be(f"a list of {len(checks)}", found)
    numbered = zip(range(len(checks)), checks, found, strict=True)
    return tuple(_entries(numbered, "[{}]"))


def _record_check(kind: Any) -> Check:
    types_of = get_type_hints(kind, include_extras=True)
    known = [field for field in fields(kind) if field.init]
    checks = {field.name: _check_of(types_of[field.name]) for field in known}
    needed = {f.name for f in known if f.default is f.default_factory is MISSING}

    def check(found: Any) -> Any:
        if not isinstance(found, dict):
            raise _must_be("an object", found)
        for names, what in (
            (needed - found.keys(), "missing"),
            (found.keys() - checks.keys(), "not known to this version: a later one may know it"),
        ):
            if names:
                shown = ", ".join(sorted(map(str, names)))
                raise _WrongEntryError(f"has entries that are {what}: {shown[:200]}")
        named = ((name, checks[name], value) for name, value in found.items())
        return kind(**dict(zip(found, _entries(named, ".{}"), strict=True)))

    return check
