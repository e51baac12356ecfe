"""Look at a folder of pairs or clips, or make one of a public data set.

python -m sdv.data check DIR    decodes every file once and says what is wrong with which row
python -m sdv.data import ...   makes such a folder of a public data set, see sdv.data.importers
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from sdv.data import importers, media
from sdv.data.rows import CLIP, PAIR, Row, scan_rows
from sdv.data.sizes import MODELS, count_tokens


def check(args: argparse.Namespace) -> int:
    """Decode every file once; print a verdict a row and the tokens of a sample. 1 if a row is bad, else 0."""
    for name, value in MODELS[args.model].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    grid = args.text, args.spatial_ratio, args.temporal_ratio, args.patch
    lengths = {"identity": 1, "motion": args.frames}
    plan = {task: count_tokens(args.height, args.width, n, *grid) for task, n in lengths.items()}
    fields = _kind(Path(args.folder))
    rows, problems = scan_rows(args.folder, fields)
    for problem in problems:
        print(f"BAD  {problem}")
    bad = len(problems)
    with ThreadPoolExecutor(args.workers) as pool:  # decoding leaves Python's lock
        for good, verdict in pool.map(partial(_verdict, args=args), rows):
            print(f"{'ok ' if good else 'BAD'}  {verdict}", flush=True)
            bad += not good
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
    return PAIR if metadata.is_file() and b'"reference_file_name"' in metadata.read_bytes() else CLIP


def _verdict(row: Row, args: argparse.Namespace) -> tuple[bool, str]:
    try:
        found = _pair_verdict(row) if len(row.files) == 2 else _clip_verdict(row, args)
    except (ValueError, OSError) as error:
        return False, f"{row.origin}: {error}"
    return True, f"{row.origin}: {found}"


def _pair_verdict(row: Row) -> str:
    shapes = (media.read_image(path).shape for path in row.files)
    return ", ".join(f"{path.name} {w}x{h}" for path, (_, h, w) in zip(row.files, shapes, strict=True))


def _clip_verdict(row: Row, args: argparse.Namespace) -> str:
    clip = media.inspect_clip(row.files[0])
    media.check_length(row.files[0], clip.seconds, args.frames, args.fps)
    rate = "steady" if clip.steady else "variable rate"
    return f"{clip.width}x{clip.height}, {clip.frames} frames in {clip.seconds:.2f} s, {rate}"


def main(argv: list[str] | None = None) -> int:
    """Exit status: what the command returns, or 1 after one line about bad input."""
    parser = argparse.ArgumentParser(prog="python -m sdv.data", description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("check", help="decode every file of a folder once, with a verdict a row")
    one.add_argument("folder")
    one.add_argument("--model", choices=MODELS, default="CogVideoX-5b", help="whose sizes to take")
    for name in MODELS[one.get_default("model")]:
        one.add_argument("--" + name.replace("_", "-"), type=float if name == "fps" else int, help="instead")
    one.add_argument("--workers", type=int, default=os.cpu_count(), help="files decoded at once")
    one.set_defaults(run=check)
    importers.add_commands(commands.add_parser("import", help="make a folder of pairs or clips"))
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
