"""Prompts to token ids (SentencePiece) and token ids to features (the encoders of T5 v1.1 and UMT5).

Sources: arXiv 1910.10683 (T5: relative bias, no attention scale), arXiv 2002.05202 (the gated feed-forward),
arXiv 2304.09151 (UMT5: a relative bias in every block).
"""

import html
import importlib.util
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

PAD, EOS, UNK = 0, 1, 2


class Tokenizer:
    """T5's ids: SentencePiece between the special tokens, </s> at the end, padded or cut to max_length.

    <extra_id_0>, _1, ... take the ids behind the pieces, last first, and cls_token the next one (32100). Text
    between special tokens is a sentence of its own, so spaces beside them vanish. Same ids as transformers'
    T5Tokenizer, but that a decomposed letter with a second mark or joiner is composed, as SentencePiece does.
    pieces: the checkpoint's vocabulary, see weights.vocabulary. UMT5's has no normalization rules.
    """

    def __init__(
        self,
        pieces: SentencePieceProcessor,
        max_length: int = 226,
        extra_ids: int = 100,
        cls_token: str = "<cls>",
    ):
        self.pieces = pieces
        self.max_length = max_length
        n = self.pieces.get_piece_size()
        self.cls_id = n + extra_ids
        self.special = {pieces.id_to_piece(i): i for i in range(pieces.unk_id() + 1)}
        self.special |= {cls_token: self.cls_id}
        self.special |= {f"<extra_id_{i}>": self.cls_id - 1 - i for i in range(extra_ids)}
        self.boundary = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")

    def __call__(self, prompts: str | Sequence[str]) -> Tensor:
        """Prompts to ids (B, max_length) int64. A prompt that is too long loses its tail but keeps </s>."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        ids = torch.full((len(prompts), self.max_length), PAD)
        for row, prompt in zip(ids, prompts, strict=True):
            tokens = self.encode(prompt)[: self.max_length - 1] + [EOS]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids

    def encode(self, prompt: str) -> list[int]:
        """One prompt to its ids, without </s> and without a limit."""
        if any("\ud800" <= c <= "\udfff" for c in prompt):
            raise ValueError(f"prompt {prompt!r} has half a surrogate pair: repair the encoding of its file")
        prompt = prompt.replace("\x85", " ")  # the one white space that T5's table does not map to a space
        ids = []
        for part in self.boundary.split(prompt):
            ids += [self.special[part]] if part in self.special else self.pieces.encode(part)
        return ids


@dataclass(frozen=True)
class T5Config:
    """The defaults are the encoder of T5 v1.1 XXL (4,762,310,656 parameters).

    bias_in_every_block: UMT5's blocks have a relative bias each, T5's share one.
    """

    vocab: int = 32128
    dim: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    hidden: int = 10240
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    bias_in_every_block: bool = False


def relative_buckets(
    length: int, buckets: int, max_distance: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Bucket of every (query, key) pair, (L, L) int64: one half for keys behind, the other for keys ahead.

    Within a half, the near distances have a bucket each; far ones share logarithmic ones up to max_distance.
    Counted on the CPU: another device's logarithm could round a distance into the neighbouring bucket.
    """
    half, near = buckets // 2, buckets // 4
    position = torch.arange(length, device="cpu")
    offset = position[None, :] - position[:, None]  # (L, L): key - query
    distance = offset.abs()
    octaves = torch.log(distance.clamp(min=near) / near) / math.log(max_distance / near)
    far = (near + octaves * (half - near)).long().clamp(max=half - 1)
    return (torch.where(distance < near, distance, far) + half * (offset > 0)).to(device)


kept_buckets = lru_cache(16)(relative_buckets)


class RelativeBias(nn.Module):
    """A learned number per head and bucket of distance, added to the attention scores."""

    def __init__(self, cfg: T5Config):
        super().__init__()
        self.max_distance = cfg.max_distance
        self.table = nn.Embedding(cfg.buckets, cfg.heads)

    def forward(self, length: int, mask: Tensor | None = None) -> Tensor:
        weight = self.table.weight
        # Kept on a GPU, so that a CUDA graph of the encoder copies nothing from the CPU.
        buckets_of = kept_buckets if weight.device.type == "cuda" else relative_buckets
        buckets = buckets_of(length, self.table.num_embeddings, self.max_distance, weight.device)
        bias = self.table(buckets)  # (L, L, N)
        bias = bias.permute(2, 0, 1)[None].contiguous()  # (1, N, L, L)
        if mask is None:
            return bias
        hidden = ~mask.bool()[:, None, None, :]  # (B, 1, 1, L)
        return bias.masked_fill(hidden, torch.finfo(bias.dtype).min)  # (B, N, L, L)


class T5Attention(nn.Module):
    def __init__(self, cfg: T5Config):
        super().__init__()
        inner = cfg.heads * cfg.head_dim
        self.heads = cfg.heads
        self.q = nn.Linear(cfg.dim, inner, bias=False)
        self.k = nn.Linear(cfg.dim, inner, bias=False)
        self.v = nn.Linear(cfg.dim, inner, bias=False)
        self.out = nn.Linear(inner, cfg.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)  # (B, N, L, K)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, L, D)


class T5FeedForward(nn.Module):
    def __init__(self, cfg: T5Config):
        super().__init__()
        self.gate = nn.Linear(cfg.dim, cfg.hidden, bias=False)
        self.up = nn.Linear(cfg.dim, cfg.hidden, bias=False)
        self.down = nn.Linear(cfg.hidden, cfg.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.gate(x), approximate="tanh") * self.up(x)  # (B, L, hidden)
        return self.down(x)  # (B, L, D)


class T5Block(nn.Module):
    def __init__(self, cfg: T5Config):
        super().__init__()
        self.norm1 = nn.RMSNorm(cfg.dim, eps=cfg.eps)
        self.attn = T5Attention(cfg)
        self.norm2 = nn.RMSNorm(cfg.dim, eps=cfg.eps)
        self.ff = T5FeedForward(cfg)
        self.bias = RelativeBias(cfg) if cfg.bias_in_every_block else None

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), bias)  # (B, L, D)
        return x + self.ff(self.norm2(x))  # (B, L, D)


class T5Encoder(nn.Module):
    """ids (B, L) -> features (B, L, D). A mask (B, L) is true where a token counts; CogVideoX gives none."""

    def __init__(self, cfg: T5Config):
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab, cfg.dim)
        self.bias = None if cfg.bias_in_every_block else RelativeBias(cfg)  # one table, shared by all blocks
        self.blocks = nn.ModuleList(T5Block(cfg) for _ in range(cfg.layers))
        self.norm = nn.RMSNorm(cfg.dim, eps=cfg.eps)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)  # (B, L, D)
        shared = None if self.bias is None else self.bias(ids.shape[1], mask)
        for block in self.blocks:
            bias = block.bias(ids.shape[1], mask) if shared is None else shared
            x = block(x, bias)  # (B, L, D)
        return self.norm(x)  # (B, L, D)


class TextEncoder(nn.Module):
    """Prompts to features (B, L, D) as CogVideoX reads them: padded, unmasked, without gradient."""

    def __init__(self, tokenizer: Tokenizer, encoder: T5Encoder):
        super().__init__()
        self.tokenizer, self.encoder = tokenizer, encoder

    def tokenize(self, prompts: str | Sequence[str]) -> Tensor:
        """Prompts to ids (B, L), on the encoder's device."""
        return self.tokenizer(prompts).to(self.encoder.embed.weight.device)

    def length(self, prompt: str) -> int:
        """Tokens of a prompt with </s>, before it is cut to tokenizer.max_length."""
        return len(self.tokenizer.encode(prompt)) + 1

    def encode(self, ids: Tensor) -> Tensor:
        """Ids (B, L) -> features (B, L, D), with their gradient."""
        return self.encoder(ids)

    @torch.no_grad()
    def forward(self, prompts: str | Sequence[str]) -> Tensor:
        return self.encode(self.tokenize(prompts))  # (B, L, D)


# ftfy mends broken encodings and full-width signs. The original runs it, but nothing here depends on it.
FTFY = importlib.util.find_spec("ftfy") is not None
CLEANING = "prompts cleaned of " + ("what ftfy mends, " if FTFY else "") + "HTML entities and white space"
CLEANING += "" if FTFY else "; not by ftfy, which is not installed"


def clean(prompt: str) -> str:
    """Wan's cleaning of a prompt: broken encodings, HTML entities (escaped twice at most), white space."""
    if FTFY:
        import ftfy

        prompt = ftfy.fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


class UMT5TextEncoder(TextEncoder):
    """Prompts to features (B, L, D) as Wan reads them: cleaned, masked, zeros behind each prompt's end."""

    def tokenize(self, prompts: str | Sequence[str]) -> Tensor:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return super().tokenize([clean(prompt) for prompt in prompts])

    def length(self, prompt: str) -> int:
        return super().length(clean(prompt))

    def encode(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        lengths = ((ids == EOS) * (places + 1)).amax(dim=1)  # (B,): every prompt ends with </s>
        mask = places < lengths[:, None]  # (B, L)
        return self.encoder(ids, mask) * mask[..., None]  # (B, L, D)

    @torch.no_grad()
    def forward(self, prompts: str | Sequence[str]) -> Tensor:
        """What lies behind the longest prompt is zeros, and is never computed."""
        ids = self.tokenize(prompts)
        longest = int((ids == EOS).nonzero()[:, 1].max()) + 1
        return F.pad(self.encode(ids[:, :longest]), (0, 0, 0, ids.shape[1] - longest))  # (B, L, D)
