"""The CSV file of a benchmark: a row for each figure, with the machine and the day."""

import csv
import datetime
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path


def write_csv(file: Path, columns: Sequence[str], rows: Iterable[Sequence], about: str, **more: str) -> None:
    """Write rows as they come. To each are added the machine, with `about`, then `more`, then the date."""
    ends = [f"{platform.machine()}, {about}", *more.values(), datetime.date.today()]
    with open(file, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow([*columns, "machine", *more, "date"])
        for row in rows:
            writer.writerow([*row, *ends])
            out.flush()
