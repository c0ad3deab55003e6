"""The server for gRPC, asked by Triton's own client: what it answers, and the codes of what it refuses."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")
pytest.importorskip("grpc", reason="the extra triton is not installed")

import tritonclient.grpc as triton
from server_process import Running, serving, until

import convnext_deploy
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.errors import UsageError
from convnext_deploy.serving import rpc

SIDE = 64


@pytest.fixture(scope="module")
def artifact(artifact_of: Callable[..., Artifact]) -> Artifact:
    return artifact_of("onnx", input="uint8")


def client_of(running: Running) -> Any:
    until(lambda: running.server.grpc_address is not None)
    return triton.InferenceServerClient(running.server.grpc_address)


@pytest.fixture(scope="module")
def one(artifact: Artifact, artifact_of: Callable[..., Artifact]) -> Iterator[tuple[Running, Any]]:
    with serving(f"first={artifact.path}", f"second={artifact_of('onnx').path}", grpc_port=0) as running:
        client = client_of(running)
        yield running, client
        client.close()


def images(pixels: np.ndarray[Any, Any], datatype: str = "UINT8") -> Any:
    given = triton.InferInput("images", pixels.shape, datatype)
    given.set_data_from_numpy(pixels)
    return given


def code(error: Any) -> str:
    return str(error.value.status()).removeprefix("StatusCode.")


def test_tensors_go_in_and_out_as_the_session_gives_them(one: tuple[Running, Any], artifact: Artifact) -> None:
    running, client = one
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    (expected,) = convnext_deploy.load(artifact.path).run(pixels)
    name = artifact.manifest.outputs[0].name
    found = client.infer("first", [images(pixels)], request_id="id 7")
    np.testing.assert_allclose(found.as_numpy(name), expected, rtol=1e-4, atol=1e-5)
    assert found.get_response().id == "id 7"
    wanted = [triton.InferRequestedOutput(name)]
    assert client.infer("first", [images(pixels[:1])], outputs=wanted, model_version="1").as_numpy(name).shape == (
        1,
        10,
    )
    floats = np.zeros((1, 3, SIDE, SIDE), np.float32)
    assert client.infer("second", [images(floats, "FP32")]).as_numpy(name).shape == (1, 10)
    assert running.metric('requests_total{path="grpc ModelInfer",status="OK"}') >= 3


def test_values_may_come_in_the_message_as_in_bytes_behind_it(one: tuple[Running, Any], artifact: Artifact) -> None:
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    running, _ = one
    pixels = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), np.uint8)
    (expected,) = convnext_deploy.load(artifact.path).run(pixels)
    request = service_pb2.ModelInferRequest(model_name="first")
    tensor = request.inputs.add(name="images", datatype="UINT8", shape=pixels.shape)
    tensor.contents.uint_contents.extend(pixels.ravel().tolist())
    with grpc.insecure_channel(running.server.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer = stub.ModelInfer(request)
        np.testing.assert_allclose(
            np.frombuffer(answer.raw_output_contents[0], "<f4"), expected[0], rtol=1e-4, atol=1e-5
        )
        request.raw_input_contents.extend([b"", b""])
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(request)
    assert "2 raw_input_contents for 1 inputs; expected as many, or none" in str(refused.value)


def test_health_and_metadata_are_those_of_http(one: tuple[Running, Any]) -> None:
    _, client = one
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("first")
    assert client.get_server_metadata().name == "convnext-deploy"
    facts = client.get_model_metadata("first")
    assert (facts.inputs[0].datatype, list(facts.inputs[0].shape)) == ("UINT8", [-1, SIDE, SIDE, 3])
    assert [found.name for found in client.get_model_repository_index().models] == ["first", "second"]


@pytest.mark.parametrize(
    ("model", "version", "shape", "datatype", "expected", "message"),
    [
        ("third", "", (1, SIDE, SIDE, 3), "UINT8", "NOT_FOUND", "no model 'third' (models: first, second)"),
        ("first", "2", (1, SIDE, SIDE, 3), "UINT8", "NOT_FOUND", "no version '2'"),
        ("first", "", (1, 32, 128, 3), "UINT8", "INVALID_ARGUMENT", "images are 32x128 pixels; expected 64x64"),
        ("first", "", (9, SIDE, SIDE, 3), "UINT8", "INVALID_ARGUMENT", "takes 1 to 4 images at once"),
        ("first", "", (1, 3, SIDE, SIDE), "FP32", "INVALID_ARGUMENT", "datatype 'FP32'; expected UINT8"),
    ],
)
def test_a_wrong_request_gets_a_code_and_one_line(
    one: tuple[Running, Any],
    model: str,
    version: str,
    shape: tuple[int, ...],
    datatype: str,
    expected: str,
    message: str,
) -> None:
    _, client = one
    pixels = np.zeros(shape, np.uint8 if datatype == "UINT8" else np.float32)
    with pytest.raises(triton.InferenceServerException) as refused:
        client.infer(model, [images(pixels, datatype)], model_version=version)
    assert code(refused) == expected
    assert message in refused.value.message()


def test_the_token_is_asked_for_and_health_is_open(artifact: Artifact) -> None:
    with serving(f"m={artifact.path}", grpc_port=0, token="abc") as running:
        client = client_of(running)
        assert client.is_server_live()
        pixels = images(np.zeros((1, SIDE, SIDE, 3), np.uint8))
        for headers in ({}, {"authorization": "Bearer x"}):
            with pytest.raises(triton.InferenceServerException) as refused:
                client.infer("m", [pixels], headers=headers)
            assert code(refused) == "UNAUTHENTICATED"
        assert client.infer("m", [pixels], headers={"authorization": "Bearer abc"}).get_response().model_name == "m"
        client.close()


def test_a_deadline_is_kept_and_what_waits_for_it_leaves_the_queue(artifact: Artifact) -> None:
    with serving(f"m={artifact.path}", grpc_port=0, sessions=1, room=2) as running:
        client, queue = client_of(running), running.service.models["m"].queue
        running.hold()
        pixels = images(np.zeros((1, SIDE, SIDE, 3), np.uint8))
        for _ in range(2):  # one that is computed, and one that waits
            with pytest.raises(triton.InferenceServerException) as late:
                client.infer("m", [pixels], client_timeout=0.3)
            assert code(late) == "DEADLINE_EXCEEDED"
        until(lambda: queue.admitted == 0)
        running.release()
        assert client.infer("m", [pixels]).get_response().model_name == "m"
        client.close()


def test_what_was_asked_is_answered_at_the_end(artifact: Artifact) -> None:
    with serving(f"m={artifact.path}", grpc_port=0, sessions=1) as running:
        client, answers = client_of(running), []
        running.hold()
        client.async_infer(
            "m", [images(np.zeros((1, SIDE, SIDE, 3), np.uint8))], lambda result, error: answers.append((result, error))
        )
        until(lambda: running.batches == 1)
        running.server.stop()
        running.release()
    until(lambda: len(answers) == 1)
    assert answers[0][1] is None
    assert running.error is None


def test_what_comes_in_the_moment_of_the_end_may_be_asked_elsewhere(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "REFUSED_S", 2.0)  # or a slow machine would leave clients no time to ask
    with serving(f"m={artifact.path}", grpc_port=0) as running:
        until(lambda: running.server.grpc_address is not None)
        pixels, last = images(np.zeros((1, SIDE, SIDE, 3), np.uint8)), []
        begun = threading.Barrier(7)

        def ask() -> None:
            own = [("grpc.use_local_subchannel_pool", 1)]
            with triton.InferenceServerClient(running.server.grpc_address, channel_args=own) as client:
                client.infer("m", [pixels])
                begun.wait(20)
                try:
                    while True:
                        client.infer("m", [pixels])
                except triton.InferenceServerException as error:
                    last.append(error.status())

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        begun.wait(20)
        running.server.stop()
        for thread in threads:
            thread.join(20)
    assert last == ["StatusCode.UNAVAILABLE"] * 6  # and not CANCELLED, which gRPC gives


def test_a_port_that_there_is_none_of_is_refused(artifact: Artifact) -> None:
    with pytest.raises(UsageError, match=r"--grpc-port '127\.0\.0\.1', 70000; expected a port"):
        convnext_deploy.serve(artifact.path, port=0, grpc_port=70000)
