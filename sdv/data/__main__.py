"""Look at a folder of pairs or clips, or make one of a public data set.

python -m sdv.data check DIR    decodes every file once and says what is wrong with which row; with --backbone
                                FOLDER, takes its sizes and says which captions its text encoder cuts; with
                                --sheet PAGE.html, shows crops, frames and captions on a page
python -m sdv.data import ...   makes such a folder of a public data set, see sdv.data.importers
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import weights
from sdv.data import importers, media
from sdv.data.captions import say_cut
from sdv.data.pixels import say_crop, say_enlarged
from sdv.data.rows import CLIP, CLS, ENDINGS, PAIR, Row, read_lines, say_left_out, say_same_file, scan_rows
from sdv.data.sheet import write_sheet
from sdv.data.sizes import MODELS, count_tokens, require_least
from sdv.run.settings import Parser, run

MEANINGS = {
    "height": "pixels",
    "width": "pixels",
    "frames": "of a clip",
    "fps": "frames a second that clips are read at",
    "text": "tokens of a prompt",
    "spatial_ratio": "pixels of a latent's side",
    "temporal_ratio": "frames of a latent, after the first",
    "patch": "latents of a token's side",
}
LEAST = {"fps": 0.01, "text": 0, "spatial_ratio": 1, "temporal_ratio": 1, "patch": 1, "workers": 1}


def check(args: argparse.Namespace) -> int:
    """Decode every file once; print a verdict a row and the tokens of a sample. 1 if a row is bad, else 0."""
    model, tokens_of = MODELS[args.model], None
    if args.backbone:
        layout = weights.open_backbone(args.backbone)
        tokens_of = weights.token_counter(layout)
        model = {name: getattr(layout, name) for name in model if name != "text"} | {"text": tokens_of[1]}
    for name, value in model.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, least in LEAST.items():
        require_least(name, getattr(args, name), least)
    lengths = {"identity": 1, "motion": args.frames}
    plan = {task: count_tokens(args.height, args.width, n, args.text, args) for task, n in lengths.items()}
    fields = _kind(Path(args.folder))
    if tokens_of and fields == PAIR:
        length, limit = tokens_of
        tokens_of = (lambda prompt: length(CLS + prompt)), limit
    rows, problems = scan_rows(args.folder, fields)
    for problem in problems:
        print(f"BAD  {problem}")
    bad = len(problems)
    with ThreadPoolExecutor(args.workers) as pool:  # decoding leaves Python's lock
        for good, verdict in pool.map(partial(_verdict, args=args), rows):
            print(f"{'ok ' if good else 'BAD'}  {verdict}")
            bad += not good
    if fields == CLIP and (said := say_left_out(Path(args.folder), rows)):
        print(f"{said} (clips end with {' '.join(sorted(ENDINGS))})")
    if tokens_of:
        said = say_cut(((row.origin, row.prompt) for row in rows), *tokens_of)
        print(said or f"no caption is cut: all have {tokens_of[1]} tokens or less")
    if args.sheet:
        size = args.height, args.width
        write_sheet(Path(args.sheet), rows, problems, size, args.frames, args.fps, tokens_of)
        print(f"contact sheet: {args.sheet}")
    total = len(rows) + len(problems)
    print(f"{total} {'pairs' if fields == PAIR else 'clips'}: {total - bad} ok, {bad} bad")
    for task, tokens in plan.items():
        size = f"{lengths[task]} x {args.height} x {args.width}"
        parts = f"text {tokens.text:,} + ref {tokens.ref:,} + video {tokens.video:,}"
        print(f"{task} sample, {size}: {tokens.total:,} tokens = {parts}")
    return int(bad > 0)


def _kind(folder: Path) -> tuple[str, ...]:
    """PAIR if a readable row names a reference, else CLIP."""
    metadata = folder / "metadata.jsonl"
    named = metadata.is_file() and any(b'"reference_file_name"' in line for line in read_lines(metadata))
    return PAIR if named else CLIP


def _verdict(row: Row, args: argparse.Namespace) -> tuple[bool, str]:
    try:
        found = _pair_verdict(row, args) if len(row.files) == 2 else _clip_verdict(row, args)
    except (ValueError, OSError) as error:
        return False, f"{row.origin}: {error}"
    return True, f"{row.origin}: {'; '.join(filter(None, found))}"


def _pair_verdict(row: Row, args: argparse.Namespace) -> list[str]:
    shapes = [media.read_image(path).shape[1:] for path in row.files]
    sizes = ", ".join(f"{path.name} {w}x{h}" for path, (h, w) in zip(row.files, shapes, strict=True))
    said = (say(*shape, args.height, args.width) for shape in shapes for say in (say_crop, say_enlarged))
    return [sizes, *said, say_same_file(row)]


def _clip_verdict(row: Row, args: argparse.Namespace) -> list[str]:
    clip = media.inspect_clip(row.files[0])
    media.check_length(row.files[0], clip.seconds, args.frames, args.fps)
    rate = "steady" if clip.steady else "variable rate"
    found = f"{clip.width}x{clip.height}, {clip.frames} frames in {clip.seconds:.2f} s, {rate}"
    odd = media.say_repeats(row.files[0], args.frames, args.fps), media.say_interlaced(row.files[0])
    size = clip.height, clip.width, args.height, args.width
    return [found, say_crop(*size), say_enlarged(*size), *odd]


def main(argv: list[str] | None = None) -> int:
    """What the command returns: its exit status."""
    parser = Parser(prog="python -m sdv.data", description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("check", help="decode every file of a folder once, with a verdict a row")
    one.add_argument("folder")
    one.add_argument(
        "--model", choices=MODELS, default="CogVideoX-5b", help="whose sizes to take, if no --backbone"
    )
    for name, meaning in MEANINGS.items():
        kind = float if name == "fps" else int
        said = meaning + "; that of --backbone, else of --model, if not given"
        one.add_argument("--" + name.replace("_", "-"), type=kind, help=said)
    one.add_argument(
        "--backbone", default="", help="checkpoint folder: its sizes, and which captions it cuts"
    )
    one.add_argument("--sheet", default="", help="also write a page that shows what the trainer will see")
    one.add_argument("--workers", type=int, default=os.cpu_count(), help="files decoded at once")
    one.set_defaults(run=check)
    importers.add_commands(commands.add_parser("import", help="make a folder of pairs or clips"))
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    run(main)
