"""Adapters that are not plain LoRA, or not finite: read as peft applies them, or refused with the reason."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import weights
from helpers import TINY_DIT, build, lora_pair, relative_error
from sdv.lora import add_lora, lora_modules, merge
from sdv.models.cogvideox_dit import CogVideoXDiT
from sdv.models.layers import is_finite
from sdv.models.wan_dit import WanDiT
from weights import cogvideox, formats, peft_settings
from weights.tensors import rename


# ------------------------------------------------------------------------------------------ beside peft
@pytest.fixture(scope="module")
def bases():
    """Stock transformers of one and the same weights."""
    peft, diffusers = pytest.importorskip("peft"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    first = diffusers.CogVideoXTransformer3DModel(**TINY_DIT)

    def base():
        model = diffusers.CogVideoXTransformer3DModel(**TINY_DIT)
        model.load_state_dict(first.state_dict())
        return model

    return peft, base


def folder_of(bases, path, **config):
    """What peft saves for a LoRA with random numbers."""
    peft, base = bases
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_k"]} | config
    model = peft.get_peft_model(base(), peft.LoraConfig(**config))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


def their_updates(bases, path):
    """(the adapted layer)(x) - (the base's)(x) for x = 1, in peft: {our layer: the update of its weight}."""
    peft, base = bases
    clean = base()
    model = peft.PeftModel.from_pretrained(base(), path).eval().base_model.model
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            eye = torch.eye(layer.in_features)
            with torch.no_grad():
                delta = (layer(eye) - clean.get_submodule(name)(eye)).T
            found[rename(f"{name}.weight", cogvideox.DIT_NAMES).removesuffix(".weight")] = delta
    return found


PLAIN = {
    "default": {}, "true": {"init_lora_weights": True}, "false": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"}, "eva": {"init_lora_weights": "eva"},
    "orthogonal": {"init_lora_weights": "orthogonal"}, "mica": {"init_lora_weights": "mica"},
    "rslora": {"use_rslora": True}, "dropout": {"lora_dropout": 0.3}, "fan": {"fan_in_fan_out": True},
    "patterns": {"rank_pattern": {"to_k": 2}, "alpha_pattern": {r"0\.attn1\.to_q": 5}},
    "rs patterns": {"use_rslora": True, "rank_pattern": {"to_k": 2}},
    "either pattern": {"alpha_pattern": {"to_q|to_k": 5}},
    "pattern of whole names": {
        "target_modules": ["to_q", "to_out.0"], "alpha_pattern": {"to_out": 5, "q": 7},
    },
    "first pattern": {"alpha_pattern": {"to_q": 5, r"0\.attn1\.to_q": 7}},
    "layers": {"layers_to_transform": [1], "layers_pattern": "transformer_blocks"},
    "excluded": {"exclude_modules": ["to_k"]}, "ignored": {"eva_config": {"rho": 2.0}},
    "parameters": {"target_modules": ["to_q"], "target_parameters": ["blocks.0.attn1.to_k.weight"]},
}  # fmt: skip
CHANGED = {
    "pissa": {"init_lora_weights": "pissa"}, "pissa fast": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"}, "dora": {"use_dora": True}, "bias": {"lora_bias": True},
    "alora": {"alora_invocation_tokens": [5, 6]}, "kasa": {"kasa_config": {}},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PLAIN)
def test_what_only_says_how_it_was_trained_has_pefts_update(bases, kind, tmp_path):
    folder_of(bases, tmp_path / "folder", **PLAIN[kind])
    dit = build()
    weights.load_adapter(dit, tmp_path / "folder")
    ours, theirs = lora_modules(dit), their_updates(bases, tmp_path / "folder")
    assert ours.keys() == theirs.keys()
    for path, module in ours.items():
        assert relative_error(module.delta(), theirs[path]) <= 1e-6, path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CHANGED)
def test_what_is_more_than_a_and_b_is_another_update_in_peft_and_refused_here(bases, kind, tmp_path):
    change = CHANGED[kind]
    if kind == "kasa":
        from peft.tuners.lora.config import KasaConfig

        change = {"kasa_config": KasaConfig()}
    folder_of(bases, tmp_path / "folder", **change)
    tensors = load_file(tmp_path / "folder" / "adapter_model.safetensors")
    theirs = their_updates(bases, tmp_path / "folder")
    for ours, delta in theirs.items():
        name = formats._theirs(tmp_path, ours, "peft", CogVideoXDiT)
        a, b = (tensors[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
        assert relative_error(6 / 4 * (b @ a), delta) > 0.01
    with pytest.raises(ValueError, match=rf"folder/adapter_config.json: {next(iter(change))} = "):
        weights.load_adapter(build(), tmp_path / "folder")


@pytest.mark.filterwarnings("ignore")
def test_a_pissa_that_peft_turned_into_a_plain_lora_is_read(bases, tmp_path):
    """As its error says: peft subtracts the start, at twice the rank."""
    peft, base = bases
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], init_lora_weights="pissa")
    model = peft.get_peft_model(base(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    dit = build()
    assert "rank 8" in weights.load_adapter(dit, tmp_path / "end")
    theirs = their_updates(bases, tmp_path / "end")
    for path, module in lora_modules(dit).items():
        assert relative_error(module.delta(), theirs[path]) <= 1e-6


def test_every_field_that_peft_has_was_judged():
    peft = pytest.importorskip("peft")
    details = {"lora_alpha", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision"}
    details |= {"task_type", "base_model_name_or_path"}  # numbers and words that turn nothing on
    rules = {"peft_type", "bias", "init_lora_weights", "use_rslora"}
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields - peft_settings.HARMLESS - peft_settings.REASONS.keys() == rules - {"use_rslora"} | details


# -------------------------------------------------------------------------------- settings, word for word
Q = "transformer_blocks.0.attn1.to_q"


def peft_folder(path, config):
    a, b = lora_pair()
    path.mkdir()
    keys = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"
    save_file(dict(zip(keys, (a, b), strict=True)), path / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 4} | config
    (path / "adapter_config.json").write_text(json.dumps(content))
    return path, path / "adapter_config.json"


def diffusers_file(path, config):
    a, b = lora_pair()
    settings = {
        f"transformer.{field}": value for field, value in ({"r": 4, "lora_alpha": 4} | config).items()
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    tensors = {f"transformer.{Q}.lora_A.weight": a, f"transformer.{Q}.lora_B.weight": b}
    save_file(tensors, path.with_suffix(".safetensors"), metadata)
    return path.with_suffix(".safetensors"), path.with_suffix(".safetensors")


BOTH = pytest.mark.parametrize("make", [peft_folder, diffusers_file])


@BOTH
@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "LOHA"}, {"peft_type": "ADALORA"}, {"bias": "all"}, {"bias": "lora_only"},
        {"modules_to_save": ["proj_out"]}, {"layer_replication": [[0, 1], [0, 1]]}, {"use_dora": True},
        {"use_dora": 1}, {"use_dora": "true"}, {"init_lora_weights": "PiSSA"}, {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"}, {"init_lora_weights": "lora_ga"}, {"init_lora_weights": "olora"},
        {"init_lora_weights": ["pissa"]}, {"init_lora_weights": "something"}, {"use_qalora": True},
        {"velora_config": {"num_groups": 4}}, {"monteclora_config": {"num_samples": 8}},
        {"use_bdlora": {"nblocks": 2}}, {"arrow_config": {"top_k": 3}}, {"trainable_token_indices": [1]},
        {"use_tomorrow": True}, {"tomorrow_config": {"a": 1}}, {"tomorrow_layers": [1]},
        {"use_rslora": "false"},
        {"lora_alpha": math.nan}, {"lora_alpha": -math.inf}, {"lora_alpha": 10**400}, {"lora_alpha": [4]},
        {"lora_alpha": 1e300}, {"alpha_pattern": {"to_q": math.inf}}, {"alpha_pattern": {"(": 3}},
        {"alpha_pattern": [1]}, {"rank_pattern": {"to_q": 5}}, {"r": 8},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_make_it_another_update_are_refused_with_file_and_field(make, config, tmp_path):
    source, named = make(tmp_path / "a", config)
    with pytest.raises(ValueError) as error:
        weights.load_adapter(build(), source)
    field = next(iter(config))
    wanted = "alpha" if "alpha" in field else "rank" if field in ("r", "rank_pattern") else f"{field} = "
    assert wanted in str(error.value)
    assert str(source if wanted in ("alpha", "rank") else named) in str(error.value)


@BOTH
def test_settings_that_turn_nothing_on_are_taken(make, tmp_path):
    config = {
        "use_dora": False, "bias": "none", "modules_to_save": None, "layer_replication": [],
        "init_lora_weights": "Gaussian", "auto_mapping": {"base_model_class": "x"}, "peft_version": "9.9",
        "megatron_core": "megatron.core", "qalora_group_size": 16, "tomorrow_size": 3, "use_tomorrow": False,
        "tomorrow_config": None, "inference_mode": True, "loftq_config": {"loftq_bits": 4}, "task_type": "X",
        "target_modules": ["to_q"], "exclude_modules": ["to_v"], "lora_alpha": 4.0, "r": 4.0,
    }  # fmt: skip
    dit = build()
    assert "scale 1" in weights.load_adapter(dit, make(tmp_path / "a", config)[0])
    a, b = lora_pair()
    assert relative_error(lora_modules(dit)["blocks.0.attn.q"].delta(), b @ a) <= 1e-6


def test_settings_of_other_parts_of_a_pipeline_are_not_the_transformers(tmp_path):
    config = {"lora_alpha": 4}
    source, _ = diffusers_file(tmp_path / "a", config)
    tensors, settings = load_file(source), {"transformer.lora_alpha": 8, "text_encoder.use_dora": True}
    save_file(tensors, source, {"lora_adapter_metadata": json.dumps(settings)})
    assert "scale 2" in weights.load_adapter(build(), source)


# ------------------------------------------------------------------------------------------- not finite
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_number_is_enough(value, dtype):
    for place in (0, 500, 999):
        tensor = torch.linspace(-3, 3, 1000).to(dtype)
        assert is_finite(tensor) and is_finite(tensor[:0])
        tensor[place] = value
        assert not is_finite(tensor) and not is_finite(tensor.view(10, 100))
    assert not is_finite(torch.tensor([1e300], dtype=torch.float64))
    assert is_finite(torch.tensor([torch.finfo(torch.float32).max]))
    assert not is_finite(torch.tensor([math.nan]).to(torch.float8_e5m2))


@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize("half", ["A", "B", "alpha"])
def test_nan_is_refused_by_layer_in_every_format(format, half, tmp_path):
    dit = build(WanDiT)
    add_lora(dit, 2, 4.0, ("attn.q",))
    for module in lora_modules(dit).values():
        module.lora_B.data.fill_(0.5)
    path = tmp_path / (format if format == "peft" else "a.safetensors")
    broken = lora_modules(dit)["blocks.1.attn.q"]
    if half == "alpha":
        weights.save_adapter(dit, path, format)
        with pytest.raises(ValueError, match=r"alpha of .*0.* is nan \(as asked\)"):
            weights.load_adapter(build(WanDiT), path, math.nan)
        broken.alpha = math.inf
        if formats.FORMATS[format].folded:
            with pytest.raises(ValueError, match="lora_B of blocks.1.attn.q is infinite"):
                weights.save_adapter(dit, path, format)
            return
    else:
        getattr(broken, f"lora_{half}").data[0, 0] = math.nan
    if formats.FORMATS[format].folded and half == "B":
        with pytest.raises(ValueError, match="lora_B of blocks.1.attn.q is infinite"):
            weights.save_adapter(dit, path, format)
        return
    weights.save_adapter(dit, path, format)
    with pytest.raises(ValueError, match=str(path) + r".*1[._](self_)?attn") as error:
        weights.load_adapter(build(WanDiT), path)
    assert ("alpha" if half == "alpha" else f"lora_{half}") in str(error.value)


def test_a_scale_that_leaves_the_range_is_refused_where_it_is_folded_or_merged(tmp_path):
    dit = build(WanDiT)
    add_lora(dit, 1, 1e30, ("attn.q",))
    for module in lora_modules(dit).values():
        module.lora_B.data.fill_(1e10)
    weights.save_adapter(dit, tmp_path / "a.safetensors", "kohya")
    adapter = formats.read(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors: lora_B of blocks\.0\.attn\.q is infinite"):
        formats.write(adapter, tmp_path / "b.safetensors", "diffsynth")
    assert not (tmp_path / "b.safetensors").exists()
    before = lora_modules(dit)["blocks.0.attn.q"].weight.clone()
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q: with its LoRA, the weight is not finite"):
        merge(dit)
    assert torch.equal(lora_modules(dit)["blocks.0.attn.q"].weight, before)
