"""CLIP and DINO from local folders, by transformers: pictures and prompts -> vectors of length 1.

A folder is what `save_pretrained` writes, or a copy of a model's repository: config.json, weights,
preprocessor_config.json and, for CLIP, the tokenizer. Pictures are prepared as that folder says, always by
Pillow: numbers must not depend on what else is installed. Nothing is fetched.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
CLIP, DINO = ("clip",), ("vit", "dinov2", "dinov2_with_registers")
SIZES = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1280: "H", 1536: "g"}  # width of a ViT: its letter
LACKING = "pip install -e '.[evaluate]' first: transformers and Pillow read CLIP and DINO"


class Judge:
    """A network that turns pictures into vectors; what only CLIP does is below."""

    def __init__(self, folder: str | Path, flag: str, kinds: tuple[str, ...], device: str = "cpu"):
        self.folder, self.device = Path(folder), device
        self.config = read_config(self.folder, flag, kinds)
        self.model = load(self.folder, flag).to(device).eval().requires_grad_(False)
        self.processor = _processor(self.config["model_type"]).from_pretrained(
            self.folder, local_files_only=True
        )

    @property
    def name(self) -> str:
        """Such as "CLIP ViT-B/32"."""
        vision = getattr(self.model.config, "vision_config", self.model.config)
        kind = {"clip": "CLIP", "vit": "DINO"}.get(self.config["model_type"], "DINOv2")
        return f"{kind} ViT-{SIZES.get(vision.hidden_size, vision.hidden_size)}/{vision.patch_size}"

    def pixels(self, pictures: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> what the network takes, by the folder's own image processor."""
        arrays = list(pictures.movedim(1, -1).numpy())
        return self.processor(images=arrays, input_data_format="channels_last", return_tensors="pt")[
            "pixel_values"
        ]

    @torch.inference_mode()
    def images(self, pictures: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> (N, D) of length 1: DINO's class token behind the last norm."""
        hidden = self.model(pixel_values=self.pixels(pictures).to(self.device)).last_hidden_state
        return F.normalize(hidden[:, 0].float().cpu(), dim=-1)


class ClipJudge(Judge):
    """CLIP: pictures and prompts in one space."""

    def __init__(self, folder: str | Path, device: str = "cpu"):
        super().__init__(folder, "--clip", CLIP, device)
        from transformers import CLIPTokenizer

        text = self.model.config.text_config
        self.longest = text.max_position_embeddings
        self.tokenizer = CLIPTokenizer.from_pretrained(self.folder, local_files_only=True)
        if len(self.tokenizer) != text.vocab_size:  # without its files, it is made anew, and empty
            raise ValueError(
                f"--clip {folder}: its tokenizer has {len(self.tokenizer)} tokens, its network "
                f"{text.vocab_size}; copy vocab.json and merges.txt, or tokenizer.json, beside it"
            )

    @torch.inference_mode()
    def images(self, pictures: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> (N, D) of length 1."""
        found = self.model.get_image_features(pixel_values=self.pixels(pictures).to(self.device))
        return F.normalize(found.pooler_output.float().cpu(), dim=-1)

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """(N, D) of length 1; what is longer than CLIP reads, 77 tokens, is cut (see `cut`)."""
        words = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        ).to(self.device)
        found = self.model.get_text_features(words.input_ids, attention_mask=words.attention_mask)
        return F.normalize(found.pooler_output.float().cpu(), dim=-1)

    def cut(self, prompts: Sequence[str]) -> int:
        """How many prompts CLIP does not read to their end."""
        return sum(len(ids) > self.longest for ids in self.tokenizer(list(prompts)).input_ids)


class DinoJudge(Judge):
    """DINO or DINOv2."""

    def __init__(self, folder: str | Path, device: str = "cpu"):
        super().__init__(folder, "--dino", DINO, device)


def read_config(folder: Path, flag: str, kinds: tuple[str, ...]) -> dict:
    """The folder's config.json; ValueError unless its model is of these kinds and its files are there."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{flag} {folder}: no config.json; give the folder of a model for transformers"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: is no config of transformers ({error!r}); copy it again") from error
    if kind not in kinds:
        raise ValueError(f"{flag} {folder}: holds a model of type {kind!r}; give one of {', '.join(kinds)}")
    if not weight_files(folder):
        raise FileNotFoundError(f"{flag} {folder}: no weights; put model.safetensors beside config.json")
    if not (folder / "preprocessor_config.json").is_file():
        raise FileNotFoundError(f"{flag} {folder}: no preprocessor_config.json; copy all files of the model")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights: safetensors if there are any."""
    return next((found for pattern in WEIGHTS if (found := sorted(folder.glob(pattern)))), [])


def load(folder: Path, flag: str) -> nn.Module:
    """The model in float32; ValueError if a weight is missing, misfit or of another model.

    transformers itself would fill what is missing with random numbers and a warning.
    """
    try:
        from transformers import AutoModel
        from transformers.utils import logging
    except ImportError as error:
        raise ValueError(LACKING) from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, report = AutoModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:  # torn files raise errors of safetensors', of pickle's and of torch's own
        reason = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"{flag} {folder}: weights cannot be read ({reason}); copy them again") from error
    missing = [name for name in report["missing_keys"] if "pooler" not in name]  # which is not asked
    strange = [name for name in report["unexpected_keys"] if not ("pooler" in name or "position_ids" in name)]
    if missing or strange:
        raise ValueError(
            f"{flag} {folder}: {len(missing)} weights are missing and {len(strange)} are another model's, "
            f"such as {(missing + strange)[0]}; give the folder of the bare network"
        )
    return model


def _processor(kind: str) -> type:
    from transformers import BitImageProcessorPil, CLIPImageProcessorPil, ViTImageProcessorPil

    return {"clip": CLIPImageProcessorPil, "vit": ViTImageProcessorPil}.get(kind, BitImageProcessorPil)
