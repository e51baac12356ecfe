"""Sampling beside the whole stock pipeline, loaded by diffusers from a folder that we wrote."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.utils import counters

import sample
import weights
from helpers import MEDIA, SIZE, keep_what_is_filmed, relative_error, run
from sdv.data.media import fit, inspect_clip, read_clip, read_image
from sdv.lora import adapt, add_lora, lora_modules, lora_parameters
from sdv.seeds import generator, normal

CFG = sample.Config(
    backbone="", prompt=("a white dog runs",), height=64, width=96, frames=9, fps=8, steps=4, guidance=6.0,
    device="cpu", dtype="float32",
)  # fmt: skip


@pytest.fixture
def backbone(tiny):
    return weights.load_backbone(tiny, log=lambda line: None)


@pytest.mark.parametrize("dynamic", [False, True], ids=["constant", "dynamic"])
def test_text_to_video_equals_the_stock_pipeline_from_prompt_to_pixels(tiny, backbone, dynamic):
    diffusers = pytest.importorskip("diffusers")
    cfg = dataclasses.replace(CFG, dynamic_guidance=dynamic)
    text, blank = backbone.text(list(cfg.prompt)), backbone.text([""])
    (ours,) = sample.generate(backbone, text, blank, None, cfg, [3])

    pipe = diffusers.CogVideoXPipeline.from_pretrained(tiny)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(backbone.layout.latent_shape(9, 64, 96), generator=generator(3))[None]
    theirs = pipe(
        cfg.prompt[0], negative_prompt="", height=64, width=96, num_frames=9, num_inference_steps=4,
        guidance_scale=6.0, use_dynamic_cfg=dynamic, latents=noise.transpose(1, 2), output_type="pt",
        max_sequence_length=32,
    ).frames[0]  # fmt: skip
    assert relative_error((ours.clamp(-1, 1) + 1) / 2, theirs.transpose(0, 1)) <= 1e-4


@torch.no_grad()
def test_the_lines_of_the_readme_give_our_prediction_in_a_stock_pipeline(tiny, backbone, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    add_lora(backbone.dit, 4, 2.0, backbone.dit.lora_targets)
    torch.manual_seed(0)
    for parameter in lora_parameters(backbone.dit).values():
        parameter.normal_(0, 0.2)
    weights.save_adapter(backbone.dit, tmp_path / "adapter.safetensors")
    video, picture = torch.randn(1, 8, 3, 8, 12), torch.rand(1, 3, 64, 96) * 2 - 1
    ref = backbone.vae.encode(picture[:, :, None])
    text, t = backbone.text(["a dog"]), torch.tensor([400])
    ours = backbone.dit(video, t, text, ref)

    pipe = diffusers.CogVideoXPipeline.from_pretrained(tiny)
    pipe.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    latent = pipe.vae.encode(picture[:, :, None]).latent_dist.mean
    ref_latent = latent.transpose(1, 2) * pipe.vae.config.scaling_factor
    frames = torch.cat([ref_latent, video.transpose(1, 2)], dim=1)
    rope = pipe._prepare_rotary_positional_embeddings(64, 96, frames.shape[1], frames.device)
    theirs = pipe.transformer(frames, text, t, image_rotary_emb=rope).sample[:, 1:]
    assert relative_error(ours, theirs.transpose(1, 2)) <= 1e-4


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile makes C++ for a CPU")
@torch.no_grad()
def test_compiled_blocks_predict_the_same(backbone):
    """As --compile has them: one graph for all blocks."""
    counters.clear()
    video, ref = torch.randn(1, 8, 3, 8, 12), torch.randn(1, 8, 1, 8, 12)
    inputs = video, torch.tensor([400]), backbone.text(["a dog"]), ref
    plain = backbone.dit(*inputs)
    for block in backbone.dit.blocks:
        block.compile()
    assert relative_error(backbone.dit(*inputs), plain) <= 1e-5
    assert counters["frames"]["ok"] == 1 and not counters["graph_break"]


def test_guidance_is_on_the_text_alone(backbone):
    """With equal prompts both halves are equal, whatever the reference: guidance must then change nothing."""
    text = backbone.text(["a dog"])
    ref = torch.randn(1, 8, 1, 8, 12, generator=generator(1))
    weak = sample.generate(backbone, text, text, ref, dataclasses.replace(CFG, guidance=1.0), [0])
    strong = sample.generate(backbone, text, text, ref, CFG, [0])
    assert relative_error(strong, weak) <= 1e-4
    other = sample.generate(backbone, text, text, 2 * ref, CFG, [0])
    assert relative_error(other, strong) > 1e-3


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_a_seed_means_the_same_video_alone_and_among_others(backbone, sampler):
    cfg = dataclasses.replace(CFG, sampler=sampler)
    texts, blank = backbone.text(["a dog", "a cat"]), backbone.text([""])
    refs = torch.randn(2, 8, 1, 8, 12, generator=generator(1))
    both = sample.generate(backbone, texts, blank, refs, cfg, [3, 4])
    for i in range(2):
        (alone,) = sample.generate(backbone, texts[i : i + 1], blank, refs[i : i + 1], cfg, [3 + i])
        assert relative_error(both[i], alone) <= 1e-4


class Telling(nn.Module):
    """A network whose prediction says what it was called with."""

    dtype = torch.float32

    def forward(self, x, t, text, ref=None, keep=None):
        seen = ref is not None and (keep is None or len(keep) > 0)
        return (text.mean() + (ref.mean() if seen else 0)).expand_as(x)


def backbone_of(dit, predictions):
    """With a sampler of one call, and a VAE that changes nothing."""

    def sampler(schedule, denoise, noise, steps, rngs):
        predictions.append(denoise(noise, 500, 0))
        return noise

    return SimpleNamespace(
        dit=dit,
        schedule=SimpleNamespace(samplers={"one": sampler}, default_sampler="one"),
        layout=SimpleNamespace(latent_shape=lambda *_: (4, 1, 2, 2)),
        vae=SimpleNamespace(decode=lambda latents: latents),
    )


SMALL = sample.Config("", frames=1, height=16, width=16, steps=2, guidance=3, ref_guidance=2.5, device="cpu")


def test_guidance_is_the_formula():
    text, negative = torch.full((1, 2, 3), 5.0), torch.full((1, 2, 3), 2.0)
    ref, found = torch.full((1, 4, 1, 2, 2), 7.0), []
    backbone = backbone_of(Telling(), found)
    for picture in (ref, None):
        sample.generate(backbone, text, negative, picture, SMALL, [0])
    for v in (0.0, 0.5):  # below 1, some of the picture is given up
        weak = dataclasses.replace(SMALL, guidance=1, ref_guidance=v)
        sample.generate(backbone, text, negative, ref, weak, [0])
    with_ref, without, *weak = (prediction.unique().item() for prediction in found)
    assert with_ref == 5 + 7 + (3 - 1) * (5 - 2) + (2.5 - 1) * 7
    assert without == 5 + (3 - 1) * (5 - 2)
    assert weak == [5, 5 + 0.5 * 7]


def test_guidance_hides_the_reference_as_dropout_does(monkeypatch):
    """By dropping all of its tokens: a call without a reference puts the video elsewhere."""
    calls, forward = [], Telling.forward

    def noted(self, x, t, text, ref=None, keep=None):
        calls.append((ref is not None, keep is not None and len(keep) == 0))
        return forward(self, x, t, text, ref, keep)

    monkeypatch.setattr(Telling, "forward", noted)
    text, ref = torch.ones(1, 2, 3), torch.ones(1, 4, 1, 2, 2)
    sample.generate(backbone_of(Telling(), []), text, text, ref, SMALL, [0])
    plain, other_text, no_tokens = calls
    assert plain == other_text == (True, False) and no_tokens == (True, True)


def test_the_sampler_that_was_asked_for_goes_on_with_the_generators_of_the_noise():
    seen, backbone, text = [], backbone_of(Telling(), []), torch.ones(1, 2, 3)

    def named(name):
        def sampler(schedule, denoise, noise, steps, rngs):
            seen.append((name, noise, normal(noise.shape, rngs)))
            return noise

        return sampler

    samplers = {name: named(name) for name in ("one", "two")}
    backbone.schedule = SimpleNamespace(samplers=samplers, default_sampler="one")
    for name in ("", "one", "two"):
        sample.generate(backbone, text, text, None, dataclasses.replace(SMALL, sampler=name), [3])
    assert [name for name, *_ in seen] == ["one", "one", "two"]
    rng = generator(3)
    for found in seen[0][1:]:  # the noise, and what the sampler drew
        assert found[0].equal(torch.randn(found[0].shape, generator=rng))


def test_a_prediction_that_is_not_finite_is_told():
    text, found = torch.full((1, 2, 3), torch.nan), []
    with pytest.raises(FloatingPointError, match="denoising step 1 of 2"):
        sample.generate(backbone_of(Telling(), found), text, text, None, SMALL, [0])


def test_every_flag_reaches_the_film(monkeypatch, tiny, tmp_path):
    seen, backbone = keep_what_is_filmed(monkeypatch), weights.load_backbone(tiny, log=lambda line: None)
    for module in adapt(backbone.dit, 4, 4.0).values():
        nn.init.normal_(module.lora_B)
    weights.save_adapter(backbone.dit, tmp_path / "a.safetensors")
    picture = MEDIA / "pairs" / "lawn.jpg"
    options = {"--backbone": tiny, **SIZE, "--adapter": tmp_path / "a.safetensors", "--ref": picture}
    options |= {"--prompt": "a dog", "--negative": "ugly"}
    run(monkeypatch, sample, options | {"--out": tmp_path / "one"})
    more = {"--merge": "", "--tiling": "", "--fps": 4, "--ref-fit": "pad", "--lora-alpha": 12}
    run(monkeypatch, sample, options | more | {"--out": tmp_path / "two"})
    ours = lora_modules(backbone.dit)
    for arguments, fitted, merged in zip(seen, ("crop", "pad"), (False, True), strict=True):
        found, texts, negative, refs, *_ = arguments
        assert torch.equal(texts, backbone.text(["a dog"])) and torch.equal(negative, backbone.text(["ugly"]))
        with torch.no_grad():
            latent = backbone.vae.encode(fit(read_image(picture), 64, 96, fitted)[None, :, None])
        torch.testing.assert_close(refs, latent)
        theirs = lora_modules(found.dit)
        assert found.vae.tiling == merged and ours.keys() == theirs.keys()
        for path, module in theirs.items():
            whole = ours[path].weight + (3 if merged else 1) * ours[path].delta()  # alpha was 4
            torch.testing.assert_close(module.weight if merged else module.weight + module.delta(), whole)
    (film,) = (tmp_path / "two").glob("*.mp4")
    assert inspect_clip(film).seconds == pytest.approx(9 / 4)


def test_films_in_other_settings_by_another_adapter_or_backbone_are_other_films(monkeypatch, tiny, tmp_path):
    seen, base = keep_what_is_filmed(monkeypatch), shutil.copytree(tiny, tmp_path / "base")
    options = {"--backbone": base, **SIZE, "--prompt": "a dog", "--out": tmp_path / "films"}
    for more in ({}, {"--steps": 3}, {"--negative": "ugly"}, {}):  # the last is the first
        run(monkeypatch, sample, options | more)
    assert len(seen) == 3
    dit = weights.load_backbone(base, parts=("dit",), log=lambda line: None).dit
    options |= {"--adapter": tmp_path / "a.safetensors"}
    for module in adapt(dit, 2, 2.0, ("0.attn.q", "1.attn.q")).values():  # one changes its layer, then both
        nn.init.normal_(module.lora_B)
        weights.save_adapter(dit, tmp_path / "a.safetensors")
        run(monkeypatch, sample, options)
    part = weights.open_backbone(base).parts["dit"]
    file = base / part.folder / part.file
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    run(monkeypatch, sample, options)
    assert len(seen) == len(list((tmp_path / "films").glob("*.mp4"))) == 6


def test_a_film_of_a_manifest_has_its_own_prompt_picture_and_seed(monkeypatch, tiny, tmp_path):
    seen, text = keep_what_is_filmed(monkeypatch), weights.load_backbone(tiny, log=lambda line: None).text
    shots = [{"prompt": "a dog", "seed": 5}, {"prompt": "a cat", "seed": 6}]
    shots[1]["reference_file_name"] = str(MEDIA / "pairs" / "lawn.jpg")
    (tmp_path / "shots.jsonl").write_text("\n".join(map(json.dumps, shots)))
    options = {"--backbone": tiny, **SIZE, "--manifest": tmp_path / "shots.jsonl"}
    run(monkeypatch, sample, options | {"--out": tmp_path})
    for shot, (_, texts, negative, ref, _, seeds, *_) in zip(shots, seen, strict=True):
        assert torch.equal(texts, text([shot["prompt"]])) and torch.equal(negative, text([""]))
        assert seeds == [shot["seed"]] and (ref is None) == ("reference_file_name" not in shot)


def test_a_film_begins_with_its_first_frame(monkeypatch, tiny, tmp_path):
    levels = torch.linspace(-0.8, 0.8, 9)
    film = levels[None, None, :, None, None].expand(1, 3, 9, 64, 96)
    monkeypatch.setattr(sample, "generate", lambda *_: film)
    run(monkeypatch, sample, {"--backbone": tiny, **SIZE, "--prompt": "a dog", "--out": tmp_path})
    (file,) = tmp_path.glob("*.mp4")
    found = read_clip(file, 9, 8, 64, 96).float().mean((0, 2, 3)) / 127.5 - 1
    assert (found - levels).abs().max() < 0.05
