"""Requests a second that servers answer within a limit, JPEG in to labels out, and what the server itself costs.

    python benchmarks/bench_serve.py ARTIFACT --limit-ms 50 --out benchmarks/results/DATE-serve.jsonl

The load is open: arrivals are a seeded Poisson process that does not wait for answers, and a latency counts from the
moment of arrival that was intended, so that a server which falls behind cannot hide it. A rate holds where 99 % of the
requests are answered, rightly, within the limit. Each server is a process of its own on the cores that the client has
too; they are measured one after another, in one run. What each of them used of the cores is recorded, and a trial that
others disturbed is made again. An answer that is no 200 counts as late.
What `--out` has already is not measured again, so that a run which was cut off goes on.
"""

import argparse
import asyncio
import base64
import contextlib
import datetime
import hashlib
import json
import math
import os
import resource
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

import convnext_deploy
from convnext_deploy import env
from convnext_deploy.artifact import manifest
from convnext_deploy.serving.options import ServeOptions
from convnext_deploy.timing.scenarios import poisson_arrivals

HERE = Path(__file__).resolve().parent
PHOTOGRAPHS = Path(convnext_deploy.__file__).parent / "data" / "images"
CONNECTIONS = 512
STRIDE = 1.15  # between two rates, until one does not hold
OURS = "convnext-deploy serve"
PEERS = ("fastapi", "fastapi-async", "fastapi-async-ours", "litserve", "mlserver")
TRIES = 3
OTHERS = 0.15  # cores that others may use during a trial
PHOTOS = 64  # of `--images`, one after another


class Connection(asyncio.Protocol):
    """One keep-alive connection, which has one request under way at most."""

    def __init__(self, client: "Client") -> None:
        self._client, self._buffer = client, bytearray()
        self.answer: asyncio.Future[int] | None = None
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.open = transport, True

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        self._client.open -= 1
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(0)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head = self._buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        lines = bytes(self._buffer[:head]).lower().split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        if len(self._buffer) < head + 4 + length:
            return
        status = int(lines[0].split(b" ")[1])
        self._buffer.clear()
        if b"connection: close" not in lines:
            self._client.free.append(self)
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(status)

    def send(self, request: bytes) -> "asyncio.Future[int]":
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)  # type: ignore[attr-defined]
        return self.answer


class Client:
    def __init__(self, port: int) -> None:
        self.port = port
        self.free: deque[Connection] = deque()
        self.open = 0

    async def ask(self, request: bytes) -> int:
        """The status; 0 where the connection broke or there are too many."""
        while self.free:
            connection = self.free.popleft()
            if connection.open:
                return await connection.send(request)
        if self.open >= CONNECTIONS:
            return 0
        self.open += 1
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(self), "127.0.0.1", self.port
            )
        except OSError:
            self.open -= 1
            return 0
        return await connection.send(request)


def photographs(table: Path | None) -> list[bytes]:
    """JPEG files: those that come with the package, or the first of a Parquet table's column `image`."""
    if table is None:
        return [file.read_bytes() for file in sorted(PHOTOGRAPHS.glob("*.jpg"))]
    import pyarrow.parquet

    return [one["bytes"] for one in pyarrow.parquet.read_table(table, columns=["image"])["image"][:PHOTOS].to_pylist()]


def requests(server: str, images: Sequence[bytes]) -> list[bytes]:
    """Of each a form as `curl -F` sends it; for MLServer in base64, as its protocol has bytes."""
    made = []
    for content in images:
        if server == "mlserver":
            text = base64.b64encode(content).decode()
            tensor = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": [text]}
            body = json.dumps({"inputs": [tensor]}).encode()
            head = (
                "POST /v2/models/m/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            made.append(head.encode() + body)
            continue
        body = (
            b'--x\r\nContent-Disposition: form-data; name="image"; filename="photo.jpg"\r\n'
            b"Content-Type: image/jpeg\r\n\r\n" + content + b"\r\n--x--\r\n"
        )
        head = (
            "POST /classify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        made.append(head.encode() + body)
    return made


async def closed_loop(port: int, sent: Sequence[bytes], clients: int, seconds: float) -> float:
    """Answers a second to so many clients that ask again at once: where the search for a rate begins."""
    client, done, end = Client(port), 0, time.perf_counter() + seconds

    async def ask(number: int) -> None:
        nonlocal done
        while time.perf_counter() < end:
            status = await client.ask(sent[number % len(sent)])
            done += status == 200  # after the wait: others add to it meanwhile

    await asyncio.gather(*(ask(number) for number in range(clients)))
    return done / seconds


async def open_loop(port: int, sent: Sequence[bytes], rate: float, seconds: float, seed: int) -> dict[str, Any]:
    """One trial: latencies from the intended arrivals, in milliseconds; infinite for what was not answered."""
    arrivals = poisson_arrivals(rate, max(50, round(rate * seconds)), seed)
    client = Client(port)
    latencies = np.full(len(arrivals), math.inf)
    statuses: dict[int, int] = {}
    begin = time.perf_counter() + 0.05

    async def ask(index: int) -> None:
        status = await client.ask(sent[index % len(sent)])
        statuses[status] = statuses.get(status, 0) + 1
        if status == 200:
            latencies[index] = (time.perf_counter() - begin - arrivals[index]) * 1e3

    tasks = []
    for index, moment in enumerate(arrivals):
        pause = begin + moment - time.perf_counter()
        if pause > 0:
            await asyncio.sleep(pause)
        tasks.append(asyncio.ensure_future(ask(index)))
    await asyncio.wait(tasks, timeout=10)
    for task in tasks:
        task.cancel()
    ordered = np.sort(latencies)

    def quantile(fraction: float) -> float | None:
        value = float(ordered[math.ceil(fraction * len(ordered)) - 1])
        return value if math.isfinite(value) else None

    return {
        "rate": rate, "requests": len(arrivals), "seed": seed, "p50_ms": quantile(0.5), "p99_ms": quantile(0.99),
        "statuses": statuses,
    }  # fmt: skip


def started(
    name: str, artifact: Path, options: Sequence[str], workers: int, first: bytes
) -> tuple[subprocess.Popen[bytes], int]:
    """A server that answers, and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(HERE / "serve_peers.py"), name, str(artifact), str(port), str(workers)]
    if name == OURS:
        command = [sys.executable, "-m", "convnext_deploy", "serve", str(artifact), "--port", str(port), "-q", *options]
        command += ["--workers", str(workers)] if workers > 1 else []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True, cwd=HERE)
    end = time.monotonic() + 40
    while time.monotonic() < end:
        try:
            status = asyncio.run(asyncio.wait_for(Client(port).ask(first), 5))
        except (OSError, asyncio.TimeoutError):
            status = 0
        if status == 200:
            return process, port
        if process.poll() is not None:
            break
        time.sleep(0.1)
    ended(process)
    raise SystemExit(f"{name} does not answer")


def ended(process: subprocess.Popen[bytes]) -> None:
    """The server and the processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def busy(server: int) -> tuple[float, float, float]:
    """Seconds of cores: of a process and all below it, of everything on this machine, and what its host took away."""
    parents, used = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)], used[int(stat.parent.name)] = int(fields[1]), sum(map(int, fields[11:13]))

    def below(process: int) -> bool:
        return process == server or (process in parents and below(parents[process]))

    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, softirq, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
    own = sum(seconds for process, seconds in used.items() if below(process))
    return own / ticks, (user + nice + system + irq + softirq) / ticks, stolen / ticks


def alone(process: subprocess.Popen[bytes], trial: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A trial, made again where others used the cores meanwhile."""
    for left in reversed(range(TRIES)):
        own, all_of_it, stolen, begin, used = *busy(process.pid), time.perf_counter(), time.process_time()
        found = trial()
        seconds, client = time.perf_counter() - begin, time.process_time() - used
        before = own, all_of_it, stolen
        own, all_of_it, stolen = (now - then for now, then in zip(busy(process.pid), before, strict=True))
        found["cores"] = {
            "server": own / seconds, "client": client / seconds, "others": (all_of_it - own - client) / seconds,
            "stolen": stolen / seconds,
        }  # fmt: skip
        if found["cores"]["others"] < OTHERS or not left:
            return found
    raise AssertionError


def searched(
    process: subprocess.Popen[bytes], port: int, sent: Sequence[bytes], limit_ms: float, seconds: float, steps: int
) -> tuple[float, list[dict[str, Any]]]:
    """The highest rate that held: upwards until one does not, then by halving between the two."""
    capacity = asyncio.run(closed_loop(port, sent, 8, min(2.0, seconds)))
    low, high, trials = 0.0, math.inf, []
    rate = 0.8 * capacity
    for step in range(steps):
        trial = alone(process, lambda: asyncio.run(open_loop(port, sent, rate, seconds, seed=step)))  # noqa: B023
        trial["held"] = trial["p99_ms"] is not None and trial["p99_ms"] <= limit_ms
        trials.append(trial)
        low, high = (rate, high) if trial["held"] else (low, rate)
        rate = low * STRIDE if high == math.inf else (low + high) / 2
    return low, trials


def soaked(
    process: subprocess.Popen[bytes], port: int, sent: Sequence[bytes], rate: float, seconds: float
) -> dict[str, Any]:
    """A long trial at one rate, in parts: what was not answered, and the resident memory after each part."""
    parts = 10
    found: dict[str, Any] = {"rate": rate, "seconds": seconds, "requests": 0, "statuses": {}, "resident_mb": []}
    for part in range(parts):
        trial = asyncio.run(open_loop(port, sent, rate, seconds / parts, seed=part))
        found["requests"] += trial["requests"]
        for status, count in trial["statuses"].items():
            found["statuses"][status] = found["statuses"].get(status, 0) + count
        found["resident_mb"].append(resident_mb(process))
    return found


def resident_mb(process: subprocess.Popen[bytes]) -> float:
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def idle(process: subprocess.Popen[bytes], port: int, sent: Sequence[bytes], count: int) -> dict[str, Any]:
    """Requests one after another before, and beside, connections that ask nothing; half have asked once."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    found: dict[str, Any] = {"before": one_by_one(port, sent), "before_mb": resident_mb(process)}
    with contextlib.ExitStack() as opened:
        for number in range(count):
            one = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
            if number % 2:
                one.sendall(b"GET /healthz HTTP/1.1\r\nHost: idle\r\n\r\n")
                assert one.recv(1000).startswith(b"HTTP/1.1 200")
        found |= {"connections": count, "beside": one_by_one(port, sent), "beside_mb": resident_mb(process)}
    return found


def delays(seconds: float = 5.0) -> dict[str, float]:
    """What equal short pieces of work take while nothing else runs. A limit near the longest shows chance."""
    data, end, taken = bytes(2_000_000), time.perf_counter() + seconds, []
    while time.perf_counter() < end:
        time.sleep(0.003)
        start = time.perf_counter()
        hashlib.sha256(data)
        taken.append((time.perf_counter() - start) * 1e3)
    return {"p50_ms": float(np.median(taken)), "p99_ms": float(np.quantile(taken, 0.99)), "longest_ms": max(taken)}


def one_by_one(port: int, sent: Sequence[bytes], count: int = 300) -> dict[str, float]:
    """Median and 99th percentile of requests that wait for one another, milliseconds."""

    async def ask() -> list[float]:
        client, taken = Client(port), []
        for _ in range(count):
            start = time.perf_counter()
            assert await client.ask(sent[0]) == 200
            taken.append((time.perf_counter() - start) * 1e3)
        return taken

    taken = asyncio.run(ask())
    return {"p50_ms": float(np.quantile(taken, 0.5)), "p99_ms": float(np.quantile(taken, 0.99))}


def overhead(port: int, artifact: Path, count: int) -> dict[str, float]:
    """What the server adds to the session for a batch of one tensor: medians in turn, milliseconds."""
    import http.client

    session = convnext_deploy.load(artifact, threads=ServeOptions().run.threads)
    facts = session.manifest
    record = facts.inputs[0]
    shape = [1, *(side for side in record.shape[1:] if isinstance(side, int))]
    images = np.random.default_rng(0).integers(0, 256, shape).astype(record.dtype)
    name = artifact.resolve().name
    datatype = {"uint8": "UINT8", "float32": "FP32"}[record.dtype]
    tensor = {
        "name": record.name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": images.nbytes}
    }  # fmt: skip
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    body, headers = head + images.tobytes(), {"Inference-Header-Content-Length": str(len(head))}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    alone, served = [], []
    for _ in range(count):
        start = time.perf_counter()
        session.run(images)
        alone.append(time.perf_counter() - start)
        start = time.perf_counter()
        connection.request("POST", f"/v2/models/{name}/infer", body, headers)
        assert connection.getresponse().read()
        served.append(time.perf_counter() - start)
    connection.close()
    one, other = float(np.median(alone)) * 1e3, float(np.median(served)) * 1e3
    return {"session_p50_ms": one, "served_p50_ms": other, "overhead_p50_ms": other - one}


def measured(out: Path | None, conditions: Mapping[str, Any]) -> dict[str, Any] | None:
    """The last row with trials that a file has under these conditions."""
    if out is None or not out.exists():
        return None
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    same = [row for row in rows if "trials" in row and all(row[key] == value for key, value in conditions.items())]
    return same[-1] if same else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--limit-ms", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a trial")
    parser.add_argument("--steps", type=int, default=4, help="trials of a server")
    parser.add_argument("--servers", default=",".join((OURS, *PEERS)))
    parser.add_argument("--workers", type=int, default=1, help="processes of each server")
    parser.add_argument("--idle", type=int, default=0, help="connections that stay open and ask nothing meanwhile")
    parser.add_argument("--options", default="", help="of `convnext-deploy serve`, separated by spaces")
    parser.add_argument("--overhead", type=int, default=0, help="requests that measure what the server adds")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds that this package's server is under load")
    parser.add_argument("--soak-share", type=float, default=0.9, help="of the rate that held, which it is under")
    parser.add_argument("--out", type=Path, help="a JSON line a server is appended")
    parser.add_argument("--images", type=Path, help="a Parquet table of photographs instead of the bundled ones")
    given = parser.parse_args()
    uvloop.install()  # the client has a part of the same cores
    images = photographs(given.images)
    artifact = manifest.verified(given.artifact)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    rates: dict[str, float] = {}
    for name in given.servers.split(","):
        conditions = {
            "server": name, "artifact_sha256": artifact.sha256, "limit_ms": given.limit_ms,
            "workers": 1 if name == "fastapi" else given.workers, "options": given.options if name == OURS else "",
            "images": "bundled" if given.images is None else given.images.name, "machine": env.machine(),
        }  # fmt: skip
        kept = measured(given.out, conditions)
        if kept is not None and given.steps and not (given.overhead or given.idle or given.soak):
            rates[name] = kept["requests_per_s"]
            print(f"{name}: {rates[name]:.1f} requests/s, measured at {kept['created']}")
            continue
        sent = requests(name, images)
        alone_ms = delays()
        process, port = started(name, given.artifact.resolve(), given.options.split(), given.workers, sent[0])
        try:
            row: dict[str, Any] = {
                "created": now, "artifact": given.artifact.resolve().name,
                "model": artifact.manifest.model.architecture, "image_size": artifact.manifest.model.image_size,
                "versions": _versions(), "delays": alone_ms, **conditions,
            }  # fmt: skip
            if given.steps:
                rates[name], row["trials"] = searched(process, port, sent, given.limit_ms, given.seconds, given.steps)
                row["requests_per_s"] = rates[name]
            if given.overhead and name == OURS:
                row["overhead"] = overhead(port, given.artifact, given.overhead)
            if given.idle and name == OURS:
                row["idle"] = idle(process, port, sent[:1], given.idle)
            if given.soak and name == OURS:
                row["soak"] = soaked(process, port, sent, given.soak_share * rates[name], given.soak)
        finally:
            ended(process)
        print(
            f"{name}: {rates.get(name, 0):.0f} requests/s at p99 <= {given.limit_ms:g} ms",
            row.get("overhead", ""),
            row.get("idle", ""),
            row.get("soak", ""),
        )
        print(f"    before it, work of {alone_ms['p50_ms']:.1f} ms took {alone_ms['longest_ms']:.1f} ms at most")
        for trial in row.get("trials", ()):
            p50, p99 = (f"{trial[key]:.1f}" if trial[key] is not None else "none" for key in ("p50_ms", "p99_ms"))
            cores = ", ".join(f"{name} {used:.2f}" for name, used in trial["cores"].items())
            print(f"    {trial['rate']:.0f}/s: p50 {p50} ms, p99 {p99} ms, {trial['statuses']}; cores: {cores}")
        if given.out is not None:
            with given.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    others = [rate for name, rate in rates.items() if name != OURS]
    if rates.get(OURS) and others and max(others):
        print(f"{rates[OURS] / max(others):.2f} times the best of the others")


def _versions() -> dict[str, str]:
    import importlib.metadata

    names = (
        "uvicorn",
        "starlette",
        "uvloop",
        "httptools",
        "fastapi",
        "litserve",
        "mlserver",
        "numpy",
        "pillow",
        "simplejpeg",
    )
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
