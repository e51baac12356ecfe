"""A frozen dataclass as a command line: a field is a flag, the comment behind it is its help."""

import argparse
import dataclasses
import inspect
import io
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
CLOSED_PIPE = 128 + 13  # what a shell says of a program that SIGPIPE ended


def parse(kind: type[T], description: str, argv: Sequence[str] | None = None) -> T:
    """Read sys.argv into a dataclass; a field without a default must be given.

    str, int and float fields take a value, tuple[...] fields one or more, bool fields --flag and --no-flag;
    `X | None` fields are None unless given.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw, allow_abbrev=False)
    comments = _comments(kind)
    for name, annotation in typing.get_type_hints(kind).items():
        field = kind.__dataclass_fields__[name]
        required = field.default is dataclasses.MISSING
        options = {"help": comments.get(name, ""), **_converter(annotation)}
        options |= {"required": True} if required else {"default": field.default}
        if not required and field.default not in (None, "", ()):
            options["help"] += f" [{field.default}]"
        options["help"] = options["help"].replace("%", "%%")
        parser.add_argument("--" + name.replace("_", "-"), dest=name, **options)
    values = vars(parser.parse_args(argv)).items()
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values})


def run(main: Callable[[], int | None]) -> None:
    """Call a command. Bad input, or a loss that is not finite, ends it with one line, not a traceback.

    A letter that the console cannot show is written as its number, and a closed pipe (`| head`) is no error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit complains
        status = CLOSED_PIPE
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from error
    if status:
        raise SystemExit(status)


def _converter(annotation: type) -> dict:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return _converter(next(kind for kind in arguments if kind is not type(None)))
    if origin is typing.Literal:
        return {"choices": arguments}
    if origin is tuple:
        return {"type": arguments[0], "nargs": "+"}
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": annotation}


def _comments(kind: type) -> dict[str, str]:
    """{field: the comment at the end of its line}."""
    lines = re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", inspect.getsource(kind), flags=re.MULTILINE)
    return dict(lines)
