"""Checkpoints that are not what they should be: one error each, with the file and the fix."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import weights
from weights.tensors import rename, save_module


@pytest.fixture
def broken(tiny, tmp_path):
    """A copy to damage; the transformer in three shards."""
    path = tmp_path / "broken"
    shutil.copytree(tiny, path)
    folder = path / "transformer"
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(tensors)
    where = {}
    for i in range(3):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, folder / file)
        where |= dict.fromkeys(names[i::3], file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return path


def shard(path, i=2):
    return path / "transformer" / f"diffusion_pytorch_model-{i:05d}-of-00003.safetensors"


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def load_dit(path):
    return weights.load_backbone(path, parts=("dit",), log=lambda line: None)


def test_shards_and_one_file_give_the_same_model(tiny, broken):
    one, three = load_dit(tiny).dit.state_dict(), load_dit(broken).dit.state_dict()
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_the_report_counts_what_was_read(tiny):
    lines = []
    backbone = weights.load_backbone(tiny, dtype=torch.bfloat16, log=lines.append)
    parameters = sum(p.numel() for p in backbone.dit.parameters())
    assert [line.split()[0] for line in lines] == ["transformer", "vae", "text_encoder"]
    assert f"{parameters:,} parameters" in lines[0]
    assert "F32 -> bfloat16" in lines[0]
    assert not any(p.requires_grad for p in backbone.dit.parameters())


def test_saved_and_loaded_again_is_the_same(tiny, tmp_path):
    backbone = weights.load_backbone(tiny, log=lambda line: None)
    shutil.copytree(tiny, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, part in backbone.layout.parts.items():
        module = getattr(backbone, name).get_submodule(part.root)
        save_module(module, part.names, tmp_path / "copy" / part.folder / part.file, torch.float32)
    again = weights.load_backbone(tmp_path / "copy", log=lambda line: None)
    for part in weights.PARTS:
        a, b = getattr(backbone, part).state_dict(), getattr(again, part).state_dict()
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (lambda p: shard(p).unlink(), FileNotFoundError, "00002-of-00003.*[Dd]ownload"),
        (
            lambda p: shard(p).write_bytes(shard(p).read_bytes()[:-64]),
            ValueError,
            "00002-of-00003.*cut short",
        ),
        (lambda p: shard(p).write_bytes(b""), ValueError, "00002-of-00003.*cut short"),
        (
            lambda p: save_file(load_file(shard(p)) | {"surprise.weight": torch.ones(1)}, shard(p)),
            ValueError,
            "1 unknown tensors: surprise.weight",
        ),
        (
            lambda p: save_file(
                {k: v for k, v in load_file(shard(p)).items() if "proj_out" not in k}, shard(p)
            ),
            ValueError,
            "missing tensors: proj_out",
        ),
        (lambda p: edit(p / "transformer/config.json", num_layers=1), ValueError, "unknown tensors"),
        (lambda p: edit(p / "transformer/config.json", num_attention_heads=4), ValueError, "wrong shapes"),
        (lambda p: (p / "vae/config.json").unlink(), FileNotFoundError, "vae/config.json"),
        (lambda p: (p / "vae/config.json").write_text("{"), ValueError, "vae/config.json.*broken JSON"),
        (lambda p: (p / "tokenizer/spiece.model").unlink(), FileNotFoundError, "spiece.model"),
        (lambda p: shutil.rmtree(p / "transformer"), FileNotFoundError, "transformer"),
        (
            lambda p: shutil.copy(shard(p), p / "transformer/diffusion_pytorch_model.safetensors"),
            ValueError,
            "index.json: lies beside diffusion_pytorch_model.safetensors",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(broken, damage, error, match):
    damage(broken)
    with pytest.raises(error, match=match):
        load_dit(broken)


def test_a_row_of_a_table_of_names_fits_whole_names_and_numbers():
    names = {"blocks.{}.norm": "a.{}", "blocks.{}.norm1.linear": "b.{}.mod"}
    assert rename("blocks.12.norm1.linear.weight", names) == "b.12.mod.weight"
    with pytest.raises(KeyError):
        rename("blocks.1.norm2.weight", names)


def test_fp16_is_refused(tiny):
    with pytest.raises(ValueError, match="bf16 or fp32"):
        weights.load_backbone(tiny, dtype=torch.float16)
