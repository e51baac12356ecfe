"""The model card beside a saved adapter: what it was made of, and how it is used."""

import shlex
from pathlib import Path

from torch import nn

from sdv.lora import strengths
from sdv.objectives import TASKS
from sdv.run.parallel import ranks

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


def base_name(backbone: str) -> str:
    """What a hub calls it: the folder's name or, in a cache of Hugging Face, that of the repository."""
    path = Path(backbone).resolve()
    if path.parent.name == "snapshots":
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name


def model_card(
    cfg: object, dit: nn.Module, stock: bool, rows: dict[str, int], step: int, command: list[str]
) -> str:
    """Markdown with the front matter that hubs read.

    cfg: train.py's settings; dit: has the LoRA; stock: whether diffusers can run it; rows: of each task.
    """
    base, world = base_name(cfg.backbone), ranks()[1]
    pairs, clips = rows.get("identity", 0), rows.get("motion", 0)
    has = strengths(dit).items()
    lora = ", ".join(f"{name} {'/'.join(f'{n:g}' for n in sorted(values))}" for name, values in has)
    if cfg.adapter:
        lora += f", begun from {Path(cfg.adapter).name}"
    batches = [getattr(cfg, f"{task}_batch") * cfg.accumulate * world for task in TASKS]
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
| batch of a step | {batches[0]} pairs or {batches[1]} clips, in {world} process{"es" * (world > 1)} |
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
