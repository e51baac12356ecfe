"""Where a run comes from: versions, commit, machine, command and all its settings."""

import dataclasses
import datetime
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from sdv.run.parallel import ranks

PACKAGES = ("torch", "triton", "safetensors", "sentencepiece", "numpy", "av")


def provenance(cfg: object) -> dict:
    """What stands in a run's config.json, a part of the run each; cfg is its dataclass of settings."""
    device = "CPU"
    if cfg.device.startswith("cuda") and torch.cuda.is_available():
        device = torch.cuda.get_device_name(cfg.device)
    return {
        "started": datetime.datetime.now().isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "device": f"{device}, {platform.machine()} {platform.system()}",
        "processes": ranks()[1],
        "settings": dataclasses.asdict(cfg),
    }


def commit() -> str | None:
    """Of the checkout that this file lies in, with a + if tracked files differ from it; None without one."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.returncode else "")


def version(name: str) -> str | None:
    """Of a package; None if it is not installed."""
    if name == "torch":
        return torch.__version__  # with its build: PyPI's metadata says 2.13.0 of what is 2.13.0+cu130
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
