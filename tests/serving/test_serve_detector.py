"""A detector behind the server: named outputs over both protocols, and what is said where an image is sent."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("tritonclient.grpc", reason="the extra triton is not installed")

import tritonclient.grpc
import tritonclient.http
from detectors import detector, found_by
from server_process import Running, picture, serving, until

from convnext_deploy import api
from convnext_deploy.data import preprocess

SIZE = (64, 96)


@pytest.fixture(scope="module")
def model() -> Any:
    return detector("retinanet")


@pytest.fixture(scope="module")
def one(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("detector") / "m"
    api.export(model, task="detect", out=folder, batch=(1, 2, 2), image_size=SIZE, format="eager")
    with serving(folder, grpc_port=0) as running:
        until(lambda: running.server.grpc_address is not None)
        yield running


@pytest.mark.parametrize("client", [tritonclient.http, tritonclient.grpc])
def test_tritons_clients_get_what_torchvision_finds(one: Running, model: Any, client: Any) -> None:
    pixels = preprocess.probe_images(3, SIZE, 2)
    facts = one.service.models["m"].manifest
    images = client.InferInput("images", (2, 3, *SIZE), "FP32")
    images.set_data_from_numpy(preprocess.as_input(pixels, facts.preprocessing, facts.export.input))
    address = one.server.grpc_address if client is tritonclient.grpc else f"{one.host}:{one.port}"
    with client.InferenceServerClient(address) as asking:
        assert asking.get_model_metadata("m") is not None
        result = asking.infer("m", [images])
        alone = asking.infer("m", [images], outputs=[client.InferRequestedOutput("labels")])
    boxes, scores, labels = (result.as_numpy(name) for name in ("boxes", "scores", "labels"))
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(alone.as_numpy("labels"), labels)
    for index, expected in enumerate(found_by(model, pixels)):
        count = len(expected["scores"])
        assert count > 5
        np.testing.assert_allclose(scores[index, :count], expected["scores"].numpy(), atol=1e-5)
        np.testing.assert_allclose(boxes[index, :count], expected["boxes"].numpy(), atol=1e-3)
        np.testing.assert_array_equal(labels[index, :count], expected["labels"].numpy())
        assert set(labels[index, count:]) <= {-1}


def test_outputs_in_json_have_the_types_of_the_metadata(one: Running) -> None:
    _, metadata, _ = one.ask("GET", "/v2/models/m")
    types = {output["name"]: output["datatype"] for output in metadata["outputs"]}
    assert types == {"boxes": "FP32", "scores": "FP32", "labels": "INT32"}
    zeros = {"name": "images", "shape": [1, 3, *SIZE], "datatype": "FP32", "data": [0] * (3 * SIZE[0] * SIZE[1])}
    status, answer, _ = one.ask("POST", "/v2/models/m/infer", json.dumps({"inputs": [zeros]}).encode())
    assert status == 200
    assert {output["name"]: output["datatype"] for output in answer["outputs"]} == types
    labels = next(output for output in answer["outputs"] if output["name"] == "labels")
    assert all(isinstance(label, int) for label in labels["data"])


def test_an_image_is_refused_in_one_line_that_says_where_boxes_are(one: Running) -> None:
    status, answer, _ = one.ask("POST", "/classify", picture())
    assert status == 400
    assert answer["error"] == "m has no classes; its outputs are at /v2/models/m/infer"
