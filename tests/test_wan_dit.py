"""Wan's transformer beside diffusers' on checkpoints in both layouts."""

import pytest
import torch
from safetensors.torch import load_file

from helpers import assert_recomputing_changes_no_gradient, relative_error
from sdv.lora import add_lora
from sdv.models.positions import place_reference
from sdv.models.wan_dit import WanConfig, WanDiT
from weights import wan
from weights.tensors import load_into, read_json, save_module

diffusers = pytest.importorskip("diffusers")

TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """diffusers' transformer, every weight random, and the folder it was saved to."""
    folder = tmp_path_factory.mktemp("wan") / "transformer"
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**TINY)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.eval().save_pretrained(folder, max_shard_size="300KB")
    return model, folder


def load(folder, names=wan.DIT_NAMES, dtype=torch.float32) -> WanDiT:
    with torch.device("meta"):
        dit = WanDiT(wan.dit_config(TINY))
    load_into(dit, names, folder, "cpu", dtype)
    return dit.eval()


def inputs(batch=2, frames=3, height=8, width=12):
    rng = torch.Generator().manual_seed(1)
    video, ref = (torch.randn(batch, 4, n, height, width, generator=rng) for n in (frames, 1))
    text = torch.randn(batch, 7, 24, generator=rng)
    return video, torch.rand(batch, generator=rng) * 1000, text, ref


@pytest.mark.parametrize("size", [(3, 8, 12), (1, 8, 12), (2, 6, 6), (4, 4, 16)])
@torch.no_grad()
def test_text_to_video_equals_diffusers_with_one_time_and_with_one_for_each_token(stock, size):
    model, folder = stock
    video, t, text, _ = inputs(2, *size)
    ours, tokens = load(folder)(video, t, text), video[0, 0].numel() // 4
    assert relative_error(ours, model(video, t, text).sample) <= 1e-5
    assert relative_error(ours, model(video, t[:, None].expand(-1, tokens), text).sample) <= 1e-5


@torch.no_grad()
def test_the_reference_is_one_more_frame_at_time_zero(stock):
    model, folder = stock
    video, t, text, ref = inputs()
    times = torch.cat([torch.zeros(2, 24), t[:, None].expand(-1, 72)], dim=1)
    wanted = model(torch.cat([ref, video], dim=2), times, text).sample[:, :, 1:]
    dit = load(folder)
    place_reference(dit, "leading")
    assert relative_error(dit(video, t, text, ref), wanted) <= 1e-5
    with_one_time = model(torch.cat([ref, video], dim=2), t, text).sample[:, :, 1:]
    assert relative_error(with_one_time, wanted) > 1e-2  # the times of the tokens do matter


def positions(place: str) -> torch.Tensor:
    """(frame, row, column) of 4 x 6 reference tokens and 3 frames of video, one by one."""
    frame, column = {"leading": (-1, 0), "shared": (0, 0), "far": (-32, 0), "beside": (0, 6)}[place]
    ref = [(frame, row, column + c) for row in range(4) for c in range(6)]
    return torch.tensor(ref + [(f, r, c) for f in range(3) for r in range(4) for c in range(6)])


def stock_table(where: torch.Tensor, split=(24, 20, 20)) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary table of tokens at `where` (L, 3), as diffusers' transformer wants it."""
    angles = [
        position[:, None].double() / 10_000 ** (torch.arange(0, channels, 2).double() / channels)
        for position, channels in zip(where.T, split, strict=True)
    ]
    angles = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)[None, :, None]
    return angles.cos().float(), angles.sin().float()


def stock_with_tokens(model, monkeypatch, place, keep, video, t, text, ref):
    """diffusers, made to see chosen reference tokens at chosen places."""
    visible = torch.tensor(keep + list(range(24, 96)))
    tokens = model.patch_embedding(torch.cat([ref, video], dim=2)).flatten(2)[:, :, visible]
    table = stock_table(positions(place)[visible])
    monkeypatch.setattr(model.rope, "forward", lambda hidden: table)
    monkeypatch.setattr(model.patch_embedding, "forward", lambda hidden: tokens[..., None, None])
    drop = model.proj_out.register_forward_pre_hook(lambda module, x: (x[0][:, len(keep) :],))
    times = torch.cat([torch.zeros(2, len(keep)), t[:, None].expand(-1, 72)], dim=1)
    pred = model(video, times, text).sample
    drop.remove()
    return pred


@pytest.mark.parametrize("place", ["leading", "shared", "far", "beside"])
@pytest.mark.parametrize("keep", [list(range(24)), [3, 5, 11], []], ids=["all", "some", "none"])
@torch.no_grad()
def test_every_place_and_every_kept_set_of_reference_tokens(stock, monkeypatch, place, keep):
    model, folder = stock
    video, t, text, ref = inputs()
    dit = load(folder)
    dit.ref_position = place
    found = dit(video, t, text, ref, torch.tensor(keep, dtype=torch.long))
    wanted = stock_with_tokens(model, monkeypatch, place, keep, video, t, text, ref)
    assert relative_error(found, wanted) <= 1e-5
    if not keep:  # the dropped reference is plain text-to-video: only differences of positions count
        assert relative_error(found, dit(video, t, text)) <= 1e-5


@torch.no_grad()
def test_places_differ_and_an_unknown_one_is_refused(stock):
    video, t, text, ref = inputs()
    dit, seen = load(stock[1]), []
    for place in ("leading", "shared", "far", "beside"):
        place_reference(dit, place)
        seen.append(dit(video, t, text, ref))
    assert all(relative_error(a, b) > 1e-4 for i, a in enumerate(seen) for b in seen[:i])
    with pytest.raises(ValueError, match="behind.*leading, shared, far, beside"):
        place_reference(dit, "behind")


def test_the_original_layout_gives_the_same_model_bit_for_bit(stock, tmp_path):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    model, folder = stock
    ours = load(folder)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_module(ours, wan.DIT_NAMES_ORIGINAL, file, torch.float32)
    theirs, wanted = convert_wan_transformer_to_diffusers(load_file(file)), model.state_dict()
    assert theirs.keys() == wanted.keys()
    assert all(torch.equal(theirs[name], wanted[name]) for name in wanted)
    again = load(tmp_path, wan.DIT_NAMES_ORIGINAL).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.state_dict().items())


def test_both_configs_of_the_5b_model_are_the_default():
    original = {
        "_class_name": "WanModel", "dim": 3072, "eps": 1e-06, "ffn_dim": 14336, "freq_dim": 256, "in_dim": 48,
        "model_type": "ti2v", "num_heads": 24, "num_layers": 30, "out_dim": 48, "text_len": 512,
    }  # fmt: skip
    stored = {
        "_class_name": "WanTransformer3DModel", "added_kv_proj_dim": None, "attention_head_dim": 128,
        "cross_attn_norm": True, "eps": 1e-06, "ffn_dim": 14336, "freq_dim": 256, "image_dim": None,
        "in_channels": 48, "num_attention_heads": 24, "num_layers": 30, "out_channels": 48,
        "patch_size": [1, 2, 2], "pos_embed_seq_len": None, "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024, "text_dim": 4096,
    }  # fmt: skip
    assert wan.original_dit_config(original) == wan.dit_config(stored) == WanConfig()
    assert WanConfig().rope_split == (44, 42, 42)


@torch.no_grad()
def test_in_bf16_the_time_path_and_the_norms_stay_float32(stock):
    model, folder = stock
    video, t, text, ref = inputs()
    dit = load(folder, dtype=torch.bfloat16)
    kept = {name for name, p in dit.named_parameters() if p.dtype == torch.float32}
    wanted = ("time", "modulation", "norm")
    assert kept == {name for name, _ in dit.named_parameters() if any(word in name for word in wanted)}
    exact = load(folder)
    assert torch.equal(dit.embed_time(t[:, None])[1], exact.embed_time(t[:, None])[1])
    pred = dit(video.bfloat16(), t, text.bfloat16(), ref.bfloat16())
    assert pred.dtype == dit.dtype == torch.bfloat16
    assert relative_error(pred, exact(video, t, text, ref)) < 0.03


@pytest.mark.parametrize("training", [True, False])
def test_recomputing_blocks_changes_no_gradient(stock, training):
    assert_recomputing_changes_no_gradient(lambda: load(stock[1]), training, inputs())


def test_the_5b_model_and_its_lora_have_their_sizes():
    with torch.device("meta"):
        dit = WanDiT(WanConfig())
    parameters = list(dit.parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (825, 4_999_787_712)
    assert len(add_lora(dit, 128, 64.0, dit.lora_targets)) == 30 * 10


def test_the_config_file_of_diffusers_is_read(stock):
    assert wan.dit_config(read_json(stock[1] / "config.json")) == wan.dit_config(TINY)
