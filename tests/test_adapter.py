"""Adapters between formats: the same update of every weight for us, for diffusers and for peft."""

import json
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
import weights
from helpers import TINY_DIT, build, full_disk, lora_pair, relative_error, run
from sdv.lora import act_on_reference, acts_on, add_lora, lora_modules, lora_parameters
from sdv.lora import merge as merge_lora
from sdv.models.cogvideox_dit import CogVideoXDiT
from sdv.models.positions import place_reference
from sdv.models.wan_dit import WanDiT
from weights import adapter, cogvideox, formats, wan
from weights.tensors import rename, reverse, save_module
from weights.tiny import WAN_CONFIGS

quiet = lambda line: None  # noqa: E731
TINY = {CogVideoXDiT: TINY_DIT, WanDiT: WAN_CONFIGS["transformer/config.json"]}
FAMILIES = pytest.mark.parametrize("family", TINY, ids=formats.label)


def randomised(dit, groups):
    """Random LoRAs; groups: (rank, alpha, targets)."""
    for rank, alpha, targets in groups:
        add_lora(dit, rank, alpha, targets)
    torch.manual_seed(1)
    for parameter in lora_parameters(dit).values():
        parameter.data = torch.randn_like(parameter)
    return dit


# DiffSynth multiplies matrices alone: without the convolution of CogVideoX's patches.
LEFT_OUT = {"diffsynth": ("patch_in",)}
NOT_VISUAL = ("text_in", "mod1", "mod2", "cross.k", "cross.v")


def plain(family, left_out=()):
    """One rank, one alpha, at a scale that no binary fraction equals."""
    dit = build(family)
    return randomised(dit, [(6, 4.0, tuple(target for target in dit.lora_targets if target not in left_out))])


def mixed(family, left_out=()):
    """A rank and an alpha for every kind of layer, most of them unlike the others."""
    dit = build(family)
    targets = [target for target in dit.lora_targets if target not in left_out]
    return randomised(dit, [(2 + i // 2, 1.7 + i, (target,)) for i, target in enumerate(targets)])


def deltas(dit):
    return {path: module.delta().detach() for path, module in lora_modules(dit).items()}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for path in wanted:
        assert relative_error(found[path], wanted[path]) <= 1e-6, path


def reloaded(family, source):
    """A model with the LoRA of a file, and what was said about it."""
    dit = build(family)
    return dit, weights.load_adapter(dit, source)


def target_of(folder, format):
    return folder / (format if format == "peft" else f"{format}.safetensors")


# -------------------------------------------------------------------------------------- there and back
@FAMILIES
@pytest.mark.parametrize("make", [plain, mixed])
@pytest.mark.parametrize("format", formats.FORMATS)
def test_every_format_brings_back_every_update_and_the_notes(family, make, format, tmp_path):
    dit = make(family, LEFT_OUT.get(format, ()))
    dit.ref_position = dit.ref_positions[-1]
    weights.save_adapter(dit, target_of(tmp_path, format), format)
    with torch.device("meta"):  # as the scripts try an adapter before they load a model
        weights.load_adapter(build(family), target_of(tmp_path, format))
    again, line = reloaded(family, target_of(tmp_path, format))
    assert_same(deltas(again), deltas(dit))
    assert ("the rank, as always in DiffSynth" if format == "diffsynth" else "from the file") in line
    assert again.ref_position == dit.ref_positions[-1]
    assert all(parameter.requires_grad for parameter in lora_parameters(again).values())
    assert formats.read(target_of(tmp_path, format)).format == format


@FAMILIES
def test_a_walk_through_all_formats_changes_no_update_and_forgets_no_note(
    family, tmp_path, monkeypatch, capsys
):
    dit = mixed(family, LEFT_OUT["diffsynth"] + NOT_VISUAL)
    act_on_reference(dit)
    source = tmp_path / "start.safetensors"
    weights.save_adapter(dit, source)
    for format in formats.FORMATS:
        command(monkeypatch, "convert", source, target_of(tmp_path, format), "--format", format)
        source = target_of(tmp_path, format)
    again, _ = reloaded(family, source)
    assert_same(deltas(again), deltas(dit))
    assert all(module.tokens is not None for module in lora_modules(again).values())
    assert "(from the file)" in capsys.readouterr().out


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["adapter", *map(str, arguments)])
    adapter.main()


@pytest.mark.parametrize("alpha", [2.0, 3.0], ids=["power of two", "other"])
def test_folding_the_scale_into_a_bf16_file_rounds_nothing(alpha, tmp_path):
    dit, file = build(WanDiT), tmp_path / "a.safetensors"
    randomised(dit, [(4, alpha, dit.lora_targets)]).bfloat16()
    weights.save_adapter(dit, file, "diffsynth")
    assert_same(deltas(reloaded(WanDiT, file)[0]), deltas(dit))
    stored = {tensor.dtype for tensor in load_file(file).values()}
    assert stored == ({torch.bfloat16} if alpha == 2.0 else {torch.bfloat16, torch.float32})


# ----------------------------------------------------------------------- ours, read by diffusers and peft
def stock(family):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    kind = {CogVideoXDiT: diffusers.CogVideoXTransformer3DModel, WanDiT: diffusers.WanTransformer3DModel}
    return kind[family].from_config(TINY[family])


def stock_deltas(model, family, adapter_name="default_0"):
    names = formats.LAYER_NAMES[family]["diffusers"]
    layers = {p: module for p, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    ours = (rename(f"{p.removeprefix('base_model.model.')}.weight", names) for p in layers)
    found = [module.get_delta_weight(adapter_name).detach() for module in layers.values()]
    return dict(zip((path.removesuffix(".weight") for path in ours), found, strict=True))


def through_diffusers(file, family):
    """The updates of a file in stock diffusers' load_lora_weights."""
    import diffusers

    model = stock(family)
    kind = {CogVideoXDiT: diffusers.CogVideoXPipeline, WanDiT: diffusers.WanPipeline}[family]
    kind(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=model).load_lora_weights(
        str(file.parent), weight_name=file.name
    )
    return stock_deltas(model, family)


@pytest.mark.parametrize("make", [plain, mixed])
@pytest.mark.parametrize("format", ["diffusers", "diffusers-old", "comfyui", "kohya"])
@FAMILIES
def test_stock_diffusers_applies_the_same_updates(family, make, format, tmp_path):
    if family is CogVideoXDiT and format in ("comfyui", "kohya"):
        pytest.skip("diffusers reads these for Wan alone")
    stock(family)
    dit = make(family)
    weights.save_adapter(dit, target_of(tmp_path, format), format)
    assert_same(through_diffusers(target_of(tmp_path, format), family), deltas(dit))


def test_patterns_are_named_where_they_are_empty_as_peft_names_them(tmp_path):
    """diffusers 0.34 to 0.39 end with a KeyError on a file whose settings lack rank_pattern."""
    peft = pytest.importorskip("peft")
    weights.save_adapter(plain(WanDiT), tmp_path / "a.safetensors", "diffusers")
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    theirs = peft.LoraConfig(target_modules=["to_q"]).to_dict()
    for pattern in ("rank_pattern", "alpha_pattern"):
        assert settings[f"transformer.{pattern}"] == theirs[pattern] == {}


def test_diffsynth_files_in_diffusers_by_the_renaming_that_users_do(tmp_path):
    stock(WanDiT)
    dit = mixed(WanDiT)
    weights.save_adapter(dit, tmp_path / "a.safetensors", "diffsynth")
    renamed = {
        f"diffusion_model.{key.replace('.default', '')}": tensor
        for key, tensor in load_file(tmp_path / "a.safetensors").items()
    }
    save_file(renamed, tmp_path / "b.safetensors")
    assert_same(through_diffusers(tmp_path / "b.safetensors", WanDiT), deltas(dit))
    again, line = reloaded(WanDiT, tmp_path / "b.safetensors")
    assert "the rank, as ComfyUI reads a file without it" in line
    assert_same(deltas(again), deltas(dit))


@FAMILIES
@pytest.mark.parametrize("make", [plain, mixed])
def test_peft_applies_the_same_updates_from_our_folder(family, make, tmp_path):
    model, dit = stock(family), make(family)
    import peft

    weights.save_adapter(dit, tmp_path / "folder", "peft")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "folder")
    assert_same(stock_deltas(model, family, "default"), deltas(dit))


@FAMILIES
def test_a_models_own_loader_in_diffusers_applies_the_same_updates(family, tmp_path):
    dit = mixed(family)
    # Without weight_name it drops the metadata and takes alpha to be the rank, as it is in the old format.
    for format, options in (("diffusers", {"weight_name": "diffusers.safetensors"}), ("diffusers-old", {})):
        model, file = stock(family), target_of(tmp_path, format)
        weights.save_adapter(dit, file, format)
        model.load_lora_adapter(str(tmp_path) if options else str(file), **options)
        assert_same(stock_deltas(model, family), deltas(dit))


def test_cogvideox_in_comfyui_has_the_names_of_its_converter(tmp_path):
    # ComfyUI's model is diffusers' with these replacements; its LoRA keys are its weights' names.
    names = ("transformer_blocks.", "blocks."), ("attn1.to_out.0", "attn_out"), ("attn1.to_", "")
    names += ("ff.net.0.proj", "ff_proj"), ("ff.net.2", "ff_out"), ("time_embedding.", "time_embedding_")
    dit = build(CogVideoXDiT)
    randomised(dit, [(4, 2.0, (*dit.lora_targets, "time_in.linear_1", "mod_out", "proj_out"))])
    wanted = set()
    for path in lora_modules(dit):
        theirs = rename(f"{path}.weight", reverse(cogvideox.DIT_NAMES)).removesuffix(".weight")
        for old, new in names:
            theirs = theirs.replace(old, new)
        wanted |= {f"diffusion_model.{theirs}.{leaf}" for leaf in ("lora_A.weight", "lora_B.weight", "alpha")}
    weights.save_adapter(dit, tmp_path / "a.safetensors", "comfyui")
    assert load_file(tmp_path / "a.safetensors").keys() == wanted


def test_cogvideox_in_diffsynth_has_the_names_of_its_model(tmp_path):
    """Those of CogDiT in its diffsynth/models/cog_dit.py, and of what that is made of."""
    dit = build(CogVideoXDiT)
    targets = [target for target in dit.lora_targets if target not in LEFT_OUT["diffsynth"]]
    targets += ["time_in.linear_1", "time_in.linear_2", "mod_out", "proj_out"]
    randomised(dit, [(4, 4.0, tuple(targets))])
    weights.save_adapter(dit, tmp_path / "a.safetensors", "diffsynth")
    tensors = load_file(tmp_path / "a.safetensors")
    layers = ("norm1.linear", "norm2.linear", "ff.0", "ff.2")
    layers += tuple(f"attn1.to_{name}" for name in ("q", "k", "v", "out"))
    wanted = {f"blocks.{i}.{layer}" for i in (0, 1) for layer in layers}
    wanted |= {f"time_embedder.timestep_embedder.{i}" for i in (0, 2)}
    wanted |= {"context_embedder", "norm_out.linear", "proj_out"}
    assert {key.split(".lora_")[0] for key in tensors} == wanted
    for theirs, ours in (("time_embedder.timestep_embedder.0", "time_in.linear_1"), ("proj_out", "proj_out")):
        assert torch.equal(tensors[f"{theirs}.lora_A.default.weight"], lora_modules(dit)[ours].lora_A)


# ------------------------------------------------------------------------------------- theirs, read by us
@FAMILIES
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_and_diffusers_save_has_the_same_updates_here(family, rslora, tmp_path):
    model = stock(family)
    import peft

    patterns = {"rank_pattern": {r"attn1\.to_k": 5}, "alpha_pattern": {r".*1\.attn1\.to_k": 9}}
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_out.0", "net.2"], use_rslora=rslora,
        init_lora_weights=False, **({} if rslora else patterns),
    )  # fmt: skip
    model.add_adapter(config)
    model.save_lora_adapter(tmp_path / "bare", weight_name="a.safetensors")
    wrapped = peft.get_peft_model(stock(family), config)
    wrapped.save_pretrained(tmp_path / "folder")
    for source, wanted in (
        (tmp_path / "bare" / "a.safetensors", stock_deltas(model, family, "default")),
        (tmp_path / "folder", stock_deltas(wrapped, family, "default")),
        (tmp_path / "folder" / "adapter_model.safetensors", stock_deltas(wrapped, family, "default")),
    ):
        assert_same(deltas(reloaded(family, source)[0]), wanted)


@pytest.mark.parametrize(
    ("stem", "halves", "alpha", "format"),
    [
        ("diffusion_model.blocks.0.self_attn.q", ("lora_down", "lora_up"), "file", "comfyui"),
        ("diffusion_model.blocks.0.self_attn.q", ("lora.down", "lora.up"), "file", "comfyui"),
        ("diffusion_model.blocks.0.attn1.to_q", ("lora_A.default", "lora_B.default"), "file", "comfyui"),
        ("model.diffusion_model.blocks.0.self_attn.q", ("lora_down", "lora_up"), "file", "comfyui"),
        ("model.diffusion_model.blocks.0.self_attn.q", ("lora_A", "lora_B"), "file", "comfyui"),
        ("diffusion_model._orig_mod.blocks.0.self_attn.q", ("lora_A", "lora_B"), "file", "comfyui"),
        ("lora_unet_blocks_0_self_attn_q", ("lora_down", "lora_up"), "file", "kohya"),
        ("lora_unet__blocks_0_self_attn_q", ("lora_down", "lora_up"), "file", "kohya"),
        ("lora_transformer_blocks_0_attn1_to_q", ("lora_down", "lora_up"), "file", "kohya"),
        ("lycoris_blocks_0_attn1_to_q", ("lora_down", "lora_up"), "file", "kohya"),
        ("blocks.0.self_attn.q", ("lora_A.default", "lora_B.default"), "rank", "diffsynth"),
        ("pipe.dit.blocks.0.self_attn.q", ("lora_A.default", "lora_B.default"), "rank", "diffsynth"),
        ("base_model.model.blocks.0.self_attn.q", ("lora_A", "lora_B"), "", "peft"),
        ("base_model.model._orig_mod.blocks.0.attn1.to_q", ("lora_A", "lora_B"), "", "peft"),
        ("blocks.0.self_attn.q", ("lora_A", "lora_B"), "", "diffusers"),
        ("blocks.0.self_attn.q", ("lora_down", "lora_up"), "", "diffusers"),
        ("transformer.blocks.0.attn1.to_q", ("lora_A.default", "lora_B.default"), "", "diffusers"),
        ("transformer.blocks.0.attn1.to_q", ("lora_down", "lora_up"), "", "diffusers"),
        ("module.transformer.blocks.0.attn1.to_q", ("lora_A", "lora_B"), "", "diffusers"),
        ("transformer.blocks.0.attn1.to_q", ("lora.down", "lora.up"), "", "diffusers-old"),
    ],
)
def test_keys_as_people_and_other_tools_have_them(stem, halves, alpha, format, tmp_path):
    """alpha: in the file, the rank by convention, or nowhere."""
    (a, b), dit, file = lora_pair(), build(WanDiT), tmp_path / "a.safetensors"
    tensors = {f"{stem}.{half}.weight": tensor for half, tensor in zip(halves, (a, b), strict=True)}
    tensors |= {f"{stem}.alpha": torch.tensor(6.0).bfloat16()} if alpha == "file" else {}
    save_file(tensors, file)
    assert formats.read(file).format == format
    if not alpha:
        with pytest.raises(ValueError, match=r"a\.safetensors.*--lora-alpha"):
            weights.load_adapter(dit, file)
    line = weights.load_adapter(dit, file, None if alpha else 6.0)
    assert_same(deltas(dit), {"blocks.0.attn.q": (1.0 if alpha == "rank" else 1.5) * (b @ a)})
    assert {"file": "from the file", "rank": "the rank, as always", "": "as asked"}[alpha] in line


def test_an_alpha_of_a_layer_counts_before_the_settings(tmp_path):
    (a, b), dit, stem = lora_pair(), build(WanDiT), "transformer.blocks.0.attn1.to_q"
    tensors = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b, f"{stem}.alpha": torch.tensor(6.0)}
    settings = json.dumps({"transformer.lora_alpha": 4, "transformer.r": 4})
    save_file(tensors, tmp_path / "a.safetensors", {formats.METADATA: settings})
    weights.load_adapter(dit, tmp_path / "a.safetensors")
    assert_same(deltas(dit), {"blocks.0.attn.q": 1.5 * (b @ a)})


def test_another_file_in_a_peft_folder_is_not_read_by_its_settings(tmp_path):
    (a, b), stem, file = lora_pair(), "transformer.blocks.0.attn1.to_q", tmp_path / "other.safetensors"
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, file)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 64}))
    assert formats.read(file).alpha_from == "" and formats.adapter_files(file) == [file]


def test_an_adapter_that_changes_nothing_is_said_to(tmp_path):
    file = tmp_path / "a.safetensors"
    half, eighth = torch.float16, torch.float8_e4m3fn
    for b, alpha, dtype, nothing in (
        (1.0, 4.0, half, False), (0.0, 4.0, half, True), (1.0, 0.0, half, True),
        (1.0, 4.0, eighth, False), (0.0, 4.0, eighth, True),
    ):  # fmt: skip
        dit = build(WanDiT)
        for module in add_lora(dit, 4, alpha, ("attn.q",)).values():
            module.lora_B.data = module.lora_B.data.fill_(b).to(dtype)
        weights.save_adapter(dit, file)
        assert ("update is zero" in weights.load_adapter(build(WanDiT), file)) == nothing


def test_the_folder_of_a_save_is_read_as_its_adapter(tmp_path):
    dit = plain(WanDiT)
    weights.save_adapter(dit, tmp_path / "step-000004" / "adapter.safetensors")
    again, _ = reloaded(WanDiT, tmp_path / "step-000004")
    assert_same(deltas(again), deltas(dit))
    assert formats.adapter_files(tmp_path / "step-000004") == [
        tmp_path / "step-000004" / "adapter.safetensors"
    ]


@FAMILIES
def test_a_released_file_without_alpha_converts_once_alpha_is_given(family, tmp_path, monkeypatch, capsys):
    dit, file = plain(family), tmp_path / "released.safetensors"
    weights.save_adapter(dit, file)
    save_file(load_file(file), file)  # the paper's is like this: diffusers' keys, no metadata
    with pytest.raises(SystemExit, match=r"released\.safetensors.*--lora-alpha"):
        command(monkeypatch, "convert", file, tmp_path / "x.safetensors", "--format", "kohya")
    command(monkeypatch, "inspect", file)
    assert "alpha not said" in capsys.readouterr().out
    command(monkeypatch, "convert", file, tmp_path / "x.safetensors", "--format", "kohya", "--alpha", 4)
    again, _ = reloaded(family, tmp_path / "x.safetensors")
    assert_same(deltas(again), deltas(dit))


# ------------------------------------------------------------------------------------------ the commands
@pytest.fixture
def folders(tiny, tiny_wan):
    """A tiny checkpoint of each family."""
    return {CogVideoXDiT: tiny, WanDiT: tiny_wan}


def adapted(folder, dtype=torch.float32):
    dit = weights.load_backbone(folder, dtype=dtype, parts=("dit",), log=quiet).dit
    return randomised(dit, [(4, 3.0, dit.lora_targets)])


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_loads_a_merged_transformer(family, dtype, folders, tmp_path, monkeypatch, capsys):
    kind, base, file = type(stock(family)), tmp_path / "base", tmp_path / "a.safetensors"
    backbone, base = weights.load_backbone(folders[family], log=quiet), shutil.copytree(folders[family], base)
    part = backbone.layout.parts["dit"]
    save_module(backbone.dit, part.names, base / part.folder / part.file, dtype)
    dit = adapted(base, dtype)
    weights.save_adapter(dit, file, "comfyui")
    command(monkeypatch, "merge", file, tmp_path / "out", "--backbone", base)
    assert "scale 0.75" in capsys.readouterr().out
    merged, loading = kind.from_pretrained(
        tmp_path / "out", subfolder="transformer", output_loading_info=True, torch_dtype=dtype
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    merge_lora(dit)
    table = formats.LAYER_NAMES[family]["diffusers"]
    for name, tensor in merged.state_dict().items():
        wanted = dit.get_parameter(rename(name, table))
        assert torch.equal(tensor.to(dtype), wanted.to(dtype)), name
    stored = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert not list((tmp_path / "out" / "transformer").glob(".*"))
    (tmp_path / "killed/transformer").mkdir(parents=True)
    (tmp_path / "killed/transformer/.a.tmp").touch()
    command(monkeypatch, "merge", file, tmp_path / "killed", "--backbone", base)
    monkeypatch.setattr("weights.adapter.load_backbone", None)  # 11 GB that are not read before a refusal
    with pytest.raises(SystemExit, match="not empty"):
        command(monkeypatch, "merge", file, tmp_path / "out", "--backbone", base)
    with pytest.raises(SystemExit, match="a.safetensors/transformer: a file stands in the way"):
        command(monkeypatch, "merge", file, file, "--backbone", base)


def test_each_tensor_of_a_merged_transformer_has_the_dtype_that_it_had(folders, tmp_path, monkeypatch):
    base, file = shutil.copytree(folders[WanDiT], tmp_path / "base"), tmp_path / "a.safetensors"
    whole = base / "transformer" / wan.DIT_FILE
    norms = {"scale_shift_table", "time", "norm"}  # diffusers keeps these in fp32 when it saves in bf16
    norms |= {"patch_embedding"}  # has no LoRA: what is stored in fp32 is not rounded on the way
    mixed = {
        name: tensor if any(word in name for word in norms) else tensor.bfloat16()
        for name, tensor in load_file(whole).items()
    }
    save_file(mixed, whole, {"format": "pt"})
    weights.save_adapter(adapted(base), file)
    command(monkeypatch, "merge", file, tmp_path / "out", "--backbone", base)
    merged = load_file(tmp_path / "out/transformer" / wan.DIT_FILE)
    assert {name: x.dtype for name, x in merged.items()} == {name: x.dtype for name, x in mixed.items()}
    assert len({x.dtype for x in merged.values()}) == 2
    assert torch.equal(merged["patch_embedding.weight"], mixed["patch_embedding.weight"])


def test_an_alpha_that_is_given_reaches_what_is_converted_and_merged(folders, tmp_path, monkeypatch):
    base, file, converted = folders[WanDiT], tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    dit = adapted(base)
    weights.save_adapter(dit, file)
    save_file(load_file(file), file, {"format": "pt"})  # of another tool: no alpha
    more = "--backbone", base, "--alpha", 6  # twice what it had
    wanted = {path: 2 * delta for path, delta in deltas(dit).items()}
    command(monkeypatch, "convert", file, converted, "--format", "kohya", *more)
    assert_same(deltas(reloaded(WanDiT, converted)[0]), wanted)
    command(monkeypatch, "merge", file, tmp_path / "out", *more)
    merged = load_file(tmp_path / "out" / "transformer" / wan.DIT_FILE)["blocks.0.attn1.to_q.weight"]
    torch.testing.assert_close(merged, dit.blocks[0].attn.q.weight + wanted["blocks.0.attn.q"])


def test_a_backbone_that_is_named_says_of_which_model_a_file_is_and_what_it_lacks(
    folders, tmp_path, monkeypatch
):
    file, converted, stem = tmp_path / "a.safetensors", tmp_path / "b.safetensors", "transformer.proj_out"
    last = adapted(folders[CogVideoXDiT]).proj_out  # both models have a layer of this name
    a, b = torch.randn(4, last.in_features), torch.randn(last.out_features, 4)
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, file)
    more = "--alpha", 4, "--backbone", folders[CogVideoXDiT]
    command(monkeypatch, "convert", file, converted, "--format", "diffusers", *more)
    assert formats.read(converted, CogVideoXDiT).updates.keys() == {"proj_out"}
    weights.save_adapter(randomised(build(WanDiT), [(2, 2.0, ("attn.q",))]), file, "kohya")
    save_file({key.replace("blocks_1", "blocks_7"): x for key, x in load_file(file).items()}, file)
    with pytest.raises(SystemExit, match="blocks.7.attn.q of the model is not in it"):
        command(monkeypatch, "inspect", file, "--backbone", folders[WanDiT])


@FAMILIES
def test_the_mean_of_two_adapters_adds_the_mean_of_their_updates(family, tmp_path, monkeypatch):
    """In another format, of another rank and strength, and without some layers; cut as float64's SVD cuts."""
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "mean.safetensors"
    one, other = plain(family), mixed(family, NOT_VISUAL)
    weights.save_adapter(one, files[0])
    weights.save_adapter(other, files[1], "kohya")
    found, lacking = deltas(one), deltas(other)
    wanted = {path: (x + lacking.get(path, torch.zeros_like(x))) / 2 for path, x in found.items()}
    command(monkeypatch, "mean", *files)
    assert_same(deltas(reloaded(family, files[2])[0]), wanted)
    narrow = tmp_path / "narrow.safetensors"
    command(monkeypatch, "mean", *files[:2], narrow, "--rank", 2)
    for path, delta in deltas(reloaded(family, narrow)[0]).items():
        exact = wanted[path].double().flatten(1)
        least = torch.linalg.svdvals(exact)[2:].norm()  # no other of rank 2 is nearer (Eckart and Young)
        assert (delta.double().flatten(1) - exact).norm() <= least + 1e-6 * exact.norm()
    A, B = adapter.strongest(torch.randn(8, 3), torch.randn(5, 8), 6)  # more than a narrow layer has
    assert A.shape == (3, 3) and B.shape == (5, 3)


def test_what_has_no_mean_and_where_none_may_be_written(tmp_path, monkeypatch):
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "mean.safetensors"
    for file in files[:2]:
        weights.save_adapter(plain(WanDiT), file)
    monkeypatch.chdir(tmp_path)
    before = files[1].read_bytes()
    for words, said in (
        (files[:2], "name two adapters or more"),  # a forgotten target would be the last adapter
        ((*files[:2], files[1]), "is there already"),
        ((*files[:2], "b.safetensors"), "is there already"),
        ((*files, "--rank", 0), "rank 0"),
    ):
        with pytest.raises(SystemExit, match=said):
            command(monkeypatch, "mean", *words)
    assert files[1].read_bytes() == before
    weights.save_adapter(plain(WanDiT), tmp_path / "peft", "peft")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="peft is a folder with"):
        patch.setattr("weights.adapter.mean_adapter", None)  # minutes of singular values, not before this
        command(patch, "mean", "peft", files[0], "new.safetensors")
    key, good = "transformer.blocks.0.attn1.to_q.lora_%s.weight", load_file(files[1])
    with safe_open(files[1], "pt") as opened:
        metadata = opened.metadata()
    for half, x in (("A", good[key % "A"][:, :64]), ("B", good[key % "B"][:64])):
        save_file(good | {key % half: x.contiguous()}, files[1], metadata)
        with pytest.raises(SystemExit, match=r"b\.safetensors: blocks\.0\.attn\.q is of another size"):
            command(monkeypatch, "mean", *files)
    weights.save_adapter(plain(CogVideoXDiT), files[1])
    for order, said in ((files[:2], r"b\.safetensors: is"), (files[1::-1], r"a\.safetensors: is")):
        with pytest.raises(SystemExit, match=f"{said} of another backbone"):
            command(monkeypatch, "mean", *order, files[2])
    assert not files[2].exists()


def test_a_mean_has_the_layers_of_all_and_the_rank_and_dtype_that_are_asked_for(tmp_path, monkeypatch):
    files, whole = (tmp_path / "a.safetensors", tmp_path / "b.safetensors"), tmp_path / "whole.safetensors"
    few, many = mixed(WanDiT, NOT_VISUAL), plain(WanDiT)  # ranks 2 to 4, and 6 in more layers
    weights.save_adapter(few, files[0], "kohya")
    weights.save_adapter(many, files[1])
    command(monkeypatch, "mean", *files, whole)
    assert formats.read(whole).updates.keys() == lora_modules(many).keys()
    assert formats.read(whole).format == "kohya"
    for rank in (1, 5, 7, 99):
        target = tmp_path / f"{rank}.safetensors"
        command(monkeypatch, "mean", *files, target, "--rank", rank, "--dtype", "bfloat16")
        for path, update in formats.read(target).updates.items():
            most = 6 + (lora_modules(few)[path].rank if path in lora_modules(few) else 0)
            assert update.rank == min(rank, most) and update.A.dtype == update.B.dtype == torch.bfloat16


def test_a_mean_keeps_what_its_adapters_act_on_and_where_the_reference_is(tmp_path, monkeypatch):
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "mean.safetensors"
    dit = mixed(WanDiT, NOT_VISUAL)
    act_on_reference(dit)
    place_reference(dit, "beside")
    for file in files[:2]:
        weights.save_adapter(dit, file)
    command(monkeypatch, "mean", *files)
    again, _ = reloaded(WanDiT, files[2])
    assert again.ref_position == "beside" and acts_on(again) == "ref"
    place_reference(dit, "far")  # where a file without notes has it
    weights.save_adapter(dit, files[0])
    save_file(load_file(files[0]), files[1], {"format": "pt"})  # acts on all tokens
    for order in (files[:2], files[1::-1]):
        with pytest.raises(SystemExit, match="has lora_tokens (all|ref), others (all|ref)"):
            command(monkeypatch, "mean", *order, tmp_path / "other.safetensors", "--lora-alpha", 4)


def test_a_strength_is_given_to_the_adapters_of_a_mean_that_do_not_say_it(tmp_path, monkeypatch):
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "mean.safetensors"
    one, other = plain(WanDiT), plain(WanDiT)
    weights.save_adapter(one, files[0])
    weights.save_adapter(other, files[1])
    save_file(load_file(files[1]), files[1], {"format": "pt"})  # of another tool: no alpha, no notes
    with pytest.raises(SystemExit, match=r"b\.safetensors.*--lora-alpha"):
        command(monkeypatch, "mean", *files)
    command(monkeypatch, "mean", *files, "--lora-alpha", 12)  # three times what it had
    wanted = {path: (x + 3 * deltas(other)[path]) / 2 for path, x in deltas(one).items()}
    assert_same(deltas(reloaded(WanDiT, files[2])[0]), wanted)
    place_reference(one, "leading")  # the other one loads as "far"
    weights.save_adapter(one, files[0])
    for order in (files[:2], files[1::-1]):
        with pytest.raises(SystemExit, match="has ref_position (far|leading), others (far|leading)"):
            command(monkeypatch, "mean", *order, tmp_path / "other.safetensors", "--lora-alpha", 12)


def test_a_half_precision_transformer_stays_one_when_merged(folders, tmp_path, monkeypatch):
    base, file = shutil.copytree(folders[WanDiT], tmp_path / "base"), tmp_path / "a.safetensors"
    whole = base / "transformer" / wan.DIT_FILE
    save_file({name: tensor.half() for name, tensor in load_file(whole).items()}, whole, {"format": "pt"})
    dit = adapted(base)
    weights.save_adapter(dit, file)
    command(monkeypatch, "merge", file, tmp_path / "out", "--backbone", base)
    merged = load_file(tmp_path / "out/transformer" / wan.DIT_FILE)
    assert {x.dtype for x in merged.values()} == {torch.float16}
    for module in lora_modules(dit).values():
        module.lora_B.data *= 1e6  # more than half precision holds
    weights.save_adapter(dit, file)
    with pytest.raises(SystemExit, match=r"a\.safetensors: blocks.* not finite in torch\.float16"):
        command(monkeypatch, "merge", file, tmp_path / "more", "--backbone", base)
    assert not (tmp_path / "more").exists()


def test_a_merged_wan_has_the_reference_where_its_adapter_had_it(folders, tmp_path, monkeypatch):
    base, file = folders[WanDiT], tmp_path / "a.safetensors"
    dit = adapted(base)
    place_reference(dit, "beside")
    weights.save_adapter(dit, file)
    command(monkeypatch, "merge", file, tmp_path / "out", "--backbone", base)
    whole = shutil.copytree(base, tmp_path / "whole")
    shutil.copytree(tmp_path / "out", whole, dirs_exist_ok=True)
    merged = weights.load_backbone(whole, parts=("dit",), log=quiet).dit
    assert merged.ref_position == "beside"
    type(stock(WanDiT)).from_pretrained(whole, subfolder="transformer")  # which warns, and reads it
    rng = torch.Generator().manual_seed(0)
    x, ref = (torch.randn(1, dit.cfg.channels, n, 4, 4, generator=rng) for n in (3, 1))
    inputs = x, torch.tensor([500.0]), torch.randn(1, 5, dit.cfg.text_dim, generator=rng), ref
    with torch.no_grad():
        assert relative_error(merged(*inputs), dit(*inputs)) < 1e-6


def test_wans_original_layout_is_merged_in_its_own_names(folders, tmp_path, monkeypatch):
    base, file = tmp_path / "base", tmp_path / "a.safetensors"
    shutil.copytree(folders[WanDiT] / "tokenizer", base / "google" / "umt5-xxl")
    config = {
        "model_type": "ti2v",
        "dim": 128,
        "num_heads": 2,
        "num_layers": 2,
        "ffn_dim": 256,
        "freq_dim": 64,
    }
    config |= {"_class_name": "WanModel", "in_dim": 48, "out_dim": 48}
    (base / "config.json").write_text(json.dumps(config))
    module = weights.open_backbone(base).parts["dit"].build()
    save_module(module, wan.DIT_NAMES_ORIGINAL, base / wan.DIT_FILE, torch.float32)
    dit = adapted(base)
    weights.save_adapter(dit, file)
    command(monkeypatch, "merge", file, tmp_path / "out", "--backbone", base)
    merge_lora(dit)
    stored = load_file(tmp_path / "out" / wan.DIT_FILE)
    assert stored.keys() == load_file(base / wan.DIT_FILE).keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, dit.get_parameter(rename(name, wan.DIT_NAMES_ORIGINAL))), name
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_lora_on_the_reference_alone_is_not_merged(folders, tmp_path, monkeypatch):
    dit, file, out = mixed(WanDiT, NOT_VISUAL), tmp_path / "a.safetensors", tmp_path / "out"
    act_on_reference(dit)
    weights.save_adapter(dit, file)
    monkeypatch.setattr("weights.adapter.load_backbone", None)  # found before
    with pytest.raises(SystemExit, match=r"a\.safetensors: .* cannot be merged"):
        command(monkeypatch, "merge", file, out, "--backbone", folders[WanDiT])
    monkeypatch.setattr("weights.load_backbone", None)
    options = {"--backbone": folders[WanDiT], "--adapter": file, "--prompt": "a dog", "--out": tmp_path}
    with pytest.raises(ValueError, match=r"a\.safetensors: .* cannot be merged"):
        run(monkeypatch, sample, options | {"--merge": ""})
    assert not out.exists()


@FAMILIES
def test_inspect_prints_what_is_there(family, folders, tmp_path, monkeypatch, capsys):
    dit, file = adapted(folders[family]), tmp_path / "a.safetensors"
    weights.save_adapter(dit, file, "kohya")
    command(monkeypatch, "inspect", file, "--backbone", folders[family])
    report = capsys.readouterr().out
    assert f"kohya, {formats.label(family)}" in report
    assert f"{len(lora_modules(dit))} modules, rank 4, alpha 3 (from the file), scale 0.75" in report
    place = "far" if family is WanDiT else "leading"
    assert "float32" in report and f"ref_position {place}, lora_tokens all" in report
    norms = [module.delta().norm() for path, module in lora_modules(dit).items() if path.endswith("attn.q")]
    row = next(line.split() for line in report.splitlines() if line.split()[:1] == ["attn.q"])
    assert int(row[1]) == 2
    assert float(row[2]) == pytest.approx(sum(norms).item() / 2, rel=1e-3)
    assert float(row[3]) == pytest.approx(max(norms).item(), rel=1e-3)


# ------------------------------------------------------------------------------------------ bad input
Q = "diffusion_model.blocks.0.self_attn.q"


def flawed():
    (a, b), good = lora_pair(), "diffusion_model.blocks.1.self_attn.q"
    one = {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}
    two = one | {f"{good}.lora_A.weight": a, f"{good}.lora_B.weight": b}
    flat = "lora_unet_blocks_0_self_attn_q"
    kohya = {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
    return {
        "empty": ({}, {}, "no tensors"),
        "dora": (one | {f"{Q}.dora_scale": b[:, :1]}, {}, "is DoRA"),
        "lokr": ({f"{Q}.lokr_w1": a}, {}, "LoKr"),
        "bias": (two | {f"{Q}.diff_b": b[:, 0]}, {}, "1 of 5 keys, is a change of a whole weight or bias"),
        "other model": ({"transformer.single_blocks.0.q.lora_A.weight": a}, {}, "no layer of this model"),
        "no lora": ({"blocks.0.self_attn.q.weight": a}, {}, "names of a model's weights: no adapter"),
        "twice": (one | {f"{Q}.lora_down.weight": a}, {}, "second A"),
        "ranks": ({f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b[:, :3]}, {}, r"A of shape \[4, 128\]"),
        "integers": ({f"{Q}.lora_A.weight": a.to(torch.int8), f"{Q}.lora_B.weight": b}, {}, "torch.int8"),
        "alphas": (one | {f"{Q}.alpha": torch.ones(3)}, {}, "alpha of .* is not one number"),
        "alpha nan": (one | {f"{Q}.alpha": torch.tensor(float("nan"))}, {}, "alpha of .* is not one number"),
        "alpha complex": (one | {f"{Q}.alpha": torch.tensor(1j)}, {}, "alpha of .* is not one number"),
        "alpha alone": (two | {"diffusion_model.blocks.1.ffn.0.alpha": torch.ones(())}, {}, "only one of"),
        "no alpha": (kohya, {}, "does not say its alpha"),
        "some alpha": (kohya | {k.replace("_0_", "_1_"): v for k, v in kohya.items()}
                       | {f"{flat}.alpha": torch.ones(())}, {}, "does not say its alpha"),
        "json": (one, {"lora_adapter_metadata": "{"}, "no JSON object"),
        "json list": (one, {"lora_adapter_metadata": "[1]"}, "no JSON object"),
        "json alpha": (one, {"lora_adapter_metadata": '{"lora_alpha": "much"}'}, "broken lora_alpha"),
        "place": (one, {"ref_position": "behind"}, "'behind'"),
        "norm": ({"diffusion_model.blocks.0.norm3.lora_A.weight": a,
                  "diffusion_model.blocks.0.norm3.lora_B.weight": b}, {}, "can hold no LoRA"),
        "sat": ({"model.diffusion_model.mixins.lora.0.query.matrix_A.0": a}, {}, "SAT"),
        "whole weight": ({f"{Q}.diff": a}, {}, "a change of a whole weight"),
        "inside a name": ({"diffusion_model.blocks.0.self_attn.diffuse.lora_A.weight": a}, {}, "no layer"),
        "image model": ({"model.diffusion_model.input_blocks.1.q.lora_A.weight": a}, {}, "no layer"),
        "text": ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": a}, {}, "text encoder"),
        "dora behind": ({"diffusion_model.other.lora_A.weight": a, f"{Q}.dora_scale": b}, {}, "is DoRA"),
        "oft": ({f"{Q}.oft_blocks": a}, {}, "OFT"),
        "bias of B": ({"base_model.model.blocks.0.attn1.to_q.lora_B.bias": b}, {}, "a change of a bias"),
    }  # fmt: skip


FOUND_WITH_THE_MODEL = ("no alpha", "some alpha", "place", "norm")  # the others by the file alone too


@pytest.mark.parametrize("flaw", flawed())
def test_bad_files_give_one_error_with_file_and_reason(flaw, tmp_path):
    tensors, metadata, match = flawed()[flaw]
    copies = {key: tensor.clone() for key, tensor in tensors.items()}
    file, said = tmp_path / "bad.safetensors", rf"bad\.safetensors: .*{match}"
    save_file(copies, file, {"format": "pt", **metadata})
    with pytest.raises(ValueError, match=said):
        weights.load_adapter(build(WanDiT), file)
    if flaw not in FOUND_WITH_THE_MODEL:
        with pytest.raises(ValueError, match=said):
            formats.read(file)


def test_a_peft_folder_that_could_not_be_replaced_has_no_wrong_strength(tmp_path, monkeypatch):
    """A LoRA of alpha 8 is replaced by one of alpha 64. On a full disk the old one stays as it was; stopped
    between the weights and their settings, the new one has to be told its alpha."""
    old, new = (randomised(build(WanDiT), [(8, alpha, ("attn.q",))]) for alpha in (8.0, 64.0))
    weights.save_adapter(old, tmp_path / "peft", "peft")
    with full_disk(2000), pytest.raises(OSError, match="adapter_model.safetensors: could not be written"):
        weights.save_adapter(new, tmp_path / "peft", "peft")
    assert "alpha 8" in weights.load_adapter(build(WanDiT), tmp_path / "peft")
    with pytest.raises(ValueError, match="adapter_config.json beside it; name another file"):
        weights.save_adapter(new, tmp_path / "peft/adapter_model.safetensors", "diffusers")

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(formats, "write_text", stopped)
        weights.save_adapter(new, tmp_path / "peft", "peft")
    assert formats.read(tmp_path / "peft").alpha_from == ""
    weights.save_adapter(new, tmp_path / "peft", "peft")
    assert "alpha 64" in weights.load_adapter(build(WanDiT), tmp_path / "peft")


def test_other_misuse_gives_one_error(tmp_path, monkeypatch):
    dit, a, b = plain(CogVideoXDiT), *lora_pair()
    with pytest.raises(ValueError, match="format 'gguf': known are .*kohya"):
        weights.save_adapter(dit, tmp_path / "a.safetensors", "gguf")
    with pytest.raises(ValueError, match="name a folder"):
        weights.save_adapter(dit, tmp_path / "a.safetensors", "peft")
    with pytest.raises(ValueError, match="kohya is one file"):
        weights.save_adapter(dit, tmp_path, "kohya")
    with pytest.raises(ValueError, match="diffsynth has no place for the LoRA of patch_in in CogVideoX"):
        weights.save_adapter(dit, tmp_path / "a.safetensors", "diffsynth")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="a folder as peft writes it"):
        weights.load_adapter(build(WanDiT), tmp_path)
    with pytest.raises(ValueError, match="already has a LoRA"):
        weights.load_adapter(dit, tmp_path / "a.safetensors")
    # A layer that both models have by one name.
    keys = {"transformer.proj_out.lora_A.weight": a, "transformer.proj_out.lora_B.weight": b[:16]}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4})}
    save_file({key: tensor.clone() for key, tensor in keys.items()}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(SystemExit, match="fit CogVideoX and Wan; say --backbone"):
        command(monkeypatch, "convert", tmp_path / "a.safetensors", tmp_path / "b", "--format", "kohya")
    assert "1 modules" in weights.load_adapter(build(CogVideoXDiT), tmp_path / "a.safetensors")
