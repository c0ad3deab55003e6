"""How a benchmark's result is written: one JSON line with every sample, the machine and the versions."""

import datetime
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convnext_deploy import env

RESULTS = Path(__file__).resolve().parent / "results"


def append(record: dict[str, Any], file_name: str = "cpu") -> None:
    """Add the record to this date's file of that name and print it without its samples."""
    now = datetime.datetime.now(datetime.timezone.utc)
    full = {"time": now.isoformat(timespec="seconds"), **record, "machine": env.machine(), "versions": env.versions()}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{now.date()}-{file_name}.jsonl").open("a") as file:
        file.write(json.dumps(full) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "samples"}), flush=True)


def median_and_spread(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (samples[0],) * 3
    return {"median": middle, "quartile1": low, "quartile3": high}
