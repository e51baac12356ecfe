"""What the numbers of films are to be held against: pictures of the same subject, of others, and a mere copy.

Each yardstick is a list of samples like those of films, so that one table summarises all of them.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from benchmarks.evaluation.films import FEWEST, as_given, canvas
from benchmarks.evaluation.scores import Judges, film_scores, mean_cosine
from benchmarks.evaluation.subjects import Subject
from sdv.data.media import inspect_clip
from sdv.run.films import Shot


class Sample(NamedTuple):
    """The measures of one film, or of a pair of pictures."""

    subject: str  # the bootstrap draws these
    seed: int | None
    scores: dict[str, float]


def subject_of(ref: Path, known: dict[Path, Subject]) -> str:
    """The subject's name, or the reference's where no subjects are known: several may show one subject."""
    return known[ref.resolve()].name if ref.resolve() in known else str(ref)


def still_films(films: Sequence[Shot], known: dict[Path, Subject], judges: Judges) -> list[Sample]:
    """Each reference as a film that shows nothing else, under each of its prompts: what copying scores."""
    once = {(film.ref, film.prompt): film for film in films}.values()
    judges, samples = judges._replace(frames=FEWEST), []
    for film in once:
        height, width = inspect_clip(film.file)[:2]
        shown = canvas(film.ref, height, width)
        frames = shown[:, None].expand(-1, FEWEST, -1, -1)
        scores = film_scores(frames, 8, film.prompt, shown, as_given(film.ref, height, width), judges)
        samples.append(Sample(subject_of(film.ref, known), None, scores))
    return samples


def pictures(films: Sequence[Shot], known: dict[Path, Subject], judges: Judges) -> tuple[list, list]:
    """CLIP-I and DINO-I of references against others of their subject, and other subjects of their noun.

    One sample a reference, the mean over all that it is compared with: dogs are not to count for more than
    backpacks because there are more of them.
    """
    size = inspect_clip(films[0].file)[:2]
    refs = list(dict.fromkeys(film.ref.resolve() for film in films))
    for ref in refs:
        if ref not in known:
            raise ValueError(f"--subjects: {ref} is none of its pictures; give the folder of the references")
    vectors: dict[Path, dict[str, Tensor]] = {}

    def compared(ref: Path, others: Sequence[Path]) -> list[Sample]:
        for picture in [ref, *others]:
            if picture not in vectors:
                vectors[picture] = _vectors(canvas(picture, *size)[None], judges)
        scores = {
            measure: statistics.fmean(mean_cosine(mine, vectors[other][measure]) for other in others)
            for measure, mine in (vectors[ref].items() if others else ())
        }
        return [Sample(known[ref].name, None, scores)] if scores else []

    same, kind = [], []
    for ref in refs:
        own = known[ref]
        same += compared(ref, [p for p, whose in known.items() if whose is own and p != ref])
        kind += compared(
            ref, [p for p, other in known.items() if other.noun == own.noun and other is not own]
        )
    return same, kind


def _vectors(shown: Tensor, judges: Judges) -> dict[str, Tensor]:
    both = {"CLIP-I": judges.clip, "DINO-I": judges.dino}
    return {name: judge.images(shown) for name, judge in both.items() if judge is not None}
