"""Films of given subjects, judged as the paper does, beside what those numbers are worth.

    python -m benchmarks.evaluate FILMS --clip clip-vit-base-patch32 --dino dino-vits16 \
        --subjects SUBJECTS --base FILMS_OF_THE_BASE

FILMS is a folder of sample.py with its films.jsonl; --manifest judges the films that it asks for. CLIP and
DINO are local folders as transformers reads them (pip install -e '.[evaluate]'); without them only movement
is judged. Results go to FILMS/evaluation: scores.jsonl, a line a film, from which a stopped run goes on, and
table.md and table.csv.

Rows beside the films: films of the base without a reference (--base); each reference as a still film, what
mere copying scores; each reference against other pictures of its subject, the ceiling, and against other
subjects of its noun, the floor (--subjects, a folder of pictures for each); the paper's.

VBench's smoothness and dynamic degree need its networks, whose code is not here. --vbench FILE.py names a
file of yours with one or both of these functions of two frames (1, 3, H, W) of RGB on the CPU:
    interpolate(before, after)    AMT-S: of frames in 0..1, sides in sixteens, the one half-way (1, 3, H, W)
    flow(before, after)           RAFT, 20 rounds: of frames in 0..255, sides in eights, pixels (1, 2, H, W)
"""

import argparse
import inspect
import json
import runpy
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from benchmarks.evaluation import films as reels
from benchmarks.evaluation import table
from benchmarks.evaluation.judges import ClipJudge, DinoJudge, weight_files
from benchmarks.evaluation.scores import MEASURES, Between, Judges, film_scores
from benchmarks.evaluation.subjects import Subject, owners, read_subjects
from benchmarks.evaluation.yardsticks import Sample, pictures, still_films, subject_of
from microworld import movement
from sdv.data.files import Hashes, digest, make_folder, path_from, write_text
from sdv.run.films import Shot
from sdv.run.settings import DEVICE, Parser, check_device, run

CODE = [Path(inspect.getfile(of)) for of in (film_scores, ClipJudge, movement.speed)]  # of the measures
PAPERS = ["CLIP ViT-B/32", "DINO ViT-S/16"]


def arguments() -> argparse.Namespace:
    parser = Parser(prog="benchmarks.evaluate", description=__doc__)
    parser.add_argument("films", type=Path, help="folder of films")
    for name, text in (
        ("manifest", "JSONL of the films to judge; FILMS/films.jsonl if not given"),
        ("clip", "folder of CLIP; the paper's is ViT-B/32"),
        ("dino", "folder of DINO or DINOv2; the paper's is DINO ViT-S/16"),
        ("vbench", "Python file with VBench's networks; if you change their weights, use a new --out"),
        ("base", "folder of films of the same prompts, made by the base without a reference"),
        ("subjects", "folder with a folder of pictures for each subject, the references among them"),
        ("nouns", "lines FOLDER,NOUN of the subjects"),
        ("out", "folder of the results; FILMS/evaluation if not given"),
    ):
        parser.add_argument(f"--{name}", type=Path, help=text)
    parser.add_argument("--frames", type=int, default=16, help="of a film, for CLIP and DINO (default 16)")
    parser.add_argument("--device", default=DEVICE, help=f"where CLIP and DINO run (default {DEVICE})")
    return parser.parse_args()


def vbench(file: Path | None) -> dict[str, Between]:
    """The functions "flow" and "interpolate" of a Python file, as far as it has them."""
    if file is None:
        return {}
    if not file.is_file():
        raise FileNotFoundError(f"--vbench {file}: no such file; write flow and interpolate there")
    found = runpy.run_path(str(file))
    found = {name: found[name] for name in ("flow", "interpolate") if name in found}
    if not found:
        raise ValueError(f"--vbench {file}: has neither a function flow nor interpolate")
    return found


def with_refs(films: Sequence[Shot], folder: Path) -> list[Shot]:
    """The films, if each has a reference that exists."""
    for film in films:
        if film.ref is None:
            raise ValueError(
                f"{folder}: {film.file} has no reference_file_name; films without one are --base"
            )
        if not film.ref.is_file():
            raise FileNotFoundError(f"{film.ref}: no such file; it is the reference of {film.file}")
    return list(films)


def base_films(films: Iterable[Shot], base: Sequence[Shot], folder: Path) -> list[Shot]:
    """For each film, the base's of its prompt, of its seed if there is one, beside the film's reference."""
    of_prompt = {film.prompt: film for film in base}
    of_seed = {(film.prompt, film.seed): film for film in base}
    found = {}
    for film in films:
        plain = of_seed.get((film.prompt, film.seed)) or of_prompt.get(film.prompt)
        if plain is None:
            raise ValueError(f"--base {folder}: has no film of {film.prompt!r}; film the same prompts")
        found[plain.file, film.ref] = plain._replace(ref=film.ref)
    return list(found.values())


class Scores:
    """scores.jsonl: the measures of every film so far, each under a name made of all that they depend on."""

    def __init__(self, out: Path, networks: dict[str, list[Path | None]], frames: int, films: Sequence[Shot]):
        make_folder(out)
        self.file, self.hashes = out / "scores.jsonl", Hashes(out / "hashes.json")
        files = {name: [file for file in found if file] for name, found in networks.items()}
        shown = ((film.file, film.ref) for film in films)
        self.hashes.learn({*chain(*files.values()), *chain.from_iterable(shown)})
        self.about = [{name: [self.hashes(file) for file in found] for name, found in files.items()}, frames]
        lines = self.file.read_text(encoding="utf-8").split("\n") if self.file.is_file() else []
        self.known = {row["key"]: row["scores"] for line in lines if (row := _whole(line))}

    def key(self, film: Shot) -> str:
        return digest(self.about, self.hashes(film.file), self.hashes(film.ref), film.prompt)

    def fresh(self, films: Sequence[Shot]) -> list[Shot]:
        """Those that are not judged yet."""
        return [film for film in films if self.key(film) not in self.known]

    def add(self, film: Shot, scores: dict[str, float]) -> None:
        """Append a line; a half-written one that a stop left behind is ended first."""
        torn = self.file.is_file() and not self.file.read_bytes().endswith(b"\n")
        names = (path_from(self.file.parent, path) for path in (film.file, film.ref))
        about = dict(zip(("file_name", "reference_file_name"), names, strict=True))
        row = about | {"prompt": film.prompt, "seed": film.seed, "scores": scores, "key": self.key(film)}
        with open(self.file, "a", encoding="utf-8") as file:
            file.write("\n" * torn + json.dumps(row, ensure_ascii=False) + "\n")
        self.known[row["key"]] = scores


def _whole(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:  # half a line, where a run was stopped: its film is judged again
        return None
    return row if "key" in row and "scores" in row else None


def judge(
    films: Sequence[Shot], known: dict[Path, Subject], scores: Scores, judges: Judges, name: str
) -> list[Sample]:
    """Every film's measures: remembered, or taken now and written down one by one."""
    fresh = scores.fresh(films)
    bar = tqdm(fresh, name, total=len(films), initial=len(films) - len(fresh), unit="film", disable=not films)
    for film in bar:
        frames, fps = reels.read_frames(film.file)
        size = frames.shape[-2:]
        shown, given = reels.canvas(film.ref, *size), reels.as_given(film.ref, *size)
        scores.add(film, film_scores(frames, fps, film.prompt, shown, given, judges))
    found = [scores.known[scores.key(film)] for film in films]
    return [Sample(subject_of(f.ref, known), f.seed, row) for f, row in zip(films, found, strict=True)]


def notes(judges: Judges, films: Sequence[Shot], measured: Iterable[str]) -> list[str]:
    """What must be known to read the numbers."""
    lines = [
        "in %: mean ± deviation over seeds [95 % bootstrap interval over subjects]",
        "speed is in % of the short side a second",
        "smoothness, dynamic, speed, duplicates, paste are this project's (microworld/movement.py)",
    ]
    there = [judge for judge in (judges.clip, judges.dino) if judge is not None]
    if there:
        names = " and ".join(f"{judge.name} ({judge.folder.name})" for judge in there)
        lines.append(f"{names} on {judges.frames} frames, references on a white canvas")
    if strange := [judge.name for judge in there if judge.name not in PAPERS]:
        lines.append(f"not comparable with the paper's {' and '.join(PAPERS)}: {', '.join(strange)}")
    if judges.clip is not None and (cut := judges.clip.cut({film.prompt for film in films})):
        lines.append(f"{cut} prompts are longer than CLIP reads: CLIP-T is of their beginning")
    if lacking := [measure for measure in MEASURES if measure not in measured]:
        lines.append(f"{', '.join(lacking)}: not run, their networks are not given")
    return lines


def made_of(folder: Path) -> list[Path]:
    """What the scores of a network depend on: its weights, settings and vocabulary."""
    return [*weight_files(folder), *sorted(folder.glob("*.json")), *sorted(folder.glob("*.txt"))]


def main() -> None:
    args = arguments()
    check_device(args.device, kernels=False)

    # 1. What is wrong with the input is found before anything is loaded or judged.
    films = with_refs(reels.read_films(args.films, args.manifest), args.films)
    base = base_films(films, reels.read_films(args.base), args.base) if args.base else []
    known = owners(read_subjects(args.subjects, args.nouns)) if args.subjects else {}
    judges = Judges(
        args.clip and ClipJudge(args.clip, args.device),
        args.dino and DinoJudge(args.dino, args.device),
        **vbench(args.vbench),
        frames=args.frames,
    )
    networks = {"vbench": [args.vbench], "code": CODE} | {
        name: made_of(folder) if folder else [] for name, folder in (("clip", args.clip), ("dino", args.dino))
    }
    scores = Scores(args.out or args.films / "evaluation", networks, args.frames, [*films, *base])
    reels.check(scores.fresh([*films, *base]), args.frames)

    # 2. Pictures, which are quick, then the films.
    same, kind = pictures(films, known, judges) if known and (args.clip or args.dino) else ([], [])
    judged = judge(films, known, scores, judges, "films")
    rows, more = [table.summarise("films", judged)], []
    for name, needs, samples in (
        (table.BASE, "--base", judge(base, known, scores, judges, "base")),
        (table.STILL, "films", still_films(films, known, judges)),
        (table.CEILING, "--subjects, two pictures of one, and --clip or --dino", same),
        (table.FLOOR, "--subjects, two of one noun, and --clip or --dino", kind),
    ):
        rows += [table.summarise(name, samples)] if samples else []
        more += [] if samples else [f"{name}: not run, it needs {needs}"]
    if same and kind:
        more += [table.position(judged, kind, same, measure) for measure in rows[-1].cells]

    # 3. The table.
    text = table.markdown([*rows, *table.paper_rows()], notes(judges, films, rows[0].cells) + more)
    for name, content in (("table.md", text), ("table.csv", table.as_csv(rows))):
        write_text(scores.file.with_name(name), content)
    print(text)


if __name__ == "__main__":
    run(main)
