"""Start-up time of `convnext-deploy --help`, which must not import a framework.

    python benchmarks/bench_startup.py [--runs 20] [--limit 0.3]

Appends one JSON line to benchmarks/results/; exits 1 where the median is above the limit.
"""

import argparse
import subprocess
import sys
import time

from records import append, median_and_spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--limit", type=float, default=0.3, help="seconds")
    args = parser.parse_args()
    command = [sys.executable, "-m", "convnext_deploy", "--help"]
    samples = []
    for _ in range(args.runs + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        samples.append(time.perf_counter() - start)
    samples = samples[1:]  # the first one fills the page cache
    record = {"benchmark": "startup", "what": "--help", "unit": "s", "samples": samples, **median_and_spread(samples)}
    append(record)
    if record["median"] > args.limit:
        sys.exit(f"--help takes {record['median']:.3f} s, above {args.limit} s")


if __name__ == "__main__":
    main()
