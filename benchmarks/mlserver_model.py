"""MLServer's runtime of `serve_peers.py`: it imports models by their module's name."""

import asyncio
import base64
import json

import numpy as np
from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput
from serve_peers import Classifier


class Photographs(MLModel):  # type: ignore[misc]  # MLServer is not installed where types are checked
    async def load(self) -> bool:
        self.classifier = Classifier(self.settings.parameters.uri, threads=self.settings.parameters.extra["threads"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        return await asyncio.get_running_loop().run_in_executor(None, self._predicted, payload)

    def _predicted(self, payload: InferenceRequest) -> InferenceResponse:
        files = [base64.b64decode(text) for text in payload.inputs[0].data]
        (logits,) = self.classifier.session.run(np.concatenate([self.classifier.input_of(file) for file in files]))
        labels = [json.dumps(self.classifier.labels(one)) for one in logits]
        output = ResponseOutput(name="labels", shape=[len(labels), 1], datatype="BYTES", data=labels)
        return InferenceResponse(model_name=self.name, outputs=[output])
