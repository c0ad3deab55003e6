"""How much faster ConvNeXt is than Swin: our measurements beside the ConvNeXt paper's V100 and A100 tables.

    python benchmarks/paper_table.py RESULTS.jsonl [...]

Takes what `convnext-deploy bench --compare swin --save RESULTS.jsonl` wrote and prints Markdown. A ratio is Swin's time
over ConvNeXt's, of the same runtime, precision and batch in one run, turn by turn, with its 95 % interval (`regress`).
"differs" means that the interval does not hold the paper's; it may, for the paper's devices are GPUs of 2017 and 2020
and its software is of 2021. What did not settle, or was disturbed, is marked with its state.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from convnext_deploy.records.timing import BenchResult
from convnext_deploy.reports import markdown, published
from convnext_deploy.timing import compare

COLUMNS = ["size", "pixels", "runtime", "batch", "ConvNeXt, ms", "Swin, ms", "Swin / ConvNeXt", "V100", "A100"]


def pairs(rows: Sequence[BenchResult]) -> Iterator[tuple[BenchResult, BenchResult, compare.Interval]]:
    """Each ConvNeXt with the Swin of its size that took turns with it, and the ratio of their times."""
    for ours in rows:
        family, _, size = ours.model.partition(".")[0].partition("_")
        if family != "convnext":
            continue
        for theirs in rows:
            same = (theirs.run, theirs.runtime, theirs.precision, compare.setting(theirs)) == (
                ours.run, ours.runtime, ours.precision, compare.setting(ours)
            )  # fmt: skip
            if same and theirs.model.startswith(f"swin_{size}_") and ours.turns and theirs.turns:
                ratio = compare.ratio_of_turns(compare.blocks_ms(theirs), compare.blocks_ms(ours))
                if ratio is not None:
                    yield ours, theirs, ratio


def rows_of(rows: Sequence[BenchResult]) -> list[list[str]]:
    """One row a pair, runtime, precision and batch, and one for each pair of the paper that was not measured."""
    papers = {(pair.convnext, (pair.image_size, pair.image_size)): pair for pair in published.PAIRS}
    lines, measured = [], set()
    for ours, theirs, (ratio, low, high) in pairs(rows):
        key = (ours.model.partition(".")[0], ours.image_size)
        pair = papers.get(key) if ours.task == "classify" else None
        measured.add(key if pair else None)
        sides = "x".join(map(str, ours.image_size)) if pair is None else str(pair.image_size)
        beside = [_beside(paper, low, high, ratio) for paper in (pair.v100, pair.a100)] if pair else ["", ""]
        lines.append(
            [
                ours.model.partition("_")[2] + (" features" if ours.task == "features" else ""), sides,
                f"{ours.runtime} {ours.precision}", str(ours.batch), _time(ours), _time(theirs),
                f"{ratio:.2f} ({low:.2f} to {high:.2f})", *beside,
            ]
        )  # fmt: skip
    for key, pair in papers.items():
        if key not in measured:
            published_ratios = [f"{paper[0] / paper[1]:.2f}" for paper in (pair.v100, pair.a100)]
            row = [key[0].partition("_")[2], str(pair.image_size), "not measured", "", "", "", "", *published_ratios]
            lines.append(row)
    return lines


def _beside(paper: tuple[float, float], low: float, high: float, ratio: float) -> str:
    theirs = paper[0] / paper[1]
    return f"{theirs:.2f}, " + ("agrees" if low <= theirs <= high else f"differs by {ratio / theirs - 1:+.0%}")


def _time(row: BenchResult) -> str:
    time = "" if row.median_ms is None else f"{row.median_ms:.{0 if row.median_ms >= 100 else 1}f}"
    return time if row.status == "valid" else f"{time} ({row.status})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="files that `convnext-deploy bench` wrote")
    args = parser.parse_args()
    rows = [row for path in args.results for row in compare.read_results(path)]
    print(markdown.table(COLUMNS, rows_of(rows)))
    print(f"V100: {published.PAPER_V100}. A100: {published.PAPER_A100}.")


if __name__ == "__main__":
    main()
