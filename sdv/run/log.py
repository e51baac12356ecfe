"""What a run reports while it trains: losses, also by quarter of the noise range, memory, rows of numbers."""

import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from sdv.data.files import unwritable
from sdv.objectives import TASKS, Losses
from sdv.run.parallel import gather, ranks


def summary(each: Tensor, t: Tensor, train_steps: int) -> dict:
    """Mean of the losses (n,) at times t (n,): of all, and of each quarter of the noise range, None if empty.

    The mean over all of the range hides where it is learned.
    """
    which = (t * 4 / train_steps).long().clamp(max=3)
    quarters = [each[which == q].mean().item() if (which == q).any() else None for q in range(4)]
    return {"loss": each.mean().item(), "quarters": quarters}


def loss_row(losses: Sequence[Losses], train_steps: int) -> dict:
    """Mean loss, all and by quarter, over the samples of all ranks."""
    each, t = (gather(torch.cat(list(column))) for column in zip(*(x[1:] for x in losses), strict=True))
    return summary(each, t, train_steps)


def mean_text(values: list[float | None]) -> str:
    values = [value for value in values if value is not None]
    return f"{sum(values) / len(values):.4f}" if values else "-"


def by_quarter(rows: list[dict]) -> str:
    return " ".join(mean_text([row["quarters"][q] for row in rows]) for q in range(4))


def log_line(rows: list[dict], steps: int) -> str:
    """The newest row; means of the last 100, of each task and this one by quarter; the steps' time left."""
    now, recent = rows[-1], rows[-100:]
    losses = {task: [r["loss"] for r in recent if r["task"] == task] for task in TASKS}
    own = [row for row in recent if row["task"] == now["task"]]
    means = " ".join(f"{task} {mean_text(values)}" for task, values in losses.items())
    left = (steps - 1 - now["step"]) * sum(row["seconds"] for row in recent) / len(recent)
    cost = f"grad {now['grad_norm']:.3f} | {now['memory_gb']:.1f} GB | {now['seconds']:.2f} s"
    return (
        f"step {now['step'] + 1:>5}/{steps} {now['task']:<8} loss {now['loss']:.4f} | mean {means} "
        f"| by t {by_quarter(own)} | {cost}, {tqdm.format_interval(left)} left"
    )


def peak_memory(device: str) -> float:
    """GB: of the GPU's allocator, or of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class RunLog:
    """Rows of numbers into JSONL files of a folder and, if asked, into TensorBoard. Rank 0 alone writes.

    first: the step from which the run goes on. held: what makes the folder this run's.
    """

    def __init__(self, folder: Path, tensorboard: bool, first: int = 0, held: BinaryIO | None = None):
        self.folder, self.writes, self.board, self.held = folder, ranks()[0] == 0, None, held
        if tensorboard and self.writes:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("--tensorboard: pip install -e '.[tensorboard]' first") from error
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

    def write(self, name: str, row: dict) -> None:
        """Append a row with a "step" to NAME.jsonl."""
        if not self.writes:
            return
        path = self.folder / f"{name}.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise unwritable(path, error) from error
        if self.board is not None:
            place = "/".join([name, *([row["task"]] if "task" in row else [])])
            parts = {f"quarter {i + 1}": value for i, value in enumerate(row.get("quarters", ()))}
            parts |= {field: value[0] for field, value in row.get("whole", {}).get("all", {}).items()}
            for field, value in (row | parts).items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{place}/{field}", value, row["step"])


def read_log(path: Path) -> list[dict]:
    """The rows of a JSONL file that `write` has made; a last line that is not whole yet is left out."""
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise TypeError("step is no number")
            rows.append(row)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: damaged ({error!r}); delete this line") from error
    return rows
