"""Token ids and T5 features against transformers, with the real vocabulary and with a tiny one."""

import copy
import random
import unicodedata
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceTrainer

from helpers import relative_error, tokenizer
from sdv.models.text import T5Config, T5Encoder, TextEncoder, Tokenizer, relative_buckets
from weights.cogvideox import T5_NAMES, t5_config
from weights.tensors import load_into
from weights.tiny import train_vocabulary

T5 = Path(__file__).parent / "data" / "t5"
CAPTION = "a white dog with a red collar runs along the beach at sunset, waves behind it, handheld camera"


# --------------------------------------------------------------------------------------- token ids
@pytest.fixture(scope="module")
def ours():
    return tokenizer(T5 / "spiece.model")


def transformers_tokenizer(folder: Path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf", reason="transformers reads spiece.model through protobuf")
    tokenizer = transformers.T5Tokenizer.from_pretrained(folder, extra_ids=100)
    tokenizer.add_tokens(["<cls>"], special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def theirs():
    return transformers_tokenizer(T5)


def varied_lines(tokenizer: Tokenizer, count: int) -> list[str]:
    """Captions, pieces, special tokens, emoji, accents, scripts, controls, anything, too long, empty."""
    rng = random.Random(0)
    pieces = [tokenizer.pieces.id_to_piece(i).replace("▁", " ") for i in range(3, 32_000)]
    special = [
        "<cls>", "</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_5>", "<extra_id_99>", "<extra_id_100>",
        "<cls", "cls>", "<", ">", "▁", " ", "  ", "\t", "\n", "dog", "a", ".", "日本",
    ]  # fmt: skip
    emoji = [
        "😀", "👍🏽", "👨\u200d👩\u200d👧", "🇩🇪", "❤️", "1️⃣", "…", "—", "“", "”", "½", "①", "ﬁ", "ｆｕｌｌ",
        "한글", "हिन्दी", "عربى", "漢字", "naïve", "Straße", "\u3000", " ", "a",
    ]  # fmt: skip
    accents = "éèêëàâäöüßçñșțăîÅûôïÿ abc"

    def some(choices, most: int) -> str:
        return "".join(rng.choice(choices) for _ in range(rng.randint(1, most)))

    def some_of(first: int, last: int) -> str:
        return some([chr(c) for c in range(first, last) if not 0xD800 <= c < 0xE000], 60)

    kinds = [
        lambda: " ".join(rng.sample(CAPTION.split(), rng.randint(1, 15))),
        lambda: some(pieces, 40),
        lambda: some(pieces, 600),
        lambda: some(special, 20),
        lambda: "<cls> " + some(special, 20) + CAPTION,
        lambda: some(emoji, 40),
        lambda: unicodedata.normalize("NFD", some(accents, 40)),
        lambda: some_of(0, 0x250),
        lambda: some_of(0, 0x3000),
        lambda: some_of(0, 0x20000),
        lambda: some([" ", "\n", "\r\n", "\x85", "\xa0", "\u200b", "\ufeff", "\u2028", "\x00", "x"], 12),
    ]
    return ["", " ", "\n\t"] + [kinds[i % len(kinds)]() for i in range(count - 3)]


def test_ids_equal_transformers_on_a_thousand_varied_lines(ours, theirs):
    lines = varied_lines(ours, 1000)
    want = theirs(lines, padding="max_length", max_length=226, truncation=True, return_tensors="pt").input_ids
    got = ours(lines)
    assert got.shape == want.shape and got.dtype == want.dtype
    different = [line for line, a, b in zip(lines, got, want, strict=True) if not torch.equal(a, b)]
    assert different == []
    assert sum(len(ours.encode(line)) > 226 for line in lines) > 50


def test_every_single_code_point_of_the_basic_plane_equals_transformers(ours, theirs):
    lines = [f"a{chr(c)}b" for c in range(0x10000) if not 0xD800 <= c < 0xE000]
    want = theirs(lines).input_ids
    assert [line for line, ids in zip(lines, want, strict=True) if ours.encode(line) + [1] != ids] == []


@pytest.mark.parametrize("composed", ["pǖ", "ấ", "é\u200d"], ids=ascii)
def test_a_letter_with_two_marks_composes_here_and_not_in_transformers(ours, theirs, composed):
    """The one known difference. A text and its decomposed form mean the same and should have the same ids."""
    decomposed = unicodedata.normalize("NFD", composed)
    assert ours.encode(decomposed) == ours.encode(composed)
    assert theirs(composed).input_ids == ours.encode(composed) + [1] != theirs(decomposed).input_ids


def test_cls_is_one_id_wherever_it_stands(ours):
    dog = ours.encode("a dog")
    assert ours.cls_id == 32100
    for prompt in ("<cls> a dog", "<cls>a dog", "  <cls>   a dog "):
        assert ours.encode(prompt) == [32100, *dog]
    assert ours.encode("a dog<cls>") == [*dog, 32100]
    assert ours.encode("<extra_id_0><extra_id_99>") == [32099, 32000]


def test_a_long_prompt_keeps_its_end_token_and_a_string_is_one_prompt(ours):
    ids = ours("dog " * 300)
    assert ids.shape == (1, 226) and ids[0, -1] == 1 and (ids[0, :-1] == ours.encode("dog")[0]).all()
    assert ours("dog")[0].tolist() == [*ours.encode("dog"), 1] + [0] * 224
    assert ours([]).shape == (0, 226)


@pytest.fixture(scope="module")
def tiny_vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(0)
    words = f"{CAPTION} a cat rolls a green ball quickly under the table while a child laughs".split()
    sentences = [" ".join(rng.choices(words, k=12)) for _ in range(400)]
    (folder / "spiece.model").write_bytes(train_vocabulary(sentences, 200))
    return folder


def test_a_tiny_vocabulary_is_deterministic_and_has_the_same_ids_in_transformers(tiny_vocabulary):
    ours, theirs = (
        tokenizer(tiny_vocabulary / "spiece.model", max_length=32),
        transformers_tokenizer(tiny_vocabulary),
    )
    assert ours.cls_id == ours.pieces.get_piece_size() + 100 == len(theirs) - 1
    lines = [CAPTION, f"<cls> {CAPTION}", "a zebra 😀 <extra_id_3>", "", "dog<cls>dog"]
    want = theirs(lines, padding="max_length", max_length=32, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours(lines), want)
    rng = random.Random(1)
    sentences = [" ".join(rng.choices(CAPTION.split(), k=9)) for _ in range(100)]
    assert train_vocabulary(sentences, 100) == train_vocabulary(sentences, 100)


def test_a_bad_vocabulary_or_prompt_is_one_clear_error(tmp_path, ours):
    with pytest.raises(FileNotFoundError, match="spiece.model"):
        tokenizer(tmp_path / "spiece.model")
    for size in (999, 1000):  # the longer file ends with a whole piece: SentencePiece loads its 76 pieces
        (tmp_path / "cut.model").write_bytes((T5 / "spiece.model").read_bytes()[:size])
        with pytest.raises(ValueError, match="cut.model: .*cut short"):
            tokenizer(tmp_path / "cut.model")
    llama_like = tmp_path / "other.model"
    with open(llama_like, "wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter([CAPTION] * 9), model_writer=file, vocab_size=30, minloglevel=2
        )
    with pytest.raises(ValueError, match=r"other.model: pad, eos, unk have ids \(-1, 2, 0\)"):
        tokenizer(llama_like)
    with pytest.raises(ValueError, match="surrogate"):
        ours(["fine", "broken \ud83d"])


# --------------------------------------------------------------------------------------- T5 encoder
CONFIG = {
    "vocab_size": 384, "d_model": 48, "d_kv": 8, "d_ff": 96, "num_layers": 3, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A tiny T5 that transformers wrote; norms and biases are redrawn: ones and zeros hide mistakes."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(**CONFIG)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "relative" in name:
            torch.nn.init.normal_(parameter, mean=1.0)
    folder = tmp_path_factory.mktemp("text_encoder")
    model.save_pretrained(folder)
    return folder, model


def load(folder: Path, dtype=torch.float32) -> T5Encoder:
    with torch.device("meta"):
        encoder = T5Encoder(t5_config(CONFIG))
    load_into(encoder, T5_NAMES, folder, "cpu", dtype)
    return encoder


def some_ids(length: int) -> torch.Tensor:
    return torch.randint(384, (3, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 20, 226])
def test_features_equal_transformers_without_a_mask(reference, length):
    folder, model = reference
    ids = some_ids(length)
    assert relative_error(load(folder)(ids), model(ids).last_hidden_state) <= 1e-5


@torch.no_grad()
def test_features_equal_transformers_with_a_mask_and_do_not_depend_on_what_it_hides(reference):
    folder, model = reference
    ids = some_ids(40)
    mask = torch.arange(40) < torch.tensor([[40], [17], [1]])
    got = load(folder)(ids, mask)
    assert relative_error(got, model(ids, attention_mask=mask.long()).last_hidden_state) <= 1e-5
    other = torch.where(mask, ids, 0)
    assert torch.equal(load(folder)(other, mask)[mask], got[mask])
    assert not torch.equal(load(folder)(other)[mask], load(folder)(ids)[mask])


@torch.no_grad()
def test_in_bfloat16_it_is_as_near_to_float64_as_transformers(reference):
    folder, model = reference
    ids = some_ids(226)
    exact = load(folder).double()(ids)
    half = copy.deepcopy(model).bfloat16()(ids).last_hidden_state
    assert relative_error(load(folder, torch.bfloat16)(ids), exact) <= 1.1 * relative_error(half, exact)


def test_buckets_equal_transformers_at_every_distance():
    pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    position = torch.arange(600)
    offset = position[None] - position[:, None]
    for buckets, distance in ((32, 128), (8, 20), (64, 256)):
        want = T5Attention._relative_position_bucket(offset, True, buckets, distance)
        assert torch.equal(relative_buckets(600, buckets, distance), want)


def test_the_xxl_encoder_has_the_published_size():
    """The real text_encoder's index says total_size 9524621312 bytes in bf16."""
    with torch.device("meta"):
        encoder = T5Encoder(T5Config())
    assert 2 * sum(parameter.numel() for parameter in encoder.parameters()) == 9_524_621_312


# --------------------------------------------------------------------------------------- prompts to features
def test_prompts_become_features_without_gradient(reference, tiny_vocabulary):
    folder, model = reference
    reader = tokenizer(tiny_vocabulary / "spiece.model", max_length=32)
    text = TextEncoder(reader, load(folder).requires_grad_())
    prompts = [f"<cls> {CAPTION}", ""]
    features = text(prompts)
    assert features.shape == (2, 32, 48) and not features.requires_grad
    with torch.no_grad():
        want = model(text.tokenize(prompts)).last_hidden_state  # padding is attended to: no mask
    assert relative_error(features, want) <= 1e-5
    assert [text.length(prompt) for prompt in prompts] == (text.tokenize(prompts) != 0).sum(1).tolist()
