"""Configs of checkpoints: the libraries' defaults, and one error with file and field for what cannot be."""

import inspect
import json
import math
import resource
import shutil
import time
from collections.abc import Callable

import pytest
import torch
from sentencepiece import SentencePieceProcessor

import weights
from sdv.models.cogvideox_dit import CogVideoXDiT
from sdv.models.cogvideox_vae import CogVideoXVAE
from sdv.models.text import T5Encoder
from sdv.models.wan_dit import WanDiT
from sdv.models.wan_vae import WanVAE
from weights import cogvideox, wan
from weights import tiny as tiny_models
from weights.fields import Fields, Fixed, Flag, Row

PIECES = {  # a table, the class of a library that has its fields, what reads it, of which tiny model
    "cogvideox dit": (cogvideox.DIT_FIELDS, "CogVideoXTransformer3DModel", cogvideox.dit_config, "cogvideox"),
    "cogvideox vae": (cogvideox.VAE_FIELDS, "AutoencoderKLCogVideoX", cogvideox.vae_config, "cogvideox"),
    "cogvideox text": (cogvideox.T5_FIELDS, "T5Config", cogvideox.t5_config, "cogvideox"),
    "ddim": (cogvideox.SCHEDULE_FIELDS, "CogVideoXDDIMScheduler", cogvideox.schedule_from, "cogvideox"),
    "dpm": (cogvideox.SCHEDULE_FIELDS, "CogVideoXDPMScheduler", cogvideox.schedule_from, "cogvideox"),
    "wan dit": (wan.DIT_FIELDS, "WanTransformer3DModel", wan.dit_config, "wan"),
    "wan vae": (wan.VAE_FIELDS, "AutoencoderKLWan", wan.vae_config, "wan"),
    "wan text": (wan.UMT5_FIELDS, "UMT5Config", wan.umt5_config, "wan"),
    "unipc": (wan.UNIPC_FIELDS, "UniPCMultistepScheduler", wan.schedule_from, "wan"),
    "euler": (wan.EULER_FIELDS, "FlowMatchEulerDiscreteScheduler", wan.schedule_from, "wan"),
}
FILES = {"dit": "transformer", "vae": "vae", "text": "text_encoder"}
ORIGINAL = {
    "_class_name": "WanModel", "model_type": "ti2v", "dim": 128, "num_heads": 2, "num_layers": 2,
    "ffn_dim": 256, "freq_dim": 64, "in_dim": 48, "out_dim": 48, "text_len": 512, "eps": 1e-6,
}  # fmt: skip


def good(piece: str) -> dict:
    _, name, _, family = PIECES[piece]
    part = FILES.get(piece.split()[-1])
    if part:
        return dict(tiny_models.FAMILIES[family][f"{part}/config.json"])
    if piece == "euler":
        return {"_class_name": name}
    return tiny_models.FAMILIES[family]["scheduler/scheduler_config.json"] | {"_class_name": name}


def table_of(piece: str) -> tuple[Fields, Callable[[dict], object], dict]:
    """A table, what reads it, and a config that it reads; of Wan's original layout too."""
    if piece == "original":
        return wan.ORIGINAL_DIT_FIELDS, wan.original_dit_config, ORIGINAL
    return PIECES[piece][0], PIECES[piece][2], good(piece)


@pytest.mark.parametrize("piece", PIECES)
def test_every_default_is_the_librarys(piece):
    fields, name, _, _ = PIECES[piece]
    library = pytest.importorskip("transformers" if name.endswith("5Config") else "diffusers")
    kind = getattr(library, name)
    if name.endswith("5Config"):
        theirs = kind().to_dict()
    else:
        parameters = inspect.signature(kind.__init__).parameters.values()
        theirs = {parameter.name: parameter.default for parameter in parameters}
    # The latents' statistics have a default in diffusers, Wan 2.1's; ours must be said. The reference's place
    # is a field of ours alone.
    left_out = {"_class_name", "latents_mean", "latents_std", "invert_scale_latents", "ref_position"}
    for field in fields.keys() - left_out:
        ours = fields[field].default
        ours, default = (list(x) if isinstance(x, tuple) else x for x in (ours, theirs[field]))
        assert ours == default and isinstance(ours, bool) == isinstance(default, bool), field


# ---------------------------------------------------------------------------------------------- one field
WRONG = (-1, 0, 1, 3, 2.5, 10**6, 10**20, 1e308, math.nan, -math.inf, 10**400, "x", "8", None, [], {}, True)
WRONG += ([1, 2], [None], ["1", 2, 2], [1, 2, 10**9], "x" * 10**6)


@pytest.mark.parametrize("piece", [*PIECES, "original"])
def test_a_value_that_cannot_be_is_one_error_with_its_field(piece):
    fields, convert, config = table_of(piece)
    convert(config)
    refused = 0
    for field in fields:
        for value in WRONG:
            try:
                convert(config | {field: value})
            except ValueError as error:
                refused += 1
                assert field in str(error) or "another sampler's" in str(error), (field, value)
                assert len(str(error)) < 400
            else:
                assert could_be(fields[field], value), (field, value)
        missing = {name: other for name, other in config.items() if name != field}
        try:
            convert(missing)
        except ValueError as error:
            assert field in str(error)
    assert refused > 15 * len(fields)


def could_be(row: Row, value: object) -> bool:
    """Whether a value that was taken has the type of the field."""
    if isinstance(row.kind, Fixed):
        return value == row.kind.wanted
    if isinstance(row.kind, Flag):
        return isinstance(value, bool)
    if value is None or isinstance(value, list):
        return row.default is None or isinstance(row.default, tuple)
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 2**22


@pytest.mark.parametrize(
    ("piece", "change", "field"),
    [
        ("cogvideox dit", {"attention_head_dim": 40}, "attention_head_dim = 40.*multiple of 16"),
        ("cogvideox dit", {"sample_height": 9}, "sample_height = 9 .*patch_size = 2"),
        ("cogvideox dit", {"_class_name": "LTXVideoTransformer3DModel"}, "_class_name = 'LTX.*CogVideoX-5B"),
        ("cogvideox vae", {"block_out_channels": [16, 33]}, "block_out_channels"),
        ("cogvideox vae", {"norm_num_groups": 7}, "norm_num_groups"),
        ("cogvideox vae", {"temporal_compression_ratio": 3}, "temporal_compression_ratio"),
        ("cogvideox text", {"relative_attention_num_buckets": 2}, "relative_attention_num_buckets = 2"),
        ("cogvideox text", {"relative_attention_max_distance": 8}, "relative_attention_max_distance = 8"),
        ("ddim", {"beta_start": 0.4, "beta_end": 0.1}, "beta_end = 0.1"),
        ("ddim", {"num_train_timesteps": 3}, "num_train_timesteps = 3"),
        ("wan dit", {"patch_size": [1, 2, 4]}, "patch_size"),
        ("wan dit", {"attention_head_dim": 33}, "attention_head_dim = 33"),
        ("wan vae", {"dim_mult": [1, 2]}, "dim_mult has 2 numbers"),
        ("wan vae", {"dim_mult": [1, 3, 4, 4]}, "dim_mult = "),
        ("wan vae", {"latents_std": [1.0] * 7 + [0.0]}, "latents_std"),
        ("wan vae", {"latents_mean": [0.0] * 7}, "latents_mean has 7"),
        ("wan vae", {"latents_std": [1.0]}, "latents_std has 1"),
        ("original", {"dim": 130, "num_heads": 4}, "dim = 130.*num_heads = 4"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_go_together_name_their_fields(piece, change, field):
    _, convert, config = table_of(piece)
    with pytest.raises(ValueError, match=field):
        convert(config | change)


# What other models and samplers have: by these fields they are told, and no field may leave its table.
OTHERS = {
    "cogvideox dit": {
        "use_rotary_positional_embeddings": (False, "2B"), "patch_size_t": (2, "1.5"),
        "in_channels": (16, "image-to-video"), "activation_fn": ("gelu", "supported"),
        "use_learned_positional_embeddings": (True, "image-to-video"),
    },
    "cogvideox text": {"model_type": ("umt5", "'t5'"), "feed_forward_proj": ("relu", "without a gate")},
    "ddim": {
        "_class_name": ("UniPCMultistepScheduler", "DPM"), "beta_schedule": ("linear", "scaled_linear"),
        "prediction_type": ("epsilon", "velocity"), "timestep_spacing": ("leading", "pure noise"),
        "trained_betas": ([0.1, 0.2], "of its own"), "set_alpha_to_one": (False, "last noise"),
    },
    "wan dit": {
        "_class_name": ("WanVACETransformer3DModel", "TI2V"), "image_dim": (1280, "image encoder"),
        "out_channels": (16, "image-to-video"), "patch_size": ([2, 2, 2], "one frame"),
        "qk_norm": (None, "rms_norm_across_heads"),
    },
    "wan vae": {
        "is_residual": (False, "True"), "patch_size": (None, "2"), "attn_scales": ([1.0], r"\[\]"),
    },
    "wan text": {"model_type": ("t5", "'umt5'")},
    "unipc": {
        "_class_name": ("CogVideoXDDIMScheduler", "UniPC"), "prediction_type": ("epsilon", "flow_prediction"),
        "use_flow_sigmas": (False, "True"), "solver_order": (3, "2"), "solver_type": ("bh1", "bh2"),
        "final_sigmas_type": ("sigma_min", "zero"), "use_karras_sigmas": (True, "False"),
        "disable_corrector": ([0], r"\[\]"),
    },
    "euler": {"stochastic_sampling": (True, "False")},
    "original": {"model_type": ("i2v", "TI2V")},
}  # fmt: skip


@pytest.mark.parametrize("piece", OTHERS)
def test_other_models_are_refused_by_the_field_that_tells_them_with_the_reason(piece):
    _, convert, config = table_of(piece)
    for field, (value, reason) in OTHERS[piece].items():
        with pytest.raises(ValueError, match=rf"{field} = .*{reason}"):
            convert(config | {field: value})


@pytest.mark.parametrize("piece", PIECES)
def test_strict_in_meaning_and_not_in_form(piece):
    """Integers written 2.0, tuples for lists, and fields that nobody reads."""
    config, convert = good(piece), PIECES[piece][2]
    loose = {"_diffusers_version": "0.42", "force_upcast": [{}], "dropout": "none"}
    for field, value in config.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        loose[field] = float(value) if whole else tuple(value) if isinstance(value, list) else value
    found = convert(loose)
    assert found == convert(config)
    assert repr(found).replace(".0,", ",") == repr(convert(config)).replace(".0,", ",")


def test_the_largest_that_is_taken_is_built_in_seconds():
    wide, norm = [2**17] * 8, {"latents_mean": [0.0] * 2**17, "latents_std": [1.0] * 2**17}
    deep = {"dim_mult": [1] * 8, "temperal_downsample": [True] * 7}
    builds = (
        lambda: CogVideoXDiT(cogvideox.dit_config(largest("cogvideox dit") | {"sample_frames": 49})),
        lambda: CogVideoXVAE(cogvideox.vae_config(largest("cogvideox vae") | {"block_out_channels": wide})),
        lambda: T5Encoder(cogvideox.t5_config(largest("cogvideox text"))),
        lambda: WanDiT(wan.dit_config(largest("wan dit") | {"patch_size": [1, 16, 16]})),
        lambda: WanVAE(wan.vae_config(largest("wan vae") | deep | norm)),
    )
    for build in builds:
        start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with torch.device("meta"):
            build()
        assert time.process_time() - start < 10
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def largest(piece: str) -> dict:
    """The greatest of every number, but for those that go together."""
    highs = {field: getattr(row.kind, "high", None) for field, row in PIECES[piece][0].items()}
    apart = {"temporal_compression_ratio", "norm_num_groups"}
    return good(piece) | {field: high for field, high in highs.items() if high and field not in apart}


# --------------------------------------------------------------------------------------------- whole folders
@pytest.fixture
def folders(tiny, tiny_wan):
    return {"cogvideox": tiny, "wan": tiny_wan}


@pytest.fixture(params=["cogvideox", "wan"])
def folder(request, folders, tmp_path):
    shutil.copytree(folders[request.param], tmp_path / "ck")
    return tmp_path / "ck"


DAMAGES = {
    "utf-16": lambda text: text.encode("utf-16"),
    "latin-1": lambda text: text.replace("{", '{"author": "Müller", ', 1).encode("latin-1"),
    "binary": lambda text: bytes(range(256)),
    "nested": lambda text: b'{"a": ' * 100_000,
    "nested list": lambda text: b"[" * 100_000,
    "digits": lambda text: b'{"num_layers": ' + b"9" * 5000 + b"}",
    "a list": lambda text: b"[1, 2]",
    "empty": lambda text: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_config_that_cannot_be_read_is_named(folder, damage):
    names = [f"{part}/config.json" for part in FILES.values()] + ["scheduler/scheduler_config.json"]
    for name in names:
        text = (folder / name).read_text()
        (folder / name).write_bytes(DAMAGES[damage](text))
        with pytest.raises(ValueError, match=name):
            weights.open_backbone(folder)
        (folder / name).write_text(text)


def test_a_byte_order_mark_is_no_damage(folder):
    wanted = weights.open_backbone(folder)
    for file in folder.glob("*/*config.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    found = weights.open_backbone(folder)
    assert (found.schedule, found.channels, found.frames) == (wanted.schedule, wanted.channels, wanted.frames)


def edited(folder, name, **fields):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | fields))


@pytest.mark.parametrize(
    ("name", "fields", "match"),
    [
        ("text_encoder/config.json", {"d_model": 32}, "64 features for a word, the text encoder 32"),
        ("transformer/config.json", {"in_channels": 4, "out_channels": 4}, "has 4 channels, the VAE 8"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused_before_their_weights(folder, name, fields, match):
    edited(folder, name, **fields)
    with pytest.raises(ValueError, match=match) as error:
        weights.open_backbone(folder)
    assert "ck" in str(error.value)


def test_a_text_encoder_has_a_row_for_cls_behind_all_pieces_and_extra_ids(folder):
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer/spiece.model"))
    cls = len(pieces) + json.loads((folder / "tokenizer/tokenizer_config.json").read_text())["extra_ids"]
    edited(folder, "text_encoder/config.json", vocab_size=cls + 1)
    weights.open_backbone(folder)
    edited(folder, "text_encoder/config.json", vocab_size=cls)
    with pytest.raises(ValueError, match=rf"ck/text_encoder/config.json: .*{cls} rows \(vocab_size\)"):
        weights.open_backbone(folder)


def test_a_wan_with_one_time_for_all_tokens_is_refused(folders, tmp_path):
    shutil.copytree(folders["wan"], tmp_path / "ck")
    edited(tmp_path / "ck", "model_index.json", expand_timesteps=False)
    with pytest.raises(ValueError, match="model_index.json: expand_timesteps.*one time for all tokens"):
        weights.open_backbone(tmp_path / "ck")


def test_frames_that_the_vae_cannot_take_are_refused(folders, tmp_path):
    shutil.copytree(folders["cogvideox"], tmp_path / "ck")
    edited(tmp_path / "ck", "transformer/config.json", sample_frames=10)
    with pytest.raises(ValueError, match="transformer/config.json: sample_frames = 10.*ratio = 4"):
        weights.open_backbone(tmp_path / "ck")


@pytest.mark.parametrize("value", ["x", -1, 0, [], {}, True, 2.5])
def test_wans_length_of_a_prompt_has_a_type_too(folders, tmp_path, value):
    shutil.copytree(folders["wan"], tmp_path / "ck")
    edited(tmp_path / "ck", "tokenizer/tokenizer_config.json", model_max_length=value)
    with pytest.raises(ValueError, match="tokenizer_config.json: model_max_length"):
        weights.open_backbone(tmp_path / "ck")


@pytest.mark.parametrize(("value", "tokens"), [(int(1e30), 512), (None, 512), (64, 64), (1024, 512)])
def test_a_tokenizer_without_a_limit_has_wans(folders, tmp_path, value, tokens):
    """transformers writes int(1e30) where there is no limit."""
    shutil.copytree(folders["wan"], tmp_path / "ck")
    edited(tmp_path / "ck", "tokenizer/tokenizer_config.json", model_max_length=value)
    assert weights.open_backbone(tmp_path / "ck").text_tokens == tokens


@pytest.mark.parametrize("damage", [{"a": 3}, {"a": None}, {"a": ["x"]}, [], "x", None])
def test_an_index_of_shards_that_names_no_files_is_refused(folders, tmp_path, damage):
    shutil.copytree(folders["cogvideox"], tmp_path / "ck")
    index = tmp_path / "ck/transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": damage}))
    index.with_name("diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="index.json: .*(weight_map|object)"):
        weights.load_backbone(tmp_path / "ck", parts=("dit",), log=lambda line: None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38])
def test_a_checkpoint_with_nan_is_refused_by_tensor(folders, tmp_path, value):
    """3.4e38 is a number in float32, and infinite in bfloat16."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders["cogvideox"], tmp_path / "ck")
    file = tmp_path / "ck/vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.conv.bias"][1] = value
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"ck/vae: decoder.conv_out.conv.bias has NaN or infinity"):
        weights.load_backbone(tmp_path / "ck", dtype=torch.bfloat16, parts=("vae",), log=lambda line: None)
