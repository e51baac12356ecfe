"""Which films to make of which subjects: the manifest that sample.py and benchmarks.evaluate take.

    python -m benchmarks.manifest SUBJECTS PROMPTS m.jsonl --seeds 0 1 2

SUBJECTS has a folder of photos for each subject, as DreamBooth's data set does (evaluation/subjects.py says
whence the nouns come). PROMPTS has a prompt a line with {noun} where the subject stands: "a {noun} runs along
a beach". Manifests of one folder can be joined, for subjects that need prompts of their own.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.evaluation.subjects import Subject, read_subjects
from sdv.data.files import path_from
from sdv.run.settings import Parser, run

PLACE = "{noun}"


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file, one a line; ValueError names a line without a place for the noun."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; write a prompt a line, with {PLACE} for the subject")
    prompts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip() and PLACE not in line:
            raise ValueError(f"{file}:{number}: has no {PLACE}; write it where the subject is named")
        prompts += [line.strip()] if line.strip() else []
    if not prompts:
        raise ValueError(f"{file}: is empty; write a prompt a line, with {PLACE} for the subject")
    return prompts


def fill(prompt: str, noun: str) -> str:
    """The prompt with the noun in it, "a" before it as the noun wants it."""
    if noun[0].lower() in "aeiou":
        prompt = re.sub(rf"\b([Aa]) (?={PLACE})", r"\1n ", prompt)
    return prompt.replace(PLACE, noun)


def rows(
    subjects: Sequence[Subject], prompts: Sequence[str], seeds: Sequence[int], references: int, start: Path
) -> Iterator[dict]:
    """Every subject with its first pictures, every prompt, every seed; paths relative to `start`."""
    for subject in subjects:
        for picture in subject.pictures[:references]:
            name = path_from(start, picture)
            for prompt in prompts:
                text = fill(prompt, subject.noun)
                for seed in seeds:
                    yield {"prompt": text, "reference_file_name": name, "seed": seed, "subject": subject.name}


def main() -> None:
    parser = Parser(prog="benchmarks.manifest", description=__doc__)
    parser.add_argument("subjects", type=Path, help="folder with a folder of pictures for each subject")
    parser.add_argument("prompts", type=Path, help=f"text file, a prompt a line with {PLACE}")
    parser.add_argument("out", type=Path, help="JSONL file to write")
    parser.add_argument("--nouns", type=Path, help="lines FOLDER,NOUN; else the subjects' own file or names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one film of each (default 0)")
    parser.add_argument("--references", type=int, default=1, help="pictures of a subject to film (default 1)")
    args = parser.parse_args()
    subjects = read_subjects(args.subjects, args.nouns)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = list(rows(subjects, read_prompts(args.prompts), args.seeds, args.references, args.out.parent))
    args.out.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8"
    )
    print(f"{args.out}: {len(found)} films of {len(subjects)} subjects")


if __name__ == "__main__":
    run(main)
