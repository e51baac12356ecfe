"""The vocabulary of a checkpoint: a spiece.model, or a tokenizer.json turned into what it was made from.

Some checkpoints carry only the former. The two hold the same pieces and scores; this writes them down as the
protobuf that SentencePiece reads (sentencepiece_model.proto), so that one tokenizer serves both.
"""

import struct
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from sdv.data.files import parse_json
from sdv.models.text import EOS, PAD, UNK

NORMAL, UNKNOWN, CONTROL, UNUSED = 1, 2, 3, 5  # kinds of pieces
GET_IT = "copy spiece.model from the original checkpoint (transformers 5 does not save it with a pipeline)"
SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}


def read_pieces(path: str | Path, unk: int = UNK) -> SentencePieceProcessor:
    """A spiece.model or a tokenizer.json; unk, the id of what is unknown, is 2 in T5 and 3 in UMT5.

    ValueError for a file that is damaged, or that is another kind of vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {GET_IT}")
    try:
        if path.suffix == ".json":
            pieces = SentencePieceProcessor(model_proto=sentencepiece_model(path))
        else:
            pieces = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a SentencePiece model, or cut short ({error})") from error
    if unk != UNK and pieces.is_byte(pieces.piece_to_id("<0x00>")):  # byte fallback has all 256 or none
        pieces = SentencePieceProcessor(model_proto=_without_byte_fallback(pieces))
    if unk == UNK and "Ａ" in pieces.normalize("Ａ"):  # the rules that make it an A stand at the file's end
        raise ValueError(f"{path}: cut short, its normalization rules are missing. Download it again.")
    found = pieces.pad_id(), pieces.eos_id(), pieces.unk_id()
    if found != (PAD, EOS, unk):
        raise ValueError(f"{path}: pad, eos, unk have ids {found}; this model's have {(PAD, EOS, unk)}")
    return pieces


def sentencepiece_model(path: Path) -> bytes:
    """The serialised model. ValueError for a tokenizer.json that no unigram model without rules gives."""
    try:
        supported, serialised = _serialised(parse_json(path.read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{path}: damaged, or not a tokenizer.json ({error!r}). Get it again.") from error
    if not supported:
        raise ValueError(f"{path}: supported is UMT5's kind, Unigram without normalization rules; {GET_IT}")
    return serialised


def _serialised(content: dict) -> tuple[bool, bytes]:
    """Whether it is of the supported kind, and the model."""
    model, normalizer, added = content["model"], content["normalizer"], content["added_tokens"]
    vocabulary, unknown = model["vocab"], model["unk_id"]
    if normalizer is None:
        return False, b""
    rules = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    if model["type"] != "Unigram" or model.get("byte_fallback") or rules != [SPACES]:
        return False, b""
    extra = {token["id"] for token in added if token["content"].startswith("<extra_id_")}
    special = {token["id"] for token in added}
    pieces = []
    for i, (piece, score) in enumerate(vocabulary):
        if i not in extra:
            kind = UNKNOWN if i == unknown else CONTROL if i in special else NORMAL if piece else UNUSED
            pieces.append(_piece(piece or f"<empty_{i}>", score, kind))  # two of UMT5 are lost in JSON
    return True, _model(pieces)


def _without_byte_fallback(pieces: SentencePieceProcessor) -> bytes:
    """UMT5's vocabulary as transformers, and so Wan's vendor and diffusers, read it from tokenizer.json.

    A letter that it lacks is unknown to them, not the bytes that it consists of.
    """
    kinds = ((pieces.is_unknown, UNKNOWN), (pieces.is_control, CONTROL), (pieces.is_unused, UNUSED))
    found = []
    for i in range(pieces.get_piece_size()):
        kind = next((kind for is_one, kind in kinds if is_one(i)), NORMAL)
        found.append(_piece(pieces.id_to_piece(i), pieces.get_score(i), kind))
    return _model(found)


def _model(pieces: list[bytes]) -> bytes:
    trainer = _varint(3, 1)  # model_type: unigram
    rules = _bytes(1, b"identity") + _varint(3, 1) + _varint(4, 1) + _varint(5, 1)  # SentencePiece's spaces
    return b"".join(_bytes(1, piece) for piece in pieces) + _bytes(2, trainer) + _bytes(3, rules)


def _piece(piece: str, score: float, kind: int) -> bytes:
    return _bytes(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _varint(3, kind)


def _number(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth bit says that more follow."""
    low = bytearray()
    while value > 127:
        low.append(value & 127 | 128)
        value >>= 7
    return bytes(low) + bytes([value])


def _varint(field: int, value: int) -> bytes:
    return _number(field << 3) + _number(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _number(field << 3 | 2) + _number(len(value)) + value
