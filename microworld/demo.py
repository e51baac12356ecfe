"""The method in ten minutes on two CPU cores: a world, an adapter, subjects never seen, a page that shows it.

    make demo                 # or: python -m microworld.demo --out out/demo

1. draws picture pairs and a few clips of the micro-world, as ordinary files;
2. trains a fresh adapter on them by train.py, both objectives, with the gradient probe;
3. films subjects that were never seen, by the base, the fresh adapter, and the one shipped in weights/toy;
4. measures who is seen, what motion, where, and how much was pasted, beside real renders;
5. writes out/demo/index.html: one file, no network.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from microworld import studio
from microworld.demo_page import page
from sdv.run.settings import Count, Seed, parse, run


@dataclass(frozen=True)
class Config:
    """the demo"""

    out: str = "out/demo"  # world, run, index.html; what is there already is not made again
    steps: Count = 180  # of the fresh adapter's training
    pairs: Count = 800  # picture pairs
    clips: Count = 64  # clips of other subjects
    cases: Count = 12  # videos of each column, four for a subject
    seed: Seed = 0  # of training and sampling


def main() -> None:
    cfg, start = parse(Config, __doc__), time.perf_counter()
    out = Path(cfg.out).resolve()

    # 1, 2. Train on one world, probe on another one: its subjects come from other numbers.
    data = studio.make_world(out / "world", pairs=cfg.pairs, clips=cfg.clips)
    # The probe's two halves read 3 batches each of 64 pairs and of 8 clips: all of these rows, once.
    unseen = studio.make_world(out / "unseen", pairs=384, clips=48, seed=1)
    probe = {"val_pairs": unseen / "pairs", "val_clips": unseen / "clips", "probe_every": 90}
    few = {"val_batches": 3, "val_every": 0, "cache_frames": 4}  # a few minutes less
    fresh = studio.train(out / "run", data, cfg.steps, seed=cfg.seed, **probe, **few)

    # 3. The same noise in every column.
    base, of = studio.Studio(), studio.cases(cfg.cases)
    columns = {"base, no picture": None, f"fresh, {cfg.steps} steps": fresh, "shipped": studio.SHIPPED}
    bar = tqdm(total=len(columns) * -(-len(of) // base.batch) * base.steps, desc="films", unit="step")
    films = {}
    for name, adapter in columns.items():
        base.put_on(adapter)
        guidance = 1.0 if adapter else studio.BASE_GUIDANCE
        films[name] = base.film(of, cfg.seed, guidance, progress=bar.update)
    bar.close()
    films["a real render"] = studio.renders(of)

    # 4, 5.
    scores = {name: studio.judge(clips, of) for name, clips in films.items()}
    (out / "scores.json").write_text(json.dumps(scores, indent=1))
    made = f"Made by make demo: {cfg.steps} steps on {cfg.pairs} pairs and {cfg.clips} clips, "
    made += f"{(time.perf_counter() - start) / 60:.1f} minutes in all. The base's films have a guidance of "
    made += f"{studio.BASE_GUIDANCE:g} on the text, the adapters' {studio.REF_GUIDANCE:g} on the picture."
    (out / "index.html").write_text(page(out / "run", of, films, scores, made), encoding="utf-8")
    print(f"open {out / 'index.html'}")


if __name__ == "__main__":
    run(main)
