"""What the processes of one server ask each other: measurements, a reload, the state of the comparison.

Each listens on a socket of the file system, in a folder that is its user's alone. A question is one line, and its
answer goes on until the connection ends.
"""

import asyncio
import contextlib
import os
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ..errors import ConvNextDeployError
from .metrics import Collected
from .service import Service

_Reloaded = tuple[bool, list[str]]  # whether it was done, and the lines that say so
Question = Literal["metrics", "reload", "shadow"]
ANSWER_S = 600.0  # that a reload may take


class Siblings:
    """The processes of one server.

    Args:
        service: of this process.
        paths: of their sockets, in their order.
        place: of this process among them.
    """

    def __init__(self, service: Service, paths: Sequence[str], place: int) -> None:
        self._service, self._paths, self._place = service, tuple(paths), place

    async def listen(self) -> asyncio.Server:
        """Answer the others from now on."""
        path = self._paths[self._place]
        with contextlib.suppress(FileNotFoundError):  # of a process that was killed
            os.unlink(path)
        return await asyncio.start_unix_server(self._answer, path)

    async def metrics(self) -> bytes:
        """The measurements of all, each with the number of its process; of one that is being replaced, none."""
        texts = await asyncio.gather(*(self._ask(place, "metrics") for place in range(len(self._paths))))
        return await asyncio.to_thread(merged, texts)

    async def reload(self) -> tuple[bool, list[str]]:
        """Whether all have reloaded, and what they say."""
        answers = await asyncio.gather(*(self._ask(place, "reload") for place in range(len(self._paths))))
        results = [
            msgspec.json.decode(answer, type=_Reloaded) if answer else (False, ["it does not answer"])
            for answer in answers
        ]
        lines = [f"worker {place}: {line}" for place, (_, said) in enumerate(results) for line in said]
        return all(done for done, _ in results), lines

    async def shadow(self) -> dict[str, Any] | None:
        """The comparison's state: the first process has it."""
        answer = await self._ask(0, "shadow")
        return None if answer is None else msgspec.json.decode(answer)

    async def _ask(self, place: int, question: Question) -> bytes | None:
        try:
            reader, writer = await asyncio.open_unix_connection(self._paths[place])
        except OSError:
            return None
        try:
            writer.write(question.encode() + b"\n")
            return await asyncio.wait_for(reader.read(), ANSWER_S) or None
        except (OSError, asyncio.TimeoutError):
            return None
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            question = (await reader.readline()).decode().strip()
            if question == "metrics":
                writer.write(await asyncio.to_thread(self._service.metrics.text))
            elif question == "reload":
                writer.write(msgspec.json.encode(await asyncio.to_thread(self._reloaded)))
            elif question == "shadow":
                beside = self._service.shadow
                writer.write(msgspec.json.encode(None if beside is None else await asyncio.to_thread(beside.state)))
            await writer.drain()
        except OSError:
            return  # whoever asked is gone
        finally:
            writer.close()

    def _reloaded(self) -> _Reloaded:
        try:
            return True, self._service.reload()
        except ConvNextDeployError as error:
            return False, [str(error)]


def merged(texts: Sequence[bytes | None]) -> bytes:
    """Measurements as Prometheus reads them, of several processes, with the label `worker`."""
    families: dict[str, Metric] = {}
    for worker, text in enumerate(texts):
        for family in text_string_to_metric_families((text or b"").decode()):
            kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            kept.samples += [
                sample._replace(labels={**sample.labels, "worker": str(worker)}) for sample in family.samples
            ]
    registry = CollectorRegistry()
    registry.register(Collected(families.values))
    return generate_latest(registry)
