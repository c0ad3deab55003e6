"""The same artifact behind other servers, as their documentation shows it.

    python serve_peers.py NAME ARTIFACT PORT WORKERS

All of them run this package's session and answer the same JSON. They decode and resize an image with Pillow and
normalize it with numpy, as people write it. `fastapi-async-ours` is a coroutine that is given this package's
preparation too, so that only the server differs.
"""

import functools
import os
import sys
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

import convnext_deploy
from convnext_deploy.data import decoding, preprocess, resizing
from convnext_deploy.env import usable_cores
from convnext_deploy.workflows.predict import most_probable


class Classifier:
    """What every server calls.

    Args:
        ours: images are prepared by this package.
    """

    def __init__(self, artifact: str, threads: int | None, ours: bool = False) -> None:
        self.session = convnext_deploy.load(artifact, threads=threads)
        facts = self.session.manifest
        self.facts, self.names, self.ours = facts, facts.labels, ours
        self.to_pixels = preprocess.transform(facts.preprocessing, facts.model.image_size, facts.model.in_chans)
        self.mean, self.std = (
            np.array(values, np.float32) for values in (facts.preprocessing.mean, facts.preprocessing.std)
        )
        self.resampling = resizing.FILTERS[facts.preprocessing.interpolation]

    def input_of(self, content: bytes) -> np.ndarray:
        if self.ours:
            decoded = decoding.photograph(content)
            pixels = self.to_pixels(Image.open(BytesIO(content)) if decoded is None else decoded)
            return preprocess.as_input(pixels[None], self.facts.preprocessing, self.facts.export.input)
        image = Image.open(BytesIO(content)).convert("L" if self.facts.model.in_chans == 1 else "RGB")
        height, width = self.facts.model.image_size
        scale = int(height / self.facts.preprocessing.crop_pct) / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), self.resampling)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        pixels = np.asarray(image.crop((left, top, left + width, top + height))).reshape(1, height, width, -1)
        if self.facts.export.input == "uint8":
            return pixels
        return np.ascontiguousarray(((pixels / np.float32(255) - self.mean) / self.std).transpose(0, 3, 1, 2))

    def labels(self, logits: np.ndarray) -> dict[str, Any]:
        found = most_probable(logits, 5, self.names)
        return {"classes": [{"name": one.name, "probability": one.probability} for one in found]}


def threads_of(workers: int) -> int | None:
    """Of each worker's session: they share the cores."""
    return None if workers == 1 else max(1, usable_cores() // workers)


def fastapi(artifact: str, port: int, workers: int) -> None:
    """A function of FastAPI's thread pool, in one process; every request is a batch of one."""
    import uvicorn
    from fastapi import FastAPI, UploadFile

    model = Classifier(artifact, threads=None)
    app = FastAPI()

    @app.post("/classify")  # type: ignore[untyped-decorator]  # FastAPI is not installed where this is checked
    def classify(image: UploadFile) -> dict[str, Any]:
        (logits,) = model.session.run(model.input_of(image.file.read()))
        return model.labels(logits[0])

    uvicorn.run(app, port=port, log_level="error")


def fastapi_async(artifact: str, port: int, workers: int, ours: bool = False) -> None:
    """The same as a coroutine, which computes in the event loop."""
    import uvicorn

    os.environ["ARTIFACT"], os.environ["WORKERS"] = artifact, str(workers)
    os.environ["OURS"] = str(int(ours))
    uvicorn.run("serve_peers:coroutine", factory=True, port=port, workers=workers, log_level="error")


def coroutine() -> Any:
    """FastAPI's application, made in each of uvicorn's workers."""
    from fastapi import FastAPI, UploadFile

    workers, ours = int(os.environ["WORKERS"]), os.environ["OURS"] == "1"
    model = Classifier(os.environ["ARTIFACT"], threads=threads_of(workers), ours=ours)
    app = FastAPI()

    @app.post("/classify")  # type: ignore[untyped-decorator]  # FastAPI is not installed where this is checked
    async def classify(image: UploadFile) -> dict[str, Any]:
        (logits,) = model.session.run(model.input_of(await image.read()))
        return model.labels(logits[0])

    return app


def litserve(artifact: str, port: int, workers: int) -> None:
    """LitServe with batches of up to 8; one worker is its default."""
    import litserve as ls
    from litserve_model import Photographs

    api = Photographs(artifact, threads_of(workers), max_batch_size=8, batch_timeout=0.002, api_path="/classify")
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=workers, timeout=30)
    server.run(port=port, host="127.0.0.1", num_api_servers=workers, generate_client_file=False, log_level="error")


def mlserver(artifact: str, port: int, workers: int) -> None:
    """MLServer with its adaptive batching, batches of up to 8; several workers are its parallel ones."""
    import asyncio

    from mlserver import MLServer, ModelSettings, Settings
    from mlserver.settings import ModelParameters

    settings = Settings(
        http_port=port,
        grpc_port=port + 1,
        metrics_port=port + 2,
        host="127.0.0.1",
        debug=False,
        parallel_workers=0 if workers == 1 else workers,
    )
    model = ModelSettings(
        name="m",
        implementation="mlserver_model.Photographs",
        max_batch_size=8,
        max_batch_time=0.002,
        parameters=ModelParameters(uri=artifact, extra={"threads": threads_of(workers)}),
    )

    async def serve() -> None:
        await MLServer(settings).start([model])

    asyncio.run(serve())


if __name__ == "__main__":
    servers: dict[str, Callable[[str, int, int], None]] = {
        "fastapi": fastapi, "fastapi-async": fastapi_async, "litserve": litserve, "mlserver": mlserver,
        "fastapi-async-ours": functools.partial(fastapi_async, ours=True),
    }  # fmt: skip
    servers[sys.argv[1]](sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
