"""LitServe's interface of `serve_peers.py`: its workers import it by name."""

from typing import Any

import litserve
import numpy as np
from fastapi import Request
from serve_peers import Classifier


class Photographs(litserve.LitAPI):  # type: ignore[misc]  # LitServe is not installed where types are checked
    def __init__(self, artifact: str, threads: int | None, **options: Any) -> None:
        super().__init__(**options)
        self.artifact, self.threads = artifact, threads

    def setup(self, device: str) -> None:
        self.classifier = Classifier(self.artifact, threads=self.threads)

    def decode_request(self, request: Request) -> np.ndarray:
        return self.classifier.input_of(request["image"].file.read())

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(inputs)

    def predict(self, images: np.ndarray) -> np.ndarray:
        return self.classifier.session.run(images)[0]

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        return self.classifier.labels(output)
