"""The order of the house, so that it stays: who imports whom, how long a way is, what the docs say."""

import ast
import importlib
import inspect
import io
import re
import runpy
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest

import train
from helpers import ROOT

# What a room may import lies above it in this list, or beside it in the same line.
FLOORS = (("kernels",), ("sdv", "sdv.models", "sdv.data"), ("sdv.run",), ("weights",), ("train", "sample"),
          ("microworld", "benchmarks"))  # fmt: skip
APART = {("sdv.models", "sdv.data"), ("sdv.data", "sdv.models")}  # beside each other, and strangers
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def modules() -> dict[str, Path]:
    """{name: file} of all code that is not a test."""
    files = [ROOT / "train.py", ROOT / "sample.py"]
    for room in ("sdv", "kernels", "weights", "microworld", "benchmarks"):
        files += (ROOT / room).rglob("*.py")
    names = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


@cache
def imports() -> dict[str, set[str]]:
    """{module: modules of this project that it imports when it is loaded}."""
    known, found = modules(), {}
    for name, file in known.items():
        found[name] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                wanted = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
            else:
                continue
            for one in wanted:
                while one and one not in known:
                    one = one.rpartition(".")[0]
                if one and one != name:
                    found[name].add(one)
            # `from sdv.data import media` names the package too, whose __init__ is empty
        found[name] -= {one for one in found[name] if any(o.startswith(one + ".") for o in found[name])}
    return found


def room(module: str) -> str:
    """The longest name of a room that holds it."""
    rooms = [one for floor in FLOORS for one in floor if f"{module}.".startswith(one + ".")]
    return max(rooms, key=len)


def test_imports_run_downward():
    floor = {one: number for number, rooms in enumerate(FLOORS) for one in rooms}
    for module, others in imports().items():
        for other in others if not module.endswith("__main__") else ():  # a command may know everything
            here, there = room(module), room(other)
            assert floor[there] <= floor[here], f"{module} imports {other}, which lies above it"
            assert (here, there) not in APART, f"{module} imports {other}"


def test_there_are_no_circles():
    graph, done = imports(), set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in graph[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_packages_are_those_of_the_card():
    oracles = r"^\s*(?:import|from) (diffusers|transformers|peft|accelerate|PIL|cv2|einops|torchvision)\b"
    for name, file in modules().items():
        if room(name) not in ("microworld", "benchmarks"):
            assert not re.findall(oracles, file.read_text(), re.MULTILINE), name


def test_no_file_outgrows_a_room():
    lengths = {
        name: len(file.read_text().splitlines()) for name, file in modules().items() if name != "train"
    }
    assert {name: n for name, n in lengths.items() if n > 450} == {}


def test_the_algorithm_comes_first():
    lines = Path(train.__file__).read_text().splitlines()
    begins = next(number for number, line in enumerate(lines, 1) if "THE METHOD" in line)
    source, start = inspect.getsourcelines(train.train_step)
    assert begins <= 75 and start + len(source) - 1 <= 150
    assert len(inspect.getsourcelines(train.main)[0]) <= 120


STUDIES = ("claims", "demo", "gradients", "placement", "pretrain", "strip", "world")


@pytest.mark.parametrize("script", ["train", "sample", *(f"microworld.{name}" for name in STUDIES)])
def test_every_setting_is_explained(script):
    for kind in importlib.import_module(script).Config.__mro__[:-1]:
        source = inspect.getsource(kind)
        for name in kind.__dict__.get("__annotations__", {}):
            assert re.search(rf"^    {name}: [^#\n]*# \S", source, re.MULTILINE), f"{name} has no comment"


# Commands

FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line of code on the pages, continued lines put together."""
    found = []
    for page in PAGES:
        for block in FENCE.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                found.append((page.name, line.split("   #")[0].strip()))
    return found


def entry(command: str) -> str:
    """`-m weights.adapter convert` or `train.py` of a command that runs this project, else nothing."""
    found = re.match(r"(?:\S*python3? |torchrun .*?)(-m \w+(?:\.\w+)*|\w+\.py)(.*)", command)
    if not found or found[1] in ("-m venv", "-m pip", "-m pytest"):
        return ""
    sub = re.match(r" ((?:[a-z]\w+ )*[a-z]\w+)(?= |$)", found[2]) if found[1].startswith("-m") else None
    tree = {"-m sdv.data": 2, "-m weights.adapter": 1, "-m benchmarks.evaluate": 1}.get(found[1], 0)
    words = sub[1].split()[:tree] if sub else []
    return " ".join([found[1], *(words[:1] if words[:1] != ["import"] else words)])


def help_of(command: str) -> str:
    """What it says in this process, run as `python` runs it: a new one would import torch again."""
    module, *words = command.removeprefix("-m ").split()
    if module.startswith("kernels."):
        pytest.importorskip("triton", exc_type=ImportError)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [module, *words, "--help"])
        runpy.run_module(module.removesuffix(".py"), run_name="__main__", alter_sys=True)
    assert not end.value.code, f"{command} --help: {end.value}"
    return said.getvalue()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package")
@pytest.mark.parametrize("command", sorted({entry(line) for _, line in commands()} - {""}))
def test_every_command_of_the_pages_exists_with_its_flags(command):
    text = help_of(command)
    for page, line in commands():
        if entry(line) == command:
            own = line.partition(command.split()[-1])[2]  # torchrun has flags of its own
            for flag in re.findall(r"(?<=\s)--[a-z][\w-]*", own):
                known = flag in text or "--no-" + flag[2:] in text
                assert known, f"{page}: {command} has no {flag}"


def test_every_make_target_of_the_pages_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z][\w-]*)", page.read_text(), re.MULTILINE):
            assert target in targets, f"{page.name}: make {target}"


def test_the_reading_list_counts_right():
    """Lines `[file](file) ... N lines` of the README, where a range of lines may follow the file's name."""
    listed = re.findall(
        r"^\|[^|\n]*\]\(([\w/.-]+\.py)\)[^|\n]*\| ([\d,]+) lines", (ROOT / "README.md").read_text(), re.M
    )
    assert listed
    for file, count in listed:
        assert len((ROOT / file).read_text().splitlines()) == int(count.replace(",", "")), file
