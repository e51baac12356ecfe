"""The transformer beside diffusers' on a checkpoint that diffusers wrote, in shards."""

import pytest
import torch

from helpers import (
    assert_recomputing_changes_no_gradient,
    load_dit,
    random_inputs,
    relative_error,
    stock_predict,
    stock_rope,
)
from sdv.lora import add_lora
from sdv.models.cogvideox_dit import CogVideoXConfig, CogVideoXDiT


@pytest.mark.parametrize(
    "size", [(3, 8, 12), (1, 8, 12), (2, 6, 6), (4, 4, 16), (2, 8, 6), (1, 10, 4), (1, 4, 14)]
)
@torch.no_grad()
def test_text_to_video_equals_diffusers_at_every_size(stock_dit, size):
    stock, folder = stock_dit
    video, t, text, _ = random_inputs(2, *size)
    assert relative_error(load_dit(folder)(video, t, text), stock_predict(stock, video, t, text)) <= 1e-5


@torch.no_grad()
def test_reference_equals_one_more_clean_frame_in_diffusers(stock_dit):
    stock, folder = stock_dit
    video, t, text, ref = random_inputs()
    assert (
        relative_error(load_dit(folder)(video, t, text, ref), stock_predict(stock, video, t, text, ref))
        <= 1e-5
    )


@pytest.mark.parametrize("keep", [[], [0], [3, 5, 11], list(range(24))])
@torch.no_grad()
def test_dropped_reference_tokens_are_absent_and_nobody_moves(stock_dit, keep):
    """diffusers, made to forget tokens: its patch embedding's output is indexed, and its rotary table too."""
    stock, folder = stock_dit
    video, t, text, ref = random_inputs()
    frames = torch.cat([ref, video], dim=2)
    visible = torch.tensor(keep + list(range(24, 24 * frames.shape[2])), dtype=torch.long)
    cos, sin = stock_rope(stock, *frames.shape[2:])
    all_tokens = stock.patch_embed(text, frames.transpose(1, 2))
    kept = torch.cat([all_tokens[:, : text.shape[1]], all_tokens[:, text.shape[1] :][:, visible]], dim=1)
    stock.patch_embed.register_forward_hook(lambda module, inputs, output: kept)
    stock.proj_out.register_forward_pre_hook(lambda module, inputs: (inputs[0][:, len(keep) :],))
    rope = cos[visible], sin[visible]
    wanted = stock(video.transpose(1, 2), text, t, image_rotary_emb=rope, return_dict=False)[0].transpose(
        1, 2
    )
    found = load_dit(folder)(video, t, text, ref, torch.tensor(keep, dtype=torch.long))
    assert relative_error(found, wanted) <= 1e-5


@pytest.mark.parametrize("training", [True, False])
def test_recomputing_blocks_changes_no_gradient_in_train_or_eval_mode(stock_dit, training):
    assert_recomputing_changes_no_gradient(lambda: load_dit(stock_dit[1]), training, random_inputs())


def test_the_5b_model_and_the_papers_lora_have_their_published_sizes():
    with torch.device("meta"):
        dit = CogVideoXDiT(CogVideoXConfig())
    parameters = list(dit.parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (1_024, 5_570_283_072)
    modules = add_lora(dit, 128, 64.0, dit.lora_targets)
    trainable = [p for p in dit.parameters() if p.requires_grad]
    assert (len(modules), len(trainable)) == (338, 676)
    assert sum(p.numel() for p in trainable) == 502_276_096
