"""The fields of a config that are read: the type of each, its range, and the library's value if it is absent.

A table has a row for every field. A row with a name of ours fills that name of a config class, one without is
only compared. Whatever a table does not name is not read. Ranges are wide: a value that is possible and does
not fit the weights is told by their shapes; one that nothing could be built with ends here.
"""

from typing import NamedTuple

SHOWN = 60  # letters of a wrong value that an error repeats


class Whole(NamedTuple):
    """An integer, which may be written 2.0."""

    low: int
    high: int
    step: int = 1

    def read(self, value: object) -> int:
        if not _is_number(value) or not self.low <= value <= self.high or value % self.step:
            raise ValueError(f"a whole number from {self.low} to {self.high}{self._steps()}")
        return int(value)

    def _steps(self) -> str:
        return f", a multiple of {self.step}" if self.step > 1 else ""


class Real(NamedTuple):
    low: float
    high: float

    def read(self, value: object) -> float:
        if not _is_number(value) or not self.low <= value <= self.high:
            raise ValueError(f"a number from {self.low:g} to {self.high:g}")
        return value


class Flag(NamedTuple):
    def read(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value


class Many(NamedTuple):
    """A list; so many, or any number up to `most`."""

    of: Whole | Real | Flag
    least: int
    most: int

    def read(self, value: object) -> tuple:
        size = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        if not isinstance(value, list | tuple) or not self.least <= len(value) <= self.most:
            raise ValueError(f"a list of {size}")
        try:
            return tuple(self.of.read(item) for item in value)
        except ValueError as error:
            raise ValueError(f"a list of {size}, each {error}") from error


class Maybe(NamedTuple):
    """Null, or what it is of."""

    of: Whole | Real | Many

    def read(self, value: object) -> object:
        return None if value is None else self.of.read(value)


class Choice(NamedTuple):
    """A word, and what it means to us."""

    meaning: dict[str, str]

    def read(self, value: object) -> str:
        if not isinstance(value, str) or value not in self.meaning:
            raise ValueError(f"one of {', '.join(self.meaning)}")
        return self.meaning[value]


class Fixed(NamedTuple):
    """The one value that is supported."""

    wanted: object
    reason: str

    def read(self, value: object) -> object:
        if value != self.wanted:
            raise ValueError(self.reason or repr(self.wanted))
        return value


class Row(NamedTuple):
    kind: Whole | Real | Flag | Many | Maybe | Choice | Fixed
    default: object  # the library's, where a config does not have the field
    ours: str = ""


Fields = dict[str, Row]

# What several tables say of their fields.
LAYERS = Whole(1, 128)
HEADS = Whole(1, 1024)
WIDTH = Whole(1, 2**17)
EPS = Real(1e-12, 0.1)
STEPS = Whole(100, 10_000)  # of the noise process
SHIFT = Real(1e-3, 1e3)
TOKENS = Whole(1, 8192)  # of a prompt


def fixed(wanted: object, reason: str = "", default: object = ...) -> Row:
    """A field with one supported value, the library's unless said; reason: what another one means."""
    return Row(Fixed(wanted, reason), wanted if default is ... else default)


def read_fields(json: dict, fields: Fields) -> dict[str, object]:
    """{our name: value} of a config. ValueError names the field, what it has, and what was expected."""
    found = {}
    for field, row in fields.items():
        value = json.get(field, row.default)
        try:
            value = row.kind.read(value)
        except ValueError as error:
            shown = repr(value)
            shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
            says = "" if isinstance(row.kind, Fixed) and row.kind.reason else "supported: "
            raise ValueError(f"{field} = {shown}; {says}{error}") from error
        if row.ours:
            found[row.ours] = value
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
