"""The measures of films beside plain transformers, Pillow and NumPy, with tiny random networks."""

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.evaluation import films, scores, table, truth
from benchmarks.evaluation.judges import ClipJudge, DinoJudge
from benchmarks.evaluation.scores import Judges, film_scores
from benchmarks.evaluation.yardsticks import Sample
from helpers import MEDIA
from sdv.data.media import read_image

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="session")
def judges(networks) -> Judges:
    return Judges(ClipJudge(networks["clip"]), DinoJudge(networks["dino"]))


@cache
def footage() -> tuple[torch.Tensor, float]:
    """A real clip, small: uint8 (3, T, H, W)."""
    frames, fps = films.read_frames(MEDIA / "clips" / "samoyed.mp4")
    return frames[:, 20:40, ::4, ::4].contiguous(), fps


def reference(
    name: str = "lawn.jpg", frames: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    size = (footage()[0] if frames is None else frames).shape[-2:]
    return films.canvas(MEDIA / "pairs" / name, *size), films.as_given(MEDIA / "pairs" / name, *size)


def pillow(image: torch.Tensor) -> "Image.Image":
    return Image.fromarray(image.movedim(0, -1).numpy())


# The networks


def odd_pictures() -> list[torch.Tensor]:
    """Fifty: photos, their corners, frames of films, from 9 x 200 to 1 x 1 pixels."""
    photos = [read_image(path) for path in sorted((MEDIA / "pairs").glob("*.jpg"))]
    rng = np.random.default_rng(0)
    sizes = [(9, 200), (200, 9), (1, 1), (31, 33), (32, 32), *rng.integers(5, 190, (21, 2)).tolist()]
    corners = [photos[i % len(photos)][:, :h, :w] for i, (h, w) in enumerate(sizes)]
    return [*(photo[:, ::8, ::8] for photo in photos), *corners, *footage()[0].unbind(1)]


def test_pictures_are_prepared_as_transformers_does(judges):
    pictures = odd_pictures()
    assert len(pictures) == 50
    for judge in (judges.clip, judges.dino):
        for picture in pictures:
            theirs = judge.processor(images=pillow(picture), return_tensors="pt")["pixel_values"]
            assert torch.equal(judge.pixels(picture[None]), theirs)


def test_clip_sees_what_pillow_makes(judges):
    """CLIP's own recipe: the short side to size by Pillow's bicubic, the centre, mean and deviation."""
    mean, std = (
        np.float64([0.48145466, 0.4578275, 0.40821073]),
        np.float64([0.26862954, 0.26130258, 0.27577711]),
    )
    for picture in odd_pictures():
        image = pillow(picture)
        short = min(image.size)
        if short < 5:
            continue  # sizes of such strips are rounded, not specified
        wide, high = (int(32 * side / short) for side in image.size)
        left, top = (wide - 32) // 2, (high - 32) // 2
        cut = image.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
        plain = (np.asarray(cut) / 255 - mean) / std
        assert np.abs(judges.clip.pixels(picture[None])[0].movedim(0, -1).numpy() - plain).max() <= 1e-6


@torch.no_grad()
def test_scores_equal_the_formulas_in_plain_transformers(networks, judges):
    frames, fps = footage()
    shown, given = reference()
    prompt = "a white dog runs along a beach"
    ours = film_scores(frames, fps, prompt, shown, given, judges)

    chosen = np.linspace(0, 19, 16).round().astype(int)
    images = [pillow(frames[:, i]) for i in chosen]
    clip = transformers.CLIPModel.from_pretrained(networks["clip"])
    prepare = transformers.CLIPImageProcessorPil.from_pretrained(networks["clip"])
    words = transformers.CLIPTokenizer.from_pretrained(networks["clip"])([prompt], return_tensors="pt")
    found = clip(**words, **prepare(images=[*images, pillow(shown)], return_tensors="pt"))
    cosines = found.logits_per_image[:-1, 0] / clip.logit_scale.exp()
    assert ours["CLIP-T"] == pytest.approx(float(cosines.mean()), abs=1e-6)
    cosines = torch.cosine_similarity(found.image_embeds[:-1], found.image_embeds[-1:])
    assert ours["CLIP-I"] == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert cosines.std() > 1e-3  # the frames are told apart

    for name in ("dino", "dinov2"):
        dino = transformers.AutoModel.from_pretrained(networks[name])
        kind = transformers.ViTImageProcessorPil if name == "dino" else transformers.BitImageProcessorPil
        prepare = kind.from_pretrained(networks[name])
        tokens = dino(**prepare(images=[*images, pillow(shown)], return_tensors="pt")).last_hidden_state[:, 0]
        cosines = torch.cosine_similarity(tokens[:-1], tokens[-1:])
        with_it = judges._replace(dino=DinoJudge(networks[name]))
        mine = film_scores(frames, fps, prompt, shown, given, with_it)["DINO-I"]
        assert mine == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert judges.clip.name == "CLIP ViT-32/8" and DinoJudge(networks["dinov2"]).name == "DINOv2 ViT-32/8"


def test_folders_as_they_were_published_read_the_same(networks, judges, tmp_path):
    """OpenAI's and Meta's: processors named in the old way, sizes as numbers, weights by torch.save."""
    new = json.loads((networks["clip"] / "preprocessor_config.json").read_text())
    kept = {name: new[name] for name in ("image_mean", "image_std", "resample", "do_resize", "do_normalize")}
    old = kept | {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32}
    shutil.copytree(networks["clip"], tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(old))
    shutil.copytree(networks["dino"], tmp_path / "dino")
    tensors = load_file(tmp_path / "dino" / "model.safetensors")
    (tmp_path / "dino" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "dino" / "pytorch_model.bin")
    pictures = footage()[0][:, :2].transpose(0, 1)
    assert torch.equal(ClipJudge(tmp_path / "clip").images(pictures), judges.clip.images(pictures))
    assert torch.equal(DinoJudge(tmp_path / "dino").images(pictures), judges.dino.images(pictures))


def test_a_pickle_that_would_run_code_is_refused(networks, tmp_path):
    class Runs:
        def __reduce__(self):
            return Path.mkdir, (tmp_path / "has run",)

    shutil.copytree(networks["dino"], tmp_path / "dino")
    (tmp_path / "dino" / "model.safetensors").unlink()
    torch.save({"a": Runs()}, tmp_path / "dino" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="--dino .*weights cannot be read"):
        DinoJudge(tmp_path / "dino")
    assert not (tmp_path / "has run").exists()


def test_prompts_longer_than_clip_reads_are_cut_and_counted(judges):
    long = "a dog " * 30
    assert judges.clip.cut(["a dog", long]) == 1
    assert torch.equal(judges.clip.texts([long]), judges.clip.texts([long + "and a cat"]))


# The measures


def test_a_film_of_one_picture_scores_that_picture(judges):
    shown, given = reference()
    still = shown[:, None].expand(-1, 17, -1, -1)
    row = film_scores(still, 8, "a dog", shown, given, judges)
    assert row["CLIP-I"] == pytest.approx(1, abs=1e-6) and row["DINO-I"] == pytest.approx(1, abs=1e-6)
    assert row["smoothness"] == row["duplicates"] == 1 and row["dynamic"] == row["speed"] == 0
    assert row["paste"] == pytest.approx(1, abs=1e-4)  # 22,000 products summed in float32
    other, of_other = reference("tiles.jpg")
    row = film_scores(still, 8, "a dog", other, of_other, judges)
    pair = (judges.clip.images(shown[None]) @ judges.clip.images(other[None]).T).item()
    assert row["CLIP-I"] == pytest.approx(pair, abs=1e-6) and pair < 0.999 and row["paste"] < 0.9


def test_a_cut_reference_is_a_copy_as_well(judges):
    """sample.py gives the reference cut, unless asked for white borders: a film of that is a paste too."""
    _, given = reference()
    for picture in given:
        still = ((picture + 1) * 127.5).round().byte()[:, None].expand(-1, 5, -1, -1)
        assert scores.movement_scores(still, 8, given)["paste"] > 0.99


def test_what_is_permuted_changes_the_right_numbers_only(judges):
    frames, fps = footage()
    frames, prompt = frames[:, :16], "a dog"
    (lawn, lawns), (tiles, tilings) = reference(), reference("tiles.jpg")
    row = film_scores(frames, fps, prompt, lawn, lawns, judges)

    def changed(other: dict[str, float]) -> set[str]:
        return {name for name in row if abs(row[name] - other[name]) > 1e-6}

    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = changed(film_scores(frames[:, order], fps, prompt, lawn, lawns, judges))
    assert {"smoothness"} <= shuffled <= {"smoothness", "dynamic", "speed", "duplicates"}
    assert changed(film_scores(frames, fps, prompt, tiles, tilings, judges)) == {"CLIP-I", "DINO-I", "paste"}
    assert changed(film_scores(frames, fps, "a cat sleeps", lawn, lawns, judges)) == {"CLIP-T"}
    assert changed(film_scores(frames, fps, prompt, lawn, tilings, judges)) == {"paste"}


def middle(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return (before + after) / 2


@pytest.mark.parametrize("count", [3, 8, 17])
def test_smoothness_by_vbench(count):
    """The plain computation, on frames of odd size that have to be padded; a still film is smooth."""
    frames = footage()[0][:, :count, :51, :70]
    images = frames.permute(1, 2, 3, 0).numpy()
    errors = []
    for i in range(1, count - 1, 2):
        guess = ((images[i - 1] / np.float32(255) + images[i + 1] / np.float32(255)) / 2 * 255).astype(
            np.uint8
        )
        errors.append(np.abs(guess.astype(int) - images[i].astype(int)).mean())
    ours = scores.vbench_smoothness(frames, middle)
    assert ours == pytest.approx((255 - np.mean(errors)) / 255, abs=1e-4) and ours < 1
    assert scores.vbench_smoothness(frames[:, :1].expand(-1, 5, -1, -1), middle) > 1 - 1 / 255


@pytest.mark.parametrize("fps, step, slowest", [(8, 1, 6.0), (24, 3, 6.0), (4, 1, 12.0)])
def test_dynamic_degree_by_vbench(fps, step, slowest):
    """A flow of known length: 6 of 256 pixels, in a quarter of the frames, in the fastest twentieth."""
    frames = torch.zeros(3, 16 * step, 120, 160, dtype=torch.uint8)
    least = slowest * 120 / 256

    def film(length: float, moving: int, share: float = 0.06) -> bool:
        asked = []

        def flow(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
            asked.append(before.shape[-2:])
            field = torch.zeros(1, 2, *before.shape[-2:])
            if len(asked) <= moving:
                field[:, :, :, : round(share * 160)] = length / 2**0.5
            return field

        found = scores.vbench_dynamic(frames, fps, flow)
        assert len(asked) == 15
        return found

    assert film(1.01 * least, 4) and not film(1.01 * least, 3)
    assert not film(0.99 * least, 15) and not film(1.01 * least, 15, share=0.02)


# The table


def test_an_interval_over_subjects_covers_the_truth():
    """95 of 100 intervals hold the mean, though films of one subject are alike; films drawn singly do not."""
    rng, inside, alone = np.random.default_rng(0), 0, 0
    for _ in range(200):
        values = (rng.normal(size=(30, 1)) + 0.1 * rng.normal(size=(30, 4))).ravel()
        low, high = table.bootstrap(values, [str(i // 4) for i in range(120)])
        inside += low < 0 < high
        low, high = table.bootstrap(values, [str(i) for i in range(120)])
        alone += low < 0 < high
    assert 0.88 <= inside / 200 <= 0.99 and alone / 200 < 0.8


def test_rows_are_means_over_films_and_deviations_over_seeds():
    values = {("dog", 0): (0.5, 0.7), ("dog", 1): (0.7, 0.9), ("cat", 0): (0.3, 0.1), ("cat", 1): (0.9, 0.3)}
    found = table.summarise(
        "films", [Sample(*who, {"CLIP-I": v, "speed": w}) for who, (v, w) in values.items()]
    )
    cell = found.cells["CLIP-I"]
    assert cell.mean == pytest.approx(0.6) and cell.deviation == pytest.approx(np.std([0.4, 0.8], ddof=1))
    assert cell.low == pytest.approx(0.6) and cell.high == pytest.approx(0.6)  # both subjects have 0.6
    assert found[:4] == ("films", 4, 2, 2) and set(found.cells) == {"CLIP-I", "speed"}
    assert found.cells["speed"].low == pytest.approx(0.2) and found.cells["speed"].high == pytest.approx(0.8)
    alone = table.summarise("one", [Sample("dog", 0, {"CLIP-I": 0.5})]).cells["CLIP-I"]
    assert alone == (0.5, None, None, None)
    text = table.markdown([found, *table.paper_rows()], ["a note"])
    assert "60.00 ± 28.28 [60.0, 60.0]" in text and "77.14" in text and "- a note" in text
    assert "VBench dynamic" in text and "duplicates" not in text


def test_correlation_of_ranks_and_area():
    """The examples in SciPy's and scikit-learn's documentation."""
    assert truth.rank([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826816681233)
    assert truth.area([0.35, 0.8], [0.1, 0.4]) == 0.75 and truth.area([1, 1], [1]) == 0.5


def test_a_real_image_network_knows_subjects_of_the_micro_world():
    """Of more subjects: benchmarks/evaluation/truth.csv."""
    pytest.importorskip("efficientnet_lite_pytorch")
    found = [value for _, _, value, _ in truth.who_is_it(truth.ImageNet(), 12)]
    species_on_white, other_on_white, species, other = found
    assert species_on_white > 0.9 and other_on_white > 0.95 and species > 0.65 and other > 0.8
