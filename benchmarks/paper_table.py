"""How much faster ConvNeXt is than Swin: our measurements beside the ConvNeXt paper's V100 and A100 tables.

    python benchmarks/paper_table.py RESULTS.jsonl [...]

Prints Markdown. A ratio is ConvNeXt's images per second over Swin's, of the same runtime, precision and batch in one
run. "differs" means that the 95 % interval of our ratio does not hold the paper's; it may, for the paper's devices
are GPUs of 2017 and 2020 and its software is of 2021.
"""

import argparse
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

from convnext_deploy.report import markdown, published, results
from convnext_deploy.report.results import Measurement

RESAMPLES, SEED = 2000, 0


def ratio(convnext: Measurement, swin: Measurement) -> tuple[float, float, float]:
    """Speed of ConvNeXt over Swin by the medians, and its 95 % interval from a percentile bootstrap of both."""
    generator = random.Random(SEED)

    def medians(samples: Sequence[float]) -> list[float]:
        return [statistics.median(generator.choices(samples, k=len(samples))) for _ in range(RESAMPLES)]

    drawn = sorted(s / c for c, s in zip(medians(convnext.samples_ms), medians(swin.samples_ms), strict=True))
    middle = statistics.median(swin.samples_ms) / statistics.median(convnext.samples_ms)
    return middle, drawn[round(0.025 * (RESAMPLES - 1))], drawn[round(0.975 * (RESAMPLES - 1))]


def rows_of(measurements: Sequence[Measurement]) -> list[list[str]]:
    """One row a pair, runtime, precision and batch; a pair that was not measured has one row that says so."""
    found = {
        (m.model.partition(".")[0], m.image_size, m.runtime, m.precision, m.batch, m.device): m
        for m in results.latest(measurements)
        if m.valid and m.task == "classify" and m.scope == "compute" and m.scenario == "single-stream"
    }
    rows = []
    for pair in published.PAIRS:
        size = (pair.image_size, pair.image_size)
        v100, a100 = pair.v100[0] / pair.v100[1], pair.a100[0] / pair.a100[1]
        head = [pair.size, str(pair.image_size), f"{v100:.2f}", f"{a100:.2f}"]
        settings = [
            key[2:] for key in found if key[:2] == (pair.convnext, size) and (pair.swin, size, *key[2:]) in found
        ]
        for runtime, precision, batch, device in settings:
            ours, low, high = ratio(
                found[pair.convnext, size, runtime, precision, batch, device],
                found[pair.swin, size, runtime, precision, batch, device],
            )
            rows.append(
                [
                    *head, f"{runtime} {precision}, {device}", str(batch), f"{ours:.2f} ({low:.2f} to {high:.2f})",
                    _verdict(v100, ours, low, high), _verdict(a100, ours, low, high),
                ]
            )  # fmt: skip
        if not settings:
            rows.append([*head, "not measured", "", "", "", ""])
    return rows


def _verdict(theirs: float, ours: float, low: float, high: float) -> str:
    return "agrees" if low <= theirs <= high else f"differs by {ours / theirs - 1:+.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="files that `convnext-deploy bench` wrote")
    args = parser.parse_args()
    columns = ["size", "pixels", "V100, paper", "A100, paper", "runtime", "batch", "ours", "V100", "A100"]
    print(markdown.table(columns, rows_of(results.read(args.results).measurements)))
    print(f"V100: {published.PAPER_V100}. A100: {published.PAPER_A100}.")


if __name__ == "__main__":
    main()
