"""What the numbers of films are to be held against: pictures of the same subject, of others, and a mere copy.

Each yardstick is a list of samples like those of films, so that one table summarises all of them.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from benchmarks.evaluation.films import FEWEST, Film, as_given, canvas
from benchmarks.evaluation.scores import Judges, film_scores, mean_cosine
from benchmarks.evaluation.subjects import Subject
from sdv.data.media import inspect_clip


class Sample(NamedTuple):
    """The measures of one film, or of a pair of pictures."""

    subject: str  # whatever tells subjects apart: the bootstrap draws these
    seed: int | None
    scores: dict[str, float]


def still_films(films: Sequence[Film], judges: Judges) -> list[Sample]:
    """Each reference as a film that shows nothing else, under each of its prompts: what copying scores."""
    once = {(film.ref, film.prompt): film for film in films}.values()
    judges, samples = judges._replace(frames=FEWEST), []
    for film in once:
        height, width = inspect_clip(film.path)[:2]
        shown = canvas(film.ref, height, width)
        frames = shown[:, None].expand(-1, FEWEST, -1, -1)
        scores = film_scores(frames, 8, film.prompt, shown, as_given(film.ref, height, width), judges)
        samples.append(Sample(str(film.ref), None, scores))
    return samples


def pictures(films: Sequence[Film], subjects: Sequence[Subject], judges: Judges) -> tuple[list, list]:
    """CLIP-I and DINO-I of references against others of their subject, and other subjects of their noun."""
    size = inspect_clip(films[0].path)[:2]
    owners = {picture.resolve(): subject for subject in subjects for picture in subject.pictures}
    refs = list(dict.fromkeys(film.ref.resolve() for film in films))
    strangers = [ref for ref in refs if ref not in owners]
    if strangers:
        raise ValueError(
            f"--subjects: {strangers[0]} is none of its pictures; give the folder of the references"
        )
    known: dict[Path, dict[str, Tensor]] = {}

    def compared(ref: Path, others: Sequence[Path]) -> list[Sample]:
        for picture in [ref, *others]:
            if picture not in known:
                known[picture] = _vectors(canvas(picture, *size)[None], judges)
        return [
            Sample(
                str(ref), None, {name: mean_cosine(a, known[other][name]) for name, a in known[ref].items()}
            )
            for other in others
        ]

    same, kind = [], []
    for ref in refs:
        own = owners[ref]
        of_kind = [subject for subject in subjects if subject.noun == own.noun and subject is not own]
        same += compared(ref, [picture.resolve() for picture in own.pictures if picture.resolve() != ref])
        kind += compared(ref, [p.resolve() for p in chain.from_iterable(s.pictures for s in of_kind)])
    return same, kind


def _vectors(shown: Tensor, judges: Judges) -> dict[str, Tensor]:
    both = {"CLIP-I": judges.clip, "DINO-I": judges.dino}
    return {name: judge.images(shown) for name, judge in both.items() if judge is not None}
