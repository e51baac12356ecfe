"""What the micro-world's studies make of their numbers: verdicts, and what stays of the probes."""

import statistics

from microworld import claims, gradients
from sdv.run import report as diagnostics_report


def rows_of(name: str, guidance: str, top1: list[float], colour: list[float]) -> list[dict[str, str]]:
    """Rows of claims.csv, all other measures 0.5."""
    rest = dict.fromkeys(claims.MEASURES, "0.5") | {"row": name, "ref_guidance": guidance}
    return [rest | {"top1": str(a), "colour": str(b)} for a, b in zip(top1, colour, strict=True)]


def test_a_verdict_needs_a_gap_wider_than_the_seeds_and_each_guidance_has_its_own():
    rows = rows_of("full recipe", "1", [0.5, 0.6, 0.7], [0.5, 0.6, 0.7])
    rows += rows_of(
        "video only", "1", [0.1, 0.1, 0.1], [0.4, 0.5, 0.6]
    )  # 0.5 and 0.1 below, deviation 0.1 each
    rows += rows_of("full recipe", "2.5", [0.1, 0.1, 0.1], [0.6, 0.6, 0.6])
    rows += rows_of("video only", "2.5", [0.5, 0.6], [0.5, 0.5])
    text = claims.report(rows)
    without, guided = text.split("## Guidance on the reference 2.5")

    def verdict(part: str, measure: str) -> str:
        claim = next(c for c in claims.CLAIMS if c.words == "switching learns identity")
        start = f"| {claim.words} | {claim.paper} | {measure} | "
        return next(line for line in part.splitlines() if line.startswith(start)).removeprefix(start)

    assert verdict(without, "top1") == "shown (0.600 against 0.100) |"
    assert verdict(without, "colour") == "not shown (0.600 against 0.500) |"
    assert verdict(guided, "top1") == "0.100 against 0.550, fewer than three seeds |"
    assert f"| full recipe | 3 | 0.600 ± {statistics.stdev([0.5, 0.6, 0.7]):.3f}" in without
    assert "not run" in guided


def test_runs_of_other_lengths_are_not_taken_for_seeds(tmp_path):
    lines = ["row,seed,steps,cases", "full recipe,0,1200,40", "full recipe,0,1500,40", "full recipe,1,1200,8"]
    (tmp_path / "claims.csv").write_text("\n".join(lines))
    cfg = claims.Config(steps=1200, cases=40)
    assert [row["seed"] for row in claims.alike(tmp_path / "claims.csv", cfg)] == ["0"]


def test_what_stays_of_probes_gives_the_same_table_and_can_be_drawn():
    folder = gradients.HERE / "first-base/full-recipe-0"
    rows = diagnostics_report.read(folder)
    whole = [row | {"columns": [*row["columns"], "left nearest"]} for row in rows]
    for row in whole:
        row["modules"] = {p: {k: [*c, 12.345] for k, c in m.items()} for p, m in row["modules"].items()}
    assert gradients.thin(whole, drawn=True) == rows
    bare = gradients.thin(whole, drawn=False)
    assert [row["whole"] for row in bare] == [row["whole"] for row in rows]
    assert all(not row["modules"] for row in bare)
    assert diagnostics_report.draw([("bare", bare[:3])]).startswith(b"\x89PNG")
