"""UMT5 and its token ids against transformers."""

import io
import json
import os
import random
from pathlib import Path

import pytest
import sentencepiece
import torch

from helpers import relative_error, tokenizer
from sdv.models import text as sdv_text
from sdv.models.text import EOS, PAD, T5Config, T5Encoder, Tokenizer, UMT5TextEncoder, clean
from weights import wan
from weights.tensors import load_into, save_module
from weights.tiny import CORPUS, train_vocabulary

transformers = pytest.importorskip("transformers")
TINY = {"vocab_size": 700, "d_model": 48, "d_kv": 8, "d_ff": 80, "num_layers": 3, "num_heads": 4}
PROMPTS = ["a dog lies on the grass", "", "two dogs run across a field while the camera follows them, " * 3]
# Wan's own negative prompt begins like this; its commas are full-width.
WORDS = ["色调艳丽，过曝，静态", "a", "white", "dog", ",", "runs", "&", "jumps!", "42", "Straße", "naïve"]
WORDS += ["漢字", "한글", "हिन्दी", "😀", "[web]", "_"]  # no ▁: as a sign of its own it is read in two ways


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    file = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    file.write_bytes(train_vocabulary(CORPUS.strip().splitlines(), 256, umt5=True))
    return file


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("umt5") / "text_encoder"
    torch.manual_seed(0)
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**TINY, feed_forward_proj="gated-gelu"))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.eval().save_pretrained(folder)
    return model, folder


def load(folder, names=wan.UMT5_NAMES) -> T5Encoder:
    with torch.device("meta"):
        encoder = T5Encoder(wan.umt5_config(TINY))
    load_into(encoder, names, folder, "cpu", torch.float32)
    return encoder.eval()


def tokenizer_json(spiece: Path, file: Path) -> Path:
    """What transformers' conversion makes of a vocabulary: pieces, extra ids, and collapsed spaces."""
    pieces = tokenizer(spiece, unk=3).pieces
    vocabulary = [[pieces.id_to_piece(i), pieces.get_score(i)] for i in range(pieces.get_piece_size())]
    extra = [f"<extra_id_{i}>" for i in reversed(range(300))]
    special = [(i, vocabulary[i][0]) for i in range(4)] + list(enumerate(extra, len(vocabulary)))
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    content = {
        "version": "1.0", "truncation": None, "padding": None,
        "pre_tokenizer": metaspace, "decoder": metaspace,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in special],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "model": {"type": "Unigram", "unk_id": 3, "byte_fallback": False,
                  "vocab": vocabulary + [[token, 0.0] for token in extra]},
        "post_processor": {
            "type": "TemplateProcessing", "pair": [],
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}},
    }  # fmt: skip
    file.write_text(json.dumps(content))
    return file


def varied_lines(count: int) -> list[str]:
    """Words of the corpus and odd ones, in any order, some joined, some with stray spaces."""
    rng = random.Random(0)
    words = CORPUS.split() + WORDS * 4
    return [
        "".join(rng.choice(words) + rng.choice(["", " ", " ", "  ", ", "]) for _ in range(rng.randint(0, 40)))
        for _ in range(count)
    ]


def assert_same_ids(ours: Tokenizer, theirs, lines: list[str]) -> None:
    lines = [clean(line) for line in lines]
    want = theirs(lines, padding="max_length", max_length=512, truncation=True, return_tensors="pt").input_ids
    different = [line for line, a, b in zip(lines, ours(lines), want, strict=True) if not torch.equal(a, b)]
    assert different == []


def fast_tokenizer(file: Path):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(file), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def test_ids_equal_transformers_fast_tokenizer_from_either_file(spiece, tmp_path):
    file = tokenizer_json(spiece, tmp_path / "tokenizer.json")
    theirs = fast_tokenizer(file)
    lines = varied_lines(500)
    for ours in (tokenizer(spiece, 512, 300, unk=3), tokenizer(file, 512, 300, unk=3)):
        assert_same_ids(ours, theirs, lines)
        assert ours.cls_id == ours.pieces.get_piece_size() + 300
        assert ours.encode("<cls> a dog")[0] == ours.cls_id
        assert ours.encode("<extra_id_0>") == [ours.cls_id - 1]


def test_what_the_vocabulary_lacks_is_unknown_though_spiece_model_would_spell_its_bytes(tmp_path):
    """As UMT5's does: it has byte fallback, and its tokenizer.json, which the vendor reads, has not."""
    file, model = tmp_path / "spiece.model", io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.strip().splitlines()), model_writer=model, model_type="unigram",
        vocab_size=600, hard_vocab_limit=False, byte_fallback=True, num_threads=1, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=3, bos_id=2, normalization_rule_name="identity",
        pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>", bos_piece="<s>",
    )  # fmt: skip
    file.write_bytes(model.getvalue())
    raw = sentencepiece.SentencePieceProcessor(model_file=str(file))
    line = "a \U0001f999 in the snow"
    assert any(map(raw.is_byte, raw.encode(line)))
    theirs = fast_tokenizer(tokenizer_json(file, tmp_path / "tokenizer.json"))
    for ours in (tokenizer(file, 512, 300, unk=3), tokenizer(tmp_path / "tokenizer.json", 512, 300, unk=3)):
        assert_same_ids(ours, theirs, [line, *varied_lines(200)])
        assert 3 in ours.encode(line)


@pytest.mark.skipif("SDV_UMT5" not in os.environ, reason="SDV_UMT5: path of UMT5's tokenizer.json")
def test_ids_equal_transformers_with_the_real_vocabulary():
    file = os.environ["SDV_UMT5"]
    theirs = fast_tokenizer(file)
    ours = tokenizer(file, 512, 300, unk=3)
    assert ours.cls_id == 256_300
    assert_same_ids(ours, theirs, varied_lines(1000))


def test_a_broken_or_foreign_tokenizer_json_is_refused(spiece, tmp_path):
    file = tokenizer_json(spiece, tmp_path / "tokenizer.json")
    content = json.loads(file.read_text())
    for damage, match in (
        ("{", "damaged"),
        (json.dumps({k: v for k, v in content.items() if k != "model"}), "damaged.*model"),
        (json.dumps(content | {"model": content["model"] | {"type": "BPE"}}), "Unigram"),
        ("[" * 100_000, "damaged"),
        (json.dumps(content | {"normalizer": None}), "copy spiece.model from the original"),
        (json.dumps(content | {"added_tokens": 3}), "damaged"),
        (json.dumps(content | {"model": content["model"] | {"vocab": [["a", "x"]]}}), "damaged"),
        (json.dumps(content | {"model": content["model"] | {"vocab": [[1, 2]]}}), "damaged"),
        (json.dumps(content | {"model": content["model"] | {"vocab": None}}), "damaged"),
    ):
        file.write_text(damage)
        with pytest.raises(ValueError, match=match):
            tokenizer(file, unk=3)
    with pytest.raises(ValueError, match=r"\(0, 1, 3\); this model's have \(0, 1, 2\)|cut short"):
        tokenizer(spiece)


@torch.no_grad()
def test_features_equal_transformers_as_the_pipeline_of_diffusers_pads_them(stock, spiece):
    model, folder = stock
    ours = UMT5TextEncoder(tokenizer(spiece, 64, 300, unk=3), load(folder))
    ids = ours.tokenize(PROMPTS)
    mask = (ids != PAD).long()
    want = model(ids, mask).last_hidden_state * mask[..., None]
    found = ours(PROMPTS)
    assert found.shape == (3, 64, 48)
    assert relative_error(found, want) <= 1e-5
    assert found[mask == 0].abs().max() == 0
    assert mask.sum(1).tolist()[1] == 1 and mask.sum(1).tolist()[2] == 64
    alone = torch.cat([ours([prompt]) for prompt in PROMPTS])
    assert relative_error(alone, found) <= 1e-6  # no prompt sees the padding of another


def test_the_original_layout_is_the_same_encoder(stock, tmp_path):
    """Key names as in the original's code: token_embedding, pos_embedding.embedding, ffn.gate.0, fc1, fc2."""
    model, folder = stock
    ours = load(folder)
    save_module(ours, wan.UMT5_NAMES_ORIGINAL, tmp_path / "model.safetensors", torch.float32)
    again = load(tmp_path, wan.UMT5_NAMES_ORIGINAL).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.state_dict().items())


def test_the_xxl_encoder_has_its_published_size_and_another_encoder_is_refused():
    with torch.device("meta"):
        encoder = T5Encoder(wan.UMT5_XXL)
    parameters = list(encoder.parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (242, 5_680_910_336)
    real = {
        "model_type": "umt5", "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240,
        "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-06,
        "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
    }  # fmt: skip
    assert wan.umt5_config(real) == wan.UMT5_XXL == T5Config(vocab=256_384, bias_in_every_block=True)
    with pytest.raises(ValueError, match="'t5'; Wan reads text with 'umt5'"):
        wan.umt5_config(real | {"model_type": "t5"})


def test_prompts_are_cleaned_as_in_diffusers_pipeline(monkeypatch):
    pytest.importorskip("diffusers")
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    prompts = [
        "  a dog &amp;amp; a cat\n\trun\u3000fast  ", "&lt;cls&gt; x", "&amp;lt;b&amp;gt;", "", " ", "a\x85b",
        "1 &lt 2",
    ]  # fmt: skip
    if not sdv_text.FTFY:
        assert [clean(prompt) for prompt in prompts] == [prompt_clean(prompt) for prompt in prompts]
        assert "ftfy" in sdv_text.CLEANING

    class Fake:
        @staticmethod
        def fix_text(text):
            return text.replace("，", ",")

    monkeypatch.setitem(__import__("sys").modules, "ftfy", Fake)
    monkeypatch.setattr(sdv_text, "FTFY", True)
    assert clean("色调，过曝 &amp;amp; a") == "色调,过曝 & a"


def test_the_end_of_a_prompt_is_its_last_eos_even_if_special_tokens_stand_inside(stock, spiece):
    ours = UMT5TextEncoder(tokenizer(spiece, 16, 300, unk=3), load(stock[1]))
    ids = ours.tokenize("a <pad> dog </s> runs")
    assert PAD in ids[0, :4].tolist() and (ids == EOS).sum() == 2
    length = int((ids[0] == EOS).nonzero().max()) + 1
    features = ours("a <pad> dog </s> runs")
    assert (features[0, :length].abs().amax(1) > 0).all() and features[0, length:].abs().max() == 0
