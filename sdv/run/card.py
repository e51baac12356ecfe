"""The model card beside a saved adapter: what it was made of, and how it is used."""

import shlex
from pathlib import Path

USE = """\
```
python sample.py --backbone {base} --adapter adapter.safetensors --ref subject.jpg --prompt "..."
```
"""
STOCK = """
In stock diffusers the reference is one more, clean frame before the video:

```python
pipe.load_lora_weights("{folder}", weight_name="adapter.safetensors")  # diffusers 0.34 or newer
```

Older versions do not read the strength that is in the file: make them one with it in its weights,
`python -m weights.adapter convert adapter.safetensors old.safetensors --format diffusers-old`.
"""
NOT_STOCK = """
Stock diffusers cannot run it as it was trained: its pipelines have no such place for the reference, or no
LoRA that acts on the reference's tokens alone.
"""


def model_card(cfg: object, stock: bool, rows: dict[str, int], step: int, command: list[str]) -> str:
    """Markdown with the front matter that hubs read.

    cfg: train.py's settings; stock: whether diffusers can run it; rows: how many of each task.
    """
    base = Path(cfg.backbone).resolve().name
    pairs, clips = rows.get("identity", 0), rows.get("motion", 0)
    lora = f"begun from {Path(cfg.adapter).name}"
    if not cfg.adapter:
        lora = f"rank {cfg.rank}, alpha {cfg.alpha:g}"
    dropped = "the whole reference" if cfg.dropout == "whole" else "each token of the reference"
    dropped += f" dropped with probability {cfg.p_drop:g}"
    use = USE + (STOCK if stock else NOT_STOCK)
    return f"""---
base_model: {base}
library_name: diffusers
pipeline_tag: text-to-video
tags: [lora, subject-driven, reference-to-video]
license: other
license_name: to-be-filled-in  # the base model's licence and that of your data decide
---

# A subject from one picture, for {base}

A LoRA for zero-shot subject-driven video generation ([arXiv 2504.17816](https://arxiv.org/abs/2504.17816)):
one picture of any subject and a prompt make a video of that subject. Trained by sdv.

| | |
|---|---|
| steps | {step:,} |
| data | {pairs:,} pairs of pictures, {clips:,} clips |
| mixture | motion steps with probability {cfg.p_video:g}; in these, {dropped} |
| size | {cfg.frames} frames of {cfg.height} x {cfg.width} at {cfg.fps:g} a second |
| LoRA | {lora} |
| prompts of pictures | begin with `{cfg.cls_token.strip() or "nothing"}` in training, not in use |

Trained by

```
{shlex.join(command)}
```

## Use

{use.format(base=base, folder=f"step-{step:06d}")}
## To be filled in

Licence; whose pictures and clips these are; what it is meant for and what not; what it gets wrong.
"""
