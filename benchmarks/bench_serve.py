"""Requests a second that servers answer within a limit, JPEG in to labels out, and what the server itself costs.

    python benchmarks/bench_serve.py ARTIFACT --limit-ms 50 --out benchmarks/results/DATE-serve.jsonl

The load is open: arrivals are a seeded Poisson process that does not wait for answers, and a latency counts from the
moment of arrival that was intended, so that a server which falls behind cannot hide it. A rate holds where 99 % of the
requests are answered, rightly, within the limit. Each server is a process of its own on the cores that the client has
too. All run from the beginning, and take turns: a trial of each, then the next trial of each. So a bad minute of the
machine is everybody's. What each of them used of the cores is recorded, and a trial that others disturbed is made
again. An answer that is no 200 counts as late. What was measured when Ctrl-C comes is written too.
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
from collections.abc import Callable, Sequence
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


class Search:
    """For the highest rate of one server that holds: upwards until one does not, then by halving between the two."""

    def __init__(self, name: str, sent: Sequence[bytes], process: "subprocess.Popen[bytes]", port: int) -> None:
        self.name, self.sent, self.process, self.port = name, sent, process, port
        self.low, self.high, self.rate = 0.0, math.inf, 0.0
        self.trials: list[dict[str, Any]] = []

    def begin(self, seconds: float) -> None:
        """Answers a second to eight clients say where the search begins."""
        self.rate = 0.8 * asyncio.run(closed_loop(self.port, self.sent, 8, min(2.0, seconds)))

    def step(self, limit_ms: float, seconds: float) -> None:
        """The next trial."""
        before, seed = delays(1.0), len(self.trials)
        trial = alone(self.process, lambda: asyncio.run(open_loop(self.port, self.sent, self.rate, seconds, seed)))
        trial["delays"] = before
        trial["held"] = trial["p99_ms"] is not None and trial["p99_ms"] <= limit_ms
        self.trials.append(trial)
        self.low, self.high = (self.rate, self.high) if trial["held"] else (self.low, self.rate)
        self.rate = self.low * STRIDE if self.high == math.inf else (self.low + self.high) / 2


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
    if given.soak and not given.steps:
        parser.error("--soak goes by the rate that held, and --steps 0 looks for none")
    uvloop.install()  # the client has a part of the same cores
    images = photographs(given.images)
    artifact = manifest.verified(given.artifact)
    facts = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "artifact": given.artifact.resolve().name, "artifact_sha256": artifact.sha256,
        "model": artifact.manifest.model.architecture, "image_size": artifact.manifest.model.image_size,
        "versions": _versions(), "limit_ms": given.limit_ms, "machine": env.machine(),
        "images": "bundled" if given.images is None else given.images.name,
    }  # fmt: skip
    searches: list[Search] = []
    rows: dict[str, dict[str, Any]] = {}
    try:
        for name in given.servers.split(","):
            sent, options = requests(name, images), given.options if name == OURS else ""
            process, port = started(name, given.artifact.resolve(), options.split(), given.workers, sent[0])
            searches.append(Search(name, sent, process, port))
            workers = 1 if name == "fastapi" else given.workers
            rows[name] = {**facts, "server": name, "workers": workers, "options": options}
        for step in range(given.steps):
            for one in searches:
                if not step:
                    one.begin(given.seconds)
                one.step(given.limit_ms, given.seconds)
                _show(one)
        for one in (search for search in searches if search.name == OURS):
            if given.overhead:
                rows[OURS]["overhead"] = overhead(one.port, given.artifact, given.overhead)
            if given.idle:
                rows[OURS]["idle"] = idle(one.process, one.port, one.sent[:1], given.idle)
            if given.soak:
                rows[OURS]["soak"] = soaked(one.process, one.port, one.sent, given.soak_share * one.low, given.soak)
    finally:
        for one in searches:
            ended(one.process)
            if one.trials:
                rows[one.name] |= {"trials": one.trials, "requests_per_s": one.low}
        if given.out is not None:
            with given.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows.values())
    for one in searches:
        more = {what: rows[one.name][what] for what in ("overhead", "idle", "soak") if what in rows[one.name]}
        print(f"{one.name}: {one.low:.0f} requests/s at p99 <= {given.limit_ms:g} ms", more or "")
    ours, others = ([one.low for one in searches if (one.name == OURS) is own] for own in (True, False))
    if any(ours) and any(others):
        print(f"{max(ours) / max(others):.2f} times the best of the others")


def _show(search: Search) -> None:
    trial = search.trials[-1]
    p50, p99 = (f"{trial[key]:.1f}" if trial[key] is not None else "none" for key in ("p50_ms", "p99_ms"))
    cores = ", ".join(f"{name} {used:.2f}" for name, used in trial["cores"].items())
    print(f"{search.name} {trial['rate']:.0f}/s: p50 {p50} ms, p99 {p99} ms, {trial['statuses']}; cores: {cores}")
    print(
        f"    before it, work of {trial['delays']['p50_ms']:.1f} ms took {trial['delays']['longest_ms']:.1f} ms at most"
    )


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
