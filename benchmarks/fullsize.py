"""Full-size steps of CogVideoX-5B and Wan2.2-TI2V-5B, random weights, beside diffusers + peft, on one GPU.

    python -m benchmarks.fullsize                     # all parts, into benchmarks/<GPU>/fullsize.{jsonl,md}
    python -m benchmarks.fullsize --parts denoise --models wan --seconds 60
    python -m benchmarks.fullsize --dry               # no GPU: all of it, small, in seconds

steps: a micro-batch of training from a cache, forward and backward, LoRA of rank 128, every block recomputed:
a clip (motion) or eight pairs (identity), beside what train.py --plan says. storage: the same with the base
in 8 bits, or on the CPU. denoise: a step of sampling with guidance, so two videos. vae: a clip, both ways.

No file is read but diffusers' code, if it is installed. Each measurement is guarded: what fails, or would end
after --seconds, says so in its row, and the next begins. Rows are added; the table is made of all of them.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

import weights
from benchmarks.book import Book, folder_of
from benchmarks.models import FULL, Stock, made_as, open_model, random_transformer, share, stock_vae
from kernels import dispatch
from sdv.models.positions import place_reference
from sdv.objectives import Pair, denoising_loss, draws_of
from sdv.run import plan
from sdv.run.base_storage import hold
from sdv.run.cost import Settings, Task
from sdv.run.settings import Parser, run

PARTS = ("steps", "denoise", "vae", "storage")
IN_TORCH = "sdv, kernels in torch"
DTYPE = torch.bfloat16


@dataclass(eq=False)
class Model:
    name: str
    layout: weights.Layout
    configs: dict[str, dict]  # of its parts, in diffusers' words
    step: Settings
    peers: bool  # diffusers + peft are measured too

    def inputs(self, task: Task, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (B, C, T, H, W), a reference, a text."""
        lengths = 1 if task == "identity" else self.step.frames, 1
        sides = self.step.height, self.step.width
        sizes = [self.layout.latent_shape(frames, *sides) for frames in lengths]
        with torch.device("meta"):
            text_dim = self.layout.parts["dit"].build().cfg.text_dim
        sizes.append((self.layout.text_tokens, text_dim))
        return tuple(torch.randn(batch, *size).to(self.step.device, DTYPE) for size in sizes)

    @cached_property
    def pace(self) -> plan.Speed | None:
        return plan.speed(self.step, self.layout)

    @cache  # noqa: B019  there are two models
    def plan(self, step: Settings, task: Task) -> plan.Prediction:
        return plan.predict(step, self.layout, task, 1)


@contextmanager
def kernels_by(mode: str) -> Iterator[None]:
    """SDV_KERNELS in this process."""
    before, dispatch.MODE = dispatch.MODE, mode
    try:
        yield
    finally:
        dispatch.MODE = before


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---- training ----------------------------------------------------------------------------------------------


def trained(dit: nn.Module, model: Model, step: Settings, task: Task, book: Book) -> dict:
    """A micro-batch where gradients and AdamW's moments are there already."""
    params = [p for p in dit.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    video, ref, text = model.inputs(task, getattr(step, f"{task}_batch"))

    def work() -> None:
        draws = draws_of((0,), [(0, k) for k in range(len(video))])
        loss = denoising_loss(dit, model.layout.schedule, Pair(video, ref, text), draws).value
        loss.backward()
        if not loss.isfinite():
            raise FloatingPointError("the loss is not finite")

    return book.clock(work, dit)[0]


def sdv_trains(model: Model, step: Settings, task: Task, mode: str, book: Book) -> dict:
    """Ours, made anew, and what --plan says of it."""
    dit = random_transformer(model.layout, DTYPE, step.device, step.rank, step.alpha)
    if step.base_storage == "cpu":
        dit.to("cpu")
    hold(dit, step.base_storage, step.device)
    dit.recompute, dit.keep_attention = step.recompute, step.keep_attention
    with kernels_by(mode):
        found, said = trained(dit, model, step, task, book), model.plan(step, task)
    seconds = {"seconds": round(model.pace.seconds(said.flops), 3)} if model.pace else {}
    return found | {"plan": seconds | {"gigabytes": round(said.peak / 1e9, 2)}}


def peft_trains(model: Model, task: Task, dtype: torch.dtype, book: Book) -> dict:
    """diffusers + peft, each block recomputed; a LoRA in fp32 needs autocast."""
    step = model.step
    dit = Stock(model.name, model.configs["transformer"], DTYPE, step.device, autocast=dtype == torch.float32)
    dit.adapt(step.rank, step.alpha, dtype)
    return trained(dit, model, step, task, book)


def steps(model: Model, book: Book) -> None:
    """All of the peers' first: in a process where ours had run before, an H100 took 19 to 20 % longer."""
    step, kept = model.step, replace(model.step, keep_attention=True)
    most = replace(kept, recompute=0.6)  # of 80 GB
    ours = {"sdv": (step, "auto"), "sdv --keep-attention": (kept, "auto"), IN_TORCH: (step, "reference")}
    ours["sdv --keep-attention --recompute 0.6"] = most, "auto"
    flops = {task: model.plan(step, task).flops.total() for task in ("motion", "identity")}
    for task, n in flops.items() if model.peers else ():
        for dtype in (torch.bfloat16, torch.float32):
            who = f"diffusers + peft, LoRA {str(dtype).removeprefix('torch.')}"
            book.row("steps", f"{model.name} {task}", who, n, partial(peft_trains, model, task, dtype, book))
    for task, n in flops.items():
        for who, (then, mode) in ours.items():
            work = partial(sdv_trains, model, then, task, mode, book)
            book.row("steps", f"{model.name} {task}", who, n, work)


def storage(model: Model, book: Book) -> None:
    for way in ("fp8", "cpu"):
        step, flops = replace(model.step, base_storage=way), model.plan(model.step, "identity").flops.total()
        work = partial(sdv_trains, model, step, "identity", "auto", book)
        book.row("storage", f"{model.name} identity", f"sdv --base-storage {way}", flops, work)


# ---- sampling ----------------------------------------------------------------------------------------------


@torch.no_grad()
def denoise(model: Model, book: Book) -> None:
    """Peers first, as in `steps`. All but the last have the same weights; `differs` is from the first."""
    step, (video, ref, text) = model.step, model.inputs("motion", 2)
    t, first = torch.full((2,), 500.0, device=step.device), {}
    flops = sum(n for (stage, _), n in model.plan(step, "motion").flops.items() if stage == "forward")

    def once(net_of: Callable[[], nn.Module], picture: Tensor | None, mode: str, same: bool) -> dict:
        net = net_of().eval()
        with kernels_by(mode):
            found, out = book.clock(lambda: net(video, t, text, picture), net)
        if not out.isfinite().all():
            raise FloatingPointError("the prediction is not finite")
        truth = first.setdefault(picture is None, out)
        return found | ({"differs": relative_error(out, truth)} if same and truth is not out else {})

    def both(who: str, net_of: Callable[[], nn.Module], mode: str = "auto", same: bool = True) -> None:
        for what, picture in (("with a reference", ref), ("text only", None)):
            book.row(
                "denoise", f"{model.name}, {what}", who, 2 * flops, partial(once, net_of, picture, mode, same)
            )

    def ours(rank: int = 0) -> nn.Module:
        dit = random_transformer(model.layout, DTYPE, step.device, rank, step.alpha)
        place_reference(dit, "leading")  # where diffusers can have it
        return dit

    def theirs() -> nn.Module:
        net = Stock(model.name, model.configs["transformer"], DTYPE, step.device)
        share(dit(), net.net, model.layout.parts["dit"].names)
        return net

    def compiled(net_of: Callable[[], nn.Module]) -> nn.Module:
        for block in next(part for part in net_of().modules() if isinstance(part, nn.ModuleList)):
            block.compile(backend="inductor" if step.device == "cuda" else "eager")
        return net_of()

    dit, stock = cache(ours), cache(theirs)
    if model.peers:
        both("diffusers", stock)
        both("diffusers, compiled", cache(partial(compiled, stock)))
        stock.cache_clear()
    both("sdv", dit)
    both(IN_TORCH, dit, "reference")
    both("sdv --compile", cache(partial(compiled, dit)))
    dit.cache_clear()
    both("sdv, LoRA not merged", cache(partial(ours, step.rank)), same=False)


@torch.no_grad()
def vae(model: Model, book: Book) -> None:
    """A clip in [-1, 1] and latents as the transformer sees them. Memory is beside the weights."""
    step = model.step
    with made_as(DTYPE, step.device):
        own = model.layout.parts["vae"].build().eval()
    latents, *_ = model.inputs("motion", 1)
    clip = (torch.rand(1, 3, step.frames, step.height, step.width) * 2 - 1).to(step.device, DTYPE)
    first = {}

    @cache
    def theirs() -> nn.Module:
        net = stock_vae(model.configs["vae"], DTYPE, step.device)
        share(own, net, model.layout.parts["vae"].names)
        return net

    def once(what: str, work: Callable[[], Tensor]) -> dict:
        found, out = book.clock(work, beside=True)
        truth = first.setdefault(what, out)
        return found | ({"differs": relative_error(out, truth)} if truth is not out else {})

    sides = {
        "diffusers": {  # first, as in `steps`
            "decode": lambda: theirs().decode(latents, return_dict=False)[0],
            "encode": lambda: own.scaled(theirs().encode(clip, return_dict=False)[0].mode()),
        },
        "sdv": {"decode": lambda: own.decode(own.scaled(latents)), "encode": lambda: own.encode(clip)},
    }
    for who, ways in sides.items() if model.peers else [("sdv", sides["sdv"])]:
        for what, work in ways.items():
            book.row("vae", f"{model.name} {what}", who, 0, partial(once, what, work))


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", choices=FULL, default=list(FULL))
    parser.add_argument("--seconds", type=float, default=600, help="nothing is started that would end later")
    parser.add_argument("--out", type=Path, help="folder of the results [benchmarks/<GPU>]")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument(
        "--warm", action="store_true", help="two layers, compiled; nothing is timed or written"
    )
    parser.add_argument("--dry", action="store_true", help="small, on the CPU")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        raise ValueError("no CUDA device, nothing to time: try --dry")
    device = "cpu" if args.dry else "cuda"
    repeats = 0 if args.warm else 1 if args.dry else 2
    book = Book((args.out or folder_of(device)) / "fullsize.jsonl", args.seconds, device, repeats)
    peers = not args.no_peers and importlib.util.find_spec("diffusers") is not None
    torch.manual_seed(0)
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            layout, configs = open_model(name, Path(folder), args.dry, 2 if args.warm else None)
        step = Settings(layout.frames, layout.height, layout.width, device)
        if args.dry:
            step = replace(step, frames=9, height=32, width=64, rank=4, identity_batch=2)
        model = Model(name, layout, configs, step, peers)
        for part in (steps, denoise, vae, storage):
            if part.__name__ in args.parts:
                try:
                    part(model, book)
                except Exception as error:  # before its first row
                    book.write({"part": part.__name__, "what": name, "who": "", "not run": repr(error)[:200]})


if __name__ == "__main__":
    run(main)
