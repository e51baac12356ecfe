"""A tiny Wan through the two scripts, and its files beside diffusers and in the original layout."""

import dataclasses
import hashlib
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import helpers
import sample
import train
import weights
from helpers import MEDIA, assert_same, fixed_losses, losses, relative_error, run
from sdv.lora import add_lora, lora_modules
from sdv.models.positions import place_reference
from sdv.seeds import generator
from weights import wan
from weights.tensors import rename, reverse, save_module

SIZE, RUN = ({**options, "--fps": 8} for options in (helpers.SIZE, helpers.RUN))


def quiet(line: str) -> None:
    pass


@pytest.fixture
def tiny(tiny_wan):
    """What the scripts get here."""
    return tiny_wan


def test_a_small_model_may_read_fewer_tokens(tiny, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(tiny, small)
    config = small / "tokenizer/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": 40}))
    whole, short = (weights.load_backbone(path, parts=("text",), log=quiet) for path in (tiny, small))
    assert (whole.layout.text_tokens, short.layout.text_tokens) == (512, 40)
    prompt = "a dog lies on the grass in the sun"
    torch.testing.assert_close(short.text(prompt), whole.text(prompt)[:, :40], rtol=0, atol=0)


# --------------------------------------------------------------------------------------- the two scripts
def test_the_same_commands_train_both_tasks_and_make_a_video(monkeypatch, tiny, tmp_path):
    out, adapter = tmp_path / "run", tmp_path / "run" / "step-000030" / "adapter.safetensors"
    run(monkeypatch, train, {"--backbone": tiny, "--out": out, "--steps": 30, **RUN})
    before, after = fixed_losses(tiny, None), fixed_losses(tiny, adapter)
    assert after["identity"] < 0.9 * before["identity"]
    assert after["motion"] < 0.9 * before["motion"]
    options = {
        "--backbone": tiny, "--adapter": adapter, "--ref": MEDIA / "pairs" / "lawn.jpg", **SIZE, "--steps": 3,
        "--prompt": "a dog", "--out": tmp_path / "video",
    }  # fmt: skip
    run(monkeypatch, sample, options)
    run(monkeypatch, sample, options | {"--sampler": "euler", "--out": tmp_path / "euler"})
    first, second = (next((tmp_path / name).glob("*.mp4")).read_bytes() for name in ("video", "euler"))
    assert first != second
    with pytest.raises(ValueError, match="ddim.*unipc, euler"):
        run(monkeypatch, sample, options | {"--sampler": "ddim"})
    with pytest.raises(ValueError, match="height 80 is not a multiple of 32"):
        run(monkeypatch, sample, options | {"--height": 80})


def test_a_resumed_run_equals_the_one_never_stopped(monkeypatch, tiny, tmp_path):
    options = {"--backbone": tiny, **RUN, "--dropout": "tokens", "--save-every": 2}
    options |= {"--ref-position": "beside", "--t-shift": 5}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(monkeypatch, train, options | {"--out": whole, "--steps": 4})
    run(monkeypatch, train, options | {"--out": parts, "--steps": 2})
    run(monkeypatch, train, options | {"--out": parts, "--steps": 4, "--resume": ""})
    assert_same(whole, parts, 4)
    assert losses(whole) == losses(parts)
    dit = weights.load_backbone(tiny, parts=("dit",), log=quiet).dit
    weights.load_adapter(dit, whole / "step-000004" / "adapter.safetensors")
    assert dit.ref_position == "beside"  # an adapter looks where it learned to look
    with pytest.raises(ValueError, match="'behind'.*leading, shared, far, beside"):
        run(monkeypatch, train, options | {"--out": tmp_path / "x", "--steps": 1, "--ref-position": "behind"})


def test_only_dropped_captions_add_the_empty_prompt_to_the_cache(monkeypatch, tiny, tmp_path, capsys):
    """What Wan samples away from is not empty: a cache that is whole stays so."""
    options = {"--backbone": tiny, **RUN, "--cache": tmp_path / "cache", "--steps": 1}
    for out, more, new in (("a", {}, None), ("b", {}, 0), ("c", {"--text-drop": 1}, 1)):
        run(monkeypatch, train, options | more | {"--out": tmp_path / out})
        said = capsys.readouterr().out
        assert new is None or f"and {new} of " in said


# ---------------------------------------------------------------------------------------- beside diffusers
@pytest.fixture
def pipeline(tiny):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler.from_pretrained(tiny / "scheduler")
    pipe = diffusers.WanPipeline(
        None, None, diffusers.AutoencoderKLWan.from_pretrained(tiny / "vae"), scheduler,
        diffusers.WanTransformer3DModel.from_pretrained(tiny / "transformer"), expand_timesteps=True,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shot(layout, **settings) -> sample.Config:
    cfg = sample.Config(backbone="", prompt=("",), height=64, width=96, frames=9, steps=6, device="cpu")
    return sample.with_defaults(dataclasses.replace(cfg, **settings), layout)


@torch.no_grad()
def test_text_to_video_equals_the_whole_pipeline_of_diffusers(tiny, pipeline):
    backbone = weights.load_backbone(tiny, log=quiet)
    cfg = shot(backbone.layout)
    text, blank = backbone.text(["a white dog runs"]), backbone.text(["blurred"])
    assert text.shape == (1, 512, 64)
    noise = torch.randn(1, 8, 3, 4, 6, generator=generator(5))
    want = pipeline(
        prompt_embeds=text, negative_prompt_embeds=blank, latents=noise, height=64, width=96, num_frames=9,
        num_inference_steps=6, guidance_scale=5.0, output_type="pt",
    ).frames[0]  # fmt: skip
    (found,) = sample.generate(backbone, text, blank, None, cfg, [5])
    assert relative_error(found.transpose(0, 1), want * 2 - 1) <= 1e-4


@torch.no_grad()
def test_an_adapter_runs_in_diffusers_at_its_strength_with_the_reference_as_one_more_frame(
    tiny, pipeline, tmp_path
):
    dit = weights.load_backbone(tiny, parts=("dit",), log=quiet).dit
    add_lora(dit, 4, 2.0, dit.lora_targets)
    place_reference(dit, "leading")
    torch.manual_seed(0)
    for module in lora_modules(dit).values():
        module.lora_B.data.normal_(std=0.1)
    weights.save_adapter(dit, tmp_path / "adapter.safetensors")
    rng = torch.Generator().manual_seed(1)
    video, ref = (torch.randn(1, 8, n, 4, 6, generator=rng) for n in (3, 1))
    t, text = torch.tensor([700.0]), torch.randn(1, 512, 64, generator=rng)
    ours = dit(video, t, text, ref)

    times = torch.cat([torch.zeros(1, 6), t[:, None].expand(1, 18)], dim=1)
    frames = torch.cat([ref, video], dim=2)
    bare = pipeline.transformer(frames, times, text).sample[:, :, 1:]
    pipeline.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
    assert relative_error(ours, pipeline.transformer(frames, times, text).sample[:, :, 1:]) <= 1e-5
    assert relative_error(ours, bare) > 1e-2

    again = weights.load_backbone(tiny, parts=("dit",), log=quiet).dit
    report = weights.load_adapter(again, tmp_path / "adapter.safetensors")
    assert "alpha 2 (from the file), scale 0.5" in report
    assert torch.equal(again(video, t, text, ref), ours)


def test_the_text_encoder_folder_is_readable_by_transformers(tiny):
    transformers = pytest.importorskip("transformers")
    model = transformers.UMT5EncoderModel.from_pretrained(tiny / "text_encoder").eval()
    text = weights.load_backbone(tiny, parts=("text",), log=quiet).text
    ids = text.tokenize("a white dog")
    with torch.no_grad():
        want = model(ids, (ids != 0).long()).last_hidden_state * (ids != 0)[..., None]
    assert relative_error(text("a white dog"), want) <= 1e-5


# ------------------------------------------------------------------------------------ the original layout
@pytest.fixture
def original(tiny, tmp_path, monkeypatch):
    """The same model as its authors lay it out: two shards, two pickles, one config."""
    path = tmp_path / "original"
    backbone = weights.load_backbone(tiny, log=quiet)
    monkeypatch.setattr(wan, "VAE_ORIGINAL", backbone.vae.cfg)
    monkeypatch.setattr(wan, "UMT5_XXL", backbone.text.encoder.cfg)
    (path / "google" / "umt5-xxl").mkdir(parents=True)
    shutil.copy(tiny / "tokenizer" / "spiece.model", path / "google" / "umt5-xxl")
    config = {
        "_class_name": "WanModel", "dim": 128, "eps": 1e-06, "ffn_dim": 256, "freq_dim": 64, "in_dim": 8,
        "model_type": "ti2v", "num_heads": 2, "num_layers": 2, "out_dim": 8, "text_len": 512,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    for name, part in weights.open_backbone(path).parts.items():
        module = getattr(backbone, name).get_submodule(part.root)
        save_module(module, part.names, path / part.folder / part.file, torch.float32)
    tensors = load_file(path / wan.DIT_FILE)
    (path / wan.DIT_FILE).unlink()
    where = {}
    for i in (1, 2):
        file = f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors"
        names = sorted(tensors)[i - 1 :: 2]
        save_file({name: tensors[name] for name in names}, path / file)
        where |= dict.fromkeys(names, file)
    (path / f"{wan.DIT_FILE}.index.json").write_text(json.dumps({"weight_map": where}))
    return path


def test_both_layouts_are_the_same_model_bit_for_bit(tiny, original):
    lines = []
    theirs = weights.load_backbone(original, log=lines.append)
    ours = weights.load_backbone(tiny, log=quiet)
    for part in weights.PARTS:
        a, b = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert theirs.schedule == ours.schedule
    assert any("Wan2.2_VAE.pth" in line for line in lines) and any("ftfy" in line for line in lines)


class Harm:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (lambda file: file.unlink(), FileNotFoundError, "Wan2.2_VAE.pth: missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-900]), ValueError, "Wan2.2_VAE.pth: damaged"),
        (lambda file: torch.save({"x": Harm()}, file), ValueError, "damaged, or more than tensors"),
        (lambda file: file.write_bytes(pickle.dumps(Harm())), ValueError, "Wan2.2_VAE.pth: damaged"),
        (lambda file: torch.save({"x": 3}, file), ValueError, "Wan2.2_VAE.pth: holds something else"),
        (lambda file: torch.save({"x": torch.ones(1)}, file), ValueError, "1 unknown tensors: x"),
    ],
)
def test_a_pickle_is_only_ever_read_as_tensors(original, capsys, damage, error, match):
    damage(original / wan.VAE_PTH)
    with pytest.raises(error, match=match):
        weights.load_backbone(original, parts=("vae",), log=quiet)
    assert "code ran" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------- what is refused
def test_scaled_fp8_and_single_files_are_refused_with_the_reason(tiny, original, tmp_path):
    shutil.copytree(tiny, tmp_path / "fp8")
    file = tmp_path / "fp8" / "transformer" / wan.DIT_FILE
    tensors = load_file(file)
    for dtype, name in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")):
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, file)
        with pytest.raises(ValueError, match=f"{name}.*scales.*bf16 or fp32"):
            weights.load_backbone(tmp_path / "fp8", parts=("dit",), log=quiet)
    pickle = original / wan.VAE_PTH
    torch.save({name: tensor.to(torch.int8) for name, tensor in torch.load(pickle).items()}, pickle)
    with pytest.raises(ValueError, match="int8.*scales.*bf16 or fp32"):
        weights.load_backbone(original, parts=("vae",), log=quiet)
    with pytest.raises(ValueError, match="single file.*fp8.*folder"):
        weights.open_backbone(file)


def test_the_layout_knows_wans_sizes_and_what_it_samples_away_from(tiny):
    layout = weights.open_backbone(tiny)
    cfg = sample.Config(backbone=str(tiny), prompt=("a dog",))
    assert sample.with_defaults(cfg, layout).negative == wan.NEGATIVE
    assert sample.with_defaults(dataclasses.replace(cfg, negative=""), layout).negative == ""
    assert (layout.frames, layout.height, layout.width, layout.fps) == (121, 704, 1280, 24.0)
    assert (layout.spatial_ratio, layout.temporal_ratio, layout.patch, layout.guidance) == (16, 4, 2, 5.0)


@pytest.mark.parametrize(
    ("part", "names", "digest"),
    [
        ("dit", "DIT", "e6aa5b3ad491053717cbb3af607b9d9e6e22e91bb0ae32a0c41eaeccba85787b"),
        ("vae", "VAE", "d6eb318580d7756b4a0e2187642cbff278616b7e3d4580d041014a424ab0911e"),
        ("text", "UMT5", "d6379851fe159f731ef389ae07835eb08fa89ec5d66c040b0d37ac466279d11b"),
    ],
)
def test_the_original_tables_name_every_tensor_of_another_implementation(part, names, digest):
    """Hashes of names and shapes in DiffSynth-Studio 1.1.9: WanModel, VideoVAE38_, WanTextEncoder."""
    build = {
        "dit": lambda: wan.WanDiT(wan.WanConfig()),
        "vae": lambda: wan.WanVAE(wan.VAE_ORIGINAL),
        "text": lambda: wan.T5Encoder(wan.UMT5_XXL),
    }[part]
    table = reverse(getattr(wan, f"{names}_NAMES_ORIGINAL"))
    with torch.device("meta"):
        rows = sorted(f"{rename(name, table)} {list(p.shape)}" for name, p in build().named_parameters())
    assert hashlib.sha256("\n".join(rows).encode()).hexdigest() == digest
