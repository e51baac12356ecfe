"""Reads the machine code of every kernel and tile, for chips that need not be here.

The real launch code runs on meta tensors of the real sizes, `dispatch.pretend` hands over what it would have
launched, Triton compiles that for the named chip, and the SASS is read: registers, spills, shared memory,
tensor core instructions, width of global loads. `python -m kernels.bench --lint` prints the whole table.
"""

import csv
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from itertools import chain, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import ARCHS, HAVE_TRITON, pretend, triton

if not HAVE_TRITON:
    raise SystemExit("error: Triton is not installed, and there is nothing to time, tune or lint without it")
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

adaln, attention, hopper, rope = (
    import_module(f"kernels.{name}") for name in ("adaln", "attention", "hopper", "rope")
)

SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes a block may have
SM_SHARED = {80: 167936, 89: 102400, 90: 233472, 100: 233472, 120: 102400}  # bytes a multiprocessor has
WARPS = {89: 48, 120: 48}  # that a multiprocessor holds, where not 64
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Row(NamedTuple):
    """One kernel as compiled for one chip. `blocks` of it fit on a multiprocessor at a time."""

    kernel: str
    case: str
    arch: int
    tile: str
    warps: int  # of a program, all groups together
    registers: int
    stack: int  # bytes of spilled registers, per thread
    shared: int  # bytes
    blocks: int
    tensor_core: int  # instructions
    hgmma: int
    setmaxnreg: int  # instructions that hand registers from one group of warps to another
    serialized: bool  # ptxas makes every HGMMA wait for the one before
    wide_loads: int  # of 16 bytes, or whole tiles by TMA
    narrow_loads: int  # of 1 or 2 bytes
    faults: str


class Launch(NamedTuple):
    kernel: Callable
    args: tuple
    meta: dict


def recorded(arch: int, call: Callable[[], object]) -> list[Launch]:
    """What call() would launch on arch."""
    launches = []
    with pretend(arch, lambda *launch: launches.append(Launch(*launch))):
        call()
    return launches


def source(launch: Launch) -> ASTSource:
    """The launch as Triton's own specialization sees it: types, alignment, and integers that equal 1."""
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.meta
    signature, constants, attributes = {}, {}, {}
    for i, p in enumerate(launch.kernel.params):
        if p.is_constexpr:
            signature[p.name], constants[(i,)] = "constexpr", values[p.name]
        elif p.do_not_specialize:
            signature[p.name] = "i32"
        else:
            signature[p.name] = _type(values[p.name], (i,), constants, attributes)
    kind = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    return kind(launch.kernel, signature, constants, attributes)


def _type(x, path: tuple[int, ...], constants: dict, attributes: dict):
    if isinstance(x, tuple):
        return tuple(_type(item, (*path, i), constants, attributes) for i, item in enumerate(x))
    if x is None or (isinstance(x, int) and x == 1):
        constants[path] = x
        return "constexpr"
    if hasattr(x, "block_shape"):  # a descriptor; Gluon's says how its tiles lie in shared memory
        layout = f",{x.layout!r}" if hasattr(x, "layout") else ""
        return f"tensordesc<{TYPES[x.base.dtype]}{list(x.block_shape)}{layout}>"
    if isinstance(x, float):
        return "fp32"
    if (x.data_ptr() if isinstance(x, Tensor) else x) % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return f"*{TYPES[x.dtype]}" if isinstance(x, Tensor) else ("i32" if abs(x) < 2**31 else "i64")


def sass(cubin: bytes) -> tuple[str, str]:
    """(resource usage, instructions) by the disassemblers inside the Triton wheel."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        commands = [TOOLS / "cuobjdump", "-res-usage", file], [TOOLS / "nvdisasm", "-c", file]
        usage, code = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    return usage, code


def serialized(ptx: str, arch: int) -> bool:
    """Whether ptxas says so; Triton keeps its remarks to itself."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", f"-arch=sm_{arch}a", file, "-o", Path(folder) / "kernel.cubin"]
        return "serialized" in subprocess.run(command, capture_output=True, text=True, check=True).stderr


def examine(case: str, arch: int, launch: Launch) -> Row:
    """Compiles one launch for arch and reads its machine code."""
    options = {key: value for key, value in launch.meta.items() if key in ("num_warps", "num_stages")}
    binary = triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=options)
    usage, code = sass(binary.asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    warps, shared = int(re.search(r"\.reqntid (\d+)", binary.asm["ptx"])[1]) // 32, binary.metadata.shared
    held = -(-registers // 8) * 8 * 32 * warps  # registers are handed out by eights
    fit = min(65536 // held, WARPS.get(arch, 64) // warps, SM_SHARED[arch] // (shared + 1024))
    tile = " ".join(f"{name}={value}" for name, value in (launch.meta).items())
    patterns = (
        r"\b(HGMMA|HMMA|UTC\w*MMA)",
        r"\bHGMMA",
        r"\bUSETMAXREG",
        r"\bUTMALDG|\bLDG(STS)?\.\S*128",
        r"\bLDG\.\S*U(8|16)\b",
    )
    module, function = launch.kernel.__module__.split(".")[-1], launch.kernel.__name__
    name = f"{module}.{function.strip('_').removesuffix('_kernel')}"
    cores, hgmma, setmaxnreg, *loads = (len(re.findall(pattern, code)) for pattern in patterns)
    products = cores, hgmma, setmaxnreg, hgmma > 0 and serialized(binary.asm["ptx"], arch)
    row = Row(name, case, arch, tile, warps, registers, stack, shared, fit, *products, *loads, faults="")
    return row._replace(faults=", ".join(faults(row)))


def faults(row: Row) -> Iterator[str]:
    """What would make a kernel wrong or slow on its chip.

    fp32 attention may spill: without tensor cores its tiles do not fit, and it is there for checking alone.
    Triton 3.6 keeps 8 bytes of stack for sm_120 wherever there is TMA; that is no spill.
    """
    products = row.kernel.startswith(("attention.", "hopper."))
    exact = products and "fp32" in row.case
    if row.stack > 8 and not exact:
        yield f"spills {row.stack} bytes"
    if row.shared > SHARED[row.arch]:
        yield f"{row.shared} bytes of shared memory, the chip has {SHARED[row.arch]}"
    if products and not exact and not (row.hgmma if row.arch == 90 else row.tensor_core):
        yield "no tensor core instruction"
    if row.serialized:
        yield "products wait for each other"
    if row.kernel.startswith("hopper.") and not row.setmaxnreg:
        yield "the loader keeps the consumers' registers"
    if not row.wide_loads or row.narrow_loads:
        yield "loads of less than 16 bytes"


# ---- what is looked at: every kernel at the sizes of CogVideoX-5B and Wan2.2-5B --------------------------


class Case(NamedTuple):
    name: str
    call: Callable[[], object]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def attention_cases(dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for dtype, (H, Lq, Lk, K) in product(dtypes, ((48, 19126, 19126, 64), (24, 27280, 512, 128))):
        q, k = (meta(1, L, H, K, dtype=dtype).transpose(1, 2) for L in (Lq, Lk))
        lse = meta(1, H, Lq, dtype=torch.float32)
        yield Case(f"K={K} {TYPES[dtype]}", partial(attention._portable_forward, q, k, k, 0.125))
        yield Case(f"K={K} {TYPES[dtype]}", partial(attention._backward, q, q, k, k, q, lse, 0.125))


def hopper_cases(dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    """Where Triton has what the file asks for, be it a version that is known to work or a newer one."""
    halves = [dtype for dtype in dtypes if dtype != torch.float32] if hopper.COMPLETE else []
    for dtype, (H, L, K) in product(halves, ((48, 19126, 64), (24, 27280, 128))):
        q = meta(1, L, H, K, dtype=dtype).transpose(1, 2)
        yield Case(f"K={K} {TYPES[dtype]}", partial(hopper.forward, q, q, q, 0.125))


def rope_cases() -> Iterator[Case]:
    for norm, H, L, R, K in (
        ("none", 48, 19126, 18900, 64),
        ("layer", 48, 19126, 18900, 64),
        ("rms", 24, 27280, 27280, 128),
    ):
        x = meta(1, L, H * K).unflatten(2, (H, K)).transpose(1, 2)
        table = meta(R, K // 2, dtype=torch.float32)
        weight = {"none": None, "layer": meta(K), "rms": meta(H * K)}[norm]
        bias = meta(K) if norm == "layer" else None
        yield Case(norm, partial(rope._forward, x, weight, bias, table, table, 1e-6, norm, 1.0))
        for learns in (True, False) if norm != "none" else ():
            name = norm if learns else f"{norm}, frozen"
            yield Case(name, partial(rope._backward, x, x, weight, table, table, 1e-6, norm, learns))


def adaln_cases() -> Iterator[Case]:
    L, D, segments = 19126, 3072, [226, 18900]
    x, weight, stats = meta(1, L, D), meta(D), meta(1, L, 2, dtype=torch.float32)
    gate, scale, shift, *_ = meta(1, 2, 6 * D).chunk(6, 2)
    yield Case("adaln", partial(adaln._forward, x, None, None, scale, shift, weight, weight, 1e-5, segments))
    yield Case("gate", partial(adaln._forward, x, x, gate, None, None, None, None, 0.0, segments))
    yield Case(
        "gate + adaln", partial(adaln._forward, x, x, gate, scale, shift, weight, weight, 1e-5, segments)
    )
    for learns, y in ((True, x), (False, None)):
        word = "" if learns else ", frozen"
        yield Case(
            "adaln" + word,
            partial(adaln._backward, None, x, x, None, None, scale, weight, stats, segments, learns),
        )
        yield Case(
            "gate" + word,
            partial(adaln._backward, x, None, None, y, gate, None, None, stats, segments, False),
        )
        yield Case(
            "gate + adaln" + word,
            partial(adaln._backward, x, x, x, y, gate, scale, weight, stats, segments, learns),
        )


def table(sample: bool = False) -> Iterator[Row]:
    """Every kernel on every chip; or bf16 alone, sm_90 whole and of the others attention."""
    dtypes = (torch.bfloat16,) if sample else (torch.bfloat16, torch.float16, torch.float32)
    for arch in (90, *(a for a in ARCHS if a != 90)):
        cases = [attention_cases(dtypes)]
        if arch == 90:
            cases.append(hopper_cases(dtypes))
        if arch == 90 or not sample:
            cases += [rope_cases(), adaln_cases()]
        for case in chain(*cases):
            for launch in recorded(arch, case.call):
                yield examine(case.name, arch, launch)


def report(file: Path | None) -> int:
    """Prints the whole table and writes it to a file, or prints the sample; counts the rows with faults."""
    done = []
    for row in table(sample=file is None):
        print(*(f"{name}={value}" for name, value in row._asdict().items() if value != ""), flush=True)
        done.append(row)
    faults = sum(row.faults != "" for row in done)
    print(f"{len(done)} kernels compiled by Triton {triton.__version__}, {faults} with faults")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="") as out:
            csv.writer(out).writerows(
                [[*Row._fields, "triton"], *([*row, triton.__version__] for row in done)]
            )
    return faults
