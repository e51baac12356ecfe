"""A frozen dataclass as a command line: a field is a flag, the comment behind it is its help.

The range of a number is part of its type, and a dataclass that inherits from others groups its flags by them:

    class Method:            # its docstring is the title of the group
        p_video: Share = 0.2  # probability of a motion step
"""

import argparse
import dataclasses
import inspect
import io
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NamedTuple, NoReturn, TypeVar

import torch

from kernels.dispatch import require_chip

T = TypeVar("T")
CLOSED_PIPE = 128 + 13  # what a shell says of a program that SIGPIPE ended


class Range(NamedTuple):
    """Which numbers a setting may be; neither NaN nor infinity is one of them."""

    least: float
    most: float = math.inf
    open: bool = False  # the least is left out

    def __contains__(self, value: float) -> bool:
        above = self.least < value if self.open else self.least <= value
        return above and value <= self.most and math.isfinite(value)

    def __str__(self) -> str:
        if self.most < math.inf:
            return f"a number {'above' if self.open else 'from'} {self.least:g} to {self.most:g}"
        return f"a number above {self.least:g}" if self.open else f"{self.least:g} or more"


Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, open=True)]
NotNegative = Annotated[float, Range(0)]
Count = Annotated[int, Range(1)]
CountOrNone = Annotated[int, Range(0)]  # 0: none
Seed = Annotated[int, Range(0, 2**63 - 1)]
Guidance = Annotated[float, Range(1)]  # on the text; 1: none
Rate = Annotated[float, Range(0.01, 1000)]  # frames per second

OUT_OF_MEMORY = """sample.py needs less with --tiling, with --merge, and for fewer or smaller frames;
train.py --plan says what each of its settings saves."""
# How torch says, by a RuntimeError wherever the main process happens to be, that a worker was killed.
KILLED = "DataLoader worker (pid"
FEWER_WORKERS = """
A process that decodes was ended: give fewer --workers, or more memory (also in /dev/shm)."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "bfloat16" if torch.cuda.is_available() else "float32"


def parse(
    kind: type[T],
    description: str,
    argv: Sequence[str] | None = None,
    renamed: Mapping[str, str] | None = None,
) -> T:
    """Read sys.argv into a dataclass; a field without a default must be given.

    str, int and float fields take a value, tuple[...] fields one or more, bool fields --flag and --no-flag;
    `X | None` fields are None unless given. renamed: {old name: new name}, still read, with a line that says
    so. ValueError for a number out of its Range.
    """
    parser = Parser(description=description)
    for owner in reversed(kind.__mro__[:-1]):
        comments, hints = _comments(owner), typing.get_type_hints(owner)
        own = [name for name in owner.__dict__.get("__annotations__", {}) if name in hints]
        group = parser.add_argument_group(inspect.cleandoc(owner.__doc__ or "")) if own else parser
        for name in own:
            field = kind.__dataclass_fields__[name]
            required = field.default is dataclasses.MISSING
            options = {"help": comments.get(name, ""), **_converter(hints[name])}
            options |= {"required": True} if required else {"default": field.default}
            if not required and field.default not in (None, "", ()):
                options["help"] += f" [{field.default}]"
            options["help"] = options["help"].replace("%", "%%")
            group.add_argument(_flag(name), dest=name, **options)
    flags = {_flag(old): _flag(new) for old, new in (renamed or {}).items()}
    values = vars(parser.parse_args(_with_new_names(sys.argv[1:] if argv is None else argv, flags)))
    cfg = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    _check_ranges(cfg)
    return cfg


class Parser(argparse.ArgumentParser):
    """Of every command outside kernels/: a description keeps its lines, a flag has no shorter form."""

    def __init__(self, **options: object):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the names of all flags before it."""
        self.exit(2, f"error: {message}; --help lists all settings\n")


def _with_new_names(words: Sequence[str], renamed: Mapping[str, str]) -> list[str]:
    """The command line with its old flags replaced: --old, --old=value, --no-old."""
    out = []
    for word in words:
        flag, equals, value = word.partition("=")
        no = "--no-" if flag.startswith("--no-") else "--"
        new = renamed.get("--" + flag.removeprefix(no)) if flag.startswith(no) else None
        if new:
            new = no + new.removeprefix("--")
            print(f"{flag} is called {new} now; the old name goes with the next version", file=sys.stderr)
        out.append((new or flag) + equals + value)
    return out


def _check_ranges(cfg: object) -> None:
    for name, hint in typing.get_type_hints(type(cfg), include_extras=True).items():
        value = getattr(cfg, name)
        for allowed in _ranges(hint):
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and number not in allowed:
                    raise ValueError(f"{_flag(name)} {number}: give {allowed}")


def _ranges(hint: object) -> list[Range]:
    """Those in an annotation, at any depth: of X | None, tuple[X, ...] and X itself."""
    own = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)]
    inner = [hint.__origin__] if own else typing.get_args(hint)
    return own + [found for one in inner for found in _ranges(one)]


def check_device(name: str, kernels: bool = True) -> None:
    """ValueError for a device that torch does not know, that this machine has not, or that has no kernels."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: torch knows no such device; use cpu, cuda or cuda:N") from error
    gpus = torch.cuda.device_count()
    count = {"cpu": 1, "cuda": gpus}.get(device.type, 0)
    if (device.index or 0) >= count:
        raise ValueError(
            f"--device {name}: is not here; this machine has cpu" + f" and cuda x {gpus}" * (gpus > 0)
        )
    if kernels:
        require_chip(device)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def run(main: Callable[[], int | None]) -> None:
    """Call a command. Bad input, or a loss that is not finite, ends it with one line, not a traceback.

    A letter that the console cannot show is written as its number, a closed pipe (`| head`) is no error, and
    a line is in a log file as soon as it is said.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit complains
        status = CLOSED_PIPE
    except KeyboardInterrupt:
        sys.excepthook = lambda *_: print("stopped", file=sys.stderr)
        raise  # Python then dies of the signal, by which a shell knows that its loop ends, too
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"error: {str(error).splitlines()[0]}\n{OUT_OF_MEMORY}") from error
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        killed = KILLED in str(error)
        if isinstance(error, RuntimeError) and not killed:
            raise
        raise SystemExit(f"error: {error}" + killed * FEWER_WORKERS) from error
    if status:
        raise SystemExit(status)


def _converter(annotation: type) -> dict:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return _converter(next(kind for kind in arguments if kind is not type(None)))
    if origin is typing.Literal:
        return {"choices": arguments}
    if origin is tuple:
        return _converter(arguments[0]) | {"nargs": "+"}
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": annotation}


def _comments(kind: type) -> dict[str, str]:
    """{field: the comment at the end of its line}."""
    lines = re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", inspect.getsource(kind), flags=re.MULTILINE)
    return dict(lines)
