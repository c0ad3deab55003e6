"""Settings of a server from what `bench --scenario server` measured."""

from pathlib import Path
from typing import Any

from ..errors import DataError, UsageError
from ..timing import compare


def settings(file: Path, sha256: str, slo_ms: float | None) -> tuple[dict[str, Any], str]:
    """Threads, largest batch and limit of the setting that carried the most requests, and a line that says so.

    Args:
        file: rows of `bench --save`.
        sha256: of the artifact's manifest; rows of others are not looked at.
        slo_ms: the limit that is to be kept; None: that of the row.

    Raises:
        UsageError: no row of the artifact carried a rate within the limit.
    """
    try:
        rows = compare.read_results(file)
    except DataError as error:
        raise UsageError(f"--bench {file} contains no rows of `bench --save`: {error}") from None
    carried = [
        (row.server.queries_per_s, row, row.server)
        for row in rows
        if row.artifact_sha256 == sha256 and row.server is not None and row.server.queries_per_s is not None
        if slo_ms is None or row.server.slo_ms <= slo_ms
    ]
    if not carried:
        within = "" if slo_ms is None else f" within {slo_ms:g} ms"
        raise UsageError(
            f"--bench {file} has no rate that this artifact carried{within}; run `bench --scenario server --slo-ms` on "
            "it with --save"
        )
    rate, row, server = max(carried, key=lambda trial: trial[0])
    limit = slo_ms if slo_ms is not None else server.slo_ms
    line = (
        f"as measured: {row.threads} threads, batches of up to {server.max_batch}; {rate:.0f} requests/s kept "
        f"{server.slo_ms:g} ms"
    )
    return {"threads": row.threads, "max_batch": server.max_batch, "slo_ms": limit}, line
