"""A server over HTTP: what it answers, what it refuses, and what it does when clients behave badly."""

import contextlib
import gc
import gzip
import io
import json
import shutil
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from sample_records import verdict
from server_process import Running, picture, serving, until

import convnext_deploy
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.cli.app import split_hint
from convnext_deploy.errors import CheckFailed, ConvNextDeployError, UsageError
from convnext_deploy.serving import application, server
from convnext_deploy.serving.model import SHORT_S
from convnext_deploy.serving.options import ServeOptions

SIDE = 64


def form(*files: tuple[str, bytes], boundary: str = "XyZ") -> tuple[bytes, dict[str, str]]:
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for name, content in files
    ]
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    return body, {"content-type": f"multipart/form-data; boundary={boundary}"}


def inference(pixels: Any, data: list[int] | None) -> tuple[bytes, dict[str, str]]:
    """An inference request in JSON, whose data is in it or behind it."""
    given: dict[str, Any] = {"name": "images", "shape": pixels.shape, "datatype": "UINT8"}
    if data is not None:
        return json.dumps({"inputs": [given | {"data": data}]}).encode(), {}
    given["parameters"] = {"binary_data_size": pixels.nbytes}
    head = json.dumps({"inputs": [given]}).encode()
    return head + pixels.tobytes(), {"inference-header-content-length": str(len(head))}


@pytest.fixture(scope="module")
def artifact(artifact_of: Callable[..., Artifact]) -> Artifact:
    return artifact_of("onnx", input="uint8")


@pytest.fixture(scope="module")
def one(artifact: Artifact, artifact_of: Callable[..., Artifact]) -> Iterator[Running]:
    """A server of two models, for tests that leave it as it is."""
    other = artifact_of("onnx")
    with serving(f"first={artifact.path}", f"second={other.path}") as running:
        yield running


@pytest.fixture
def serve(artifact: Artifact) -> Callable[..., Any]:
    return lambda **options: serving(f"m={artifact.path}", **options)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_program_hid_from_the_garbage_collector_stays_hidden(serve: Callable[..., Any], frozen: bool) -> None:
    gc.unfreeze()
    if frozen:
        gc.freeze()
    try:
        with serve():
            assert gc.get_freeze_count() > 0
        assert (gc.get_freeze_count() > 0) == frozen
    finally:
        gc.freeze()


# Answers


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("model", ["first", "second"])
def test_an_image_gets_the_classes_that_predict_gives(one: Running, format: str, model: str) -> None:
    path = one.service.models[model].artifact.path
    expected = convnext_deploy.predict(path, io.BytesIO(picture(format)), top=3).predictions[0].classes
    status, answer, _ = one.ask("POST", f"/classify?top=3&model={model}", picture(format))
    assert status == 200
    (found,) = answer["predictions"]
    assert [best["number"] for best in found["classes"]] == [best.number for best in expected]
    np.testing.assert_allclose(
        [best["probability"] for best in found["classes"]], [best.probability for best in expected], rtol=1e-5
    )
    assert (answer["model"], answer["artifact_sha256"]) == (model, one.service.models[model].sha256)


def test_a_parameter_that_is_not_there_is_refused_by_name(one: Running) -> None:
    status, answer, _ = one.ask("POST", "/classify?tpo=2", picture())
    assert (status, answer["error"]) == (400, "no parameter 'tpo'; expected top, model, timeout_ms")


@pytest.mark.parametrize(("problem", "classes"), [("multi-label", 10), ("binary", 1), ("regression", 1)])
def test_what_outputs_mean_is_what_the_artifact_says(
    problem: str, classes: int, artifact_of: Callable[..., Artifact]
) -> None:
    path = artifact_of("native", {"num_classes": classes}, problem=problem).path
    predicted = convnext_deploy.predict(path, io.BytesIO(picture()), top=3).predictions[0].classes
    with serving(f"m={path}") as running:
        status, answer, _ = running.ask("POST", "/classify?top=3", picture())
    if problem == "regression":
        assert (status, predicted) == (400, ())
        return
    assert status == 200
    found = answer["predictions"][0]["classes"]
    assert [best["number"] for best in found] == [best.number for best in predicted]
    np.testing.assert_allclose(
        [best["probability"] for best in found], [best.probability for best in predicted], rtol=1e-5
    )


def test_a_form_may_hold_several_images_each_answered_by_its_name(one: Running) -> None:
    files = [(f"{seed}.jpg", picture(seed=seed)) for seed in range(5)]
    body, headers = form(*files)
    status, answer, _ = one.ask("POST", "/classify?top=1", body, headers)
    assert status == 200
    assert [found["image"] for found in answer["predictions"]] == [name for name, _ in files]
    alone = [one.ask("POST", "/classify?top=1", content)[1]["predictions"][0]["classes"] for _, content in files]
    for found, right in zip(answer["predictions"], alone, strict=True):
        assert found["classes"][0]["number"] == right[0]["number"]
        assert found["classes"][0]["probability"] == pytest.approx(right[0]["probability"], rel=1e-4)


@pytest.mark.parametrize("kind", ["image", "form", "damaged", "tensor", "binary tensor"])
def test_what_a_request_brought_is_freed_with_its_answer(one: Running, kind: str) -> None:
    """Not when the garbage collector comes: until then hundreds of images would lie in memory."""
    pixels = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    body, headers = {
        "image": lambda: (picture(), {}),
        "form": lambda: form(("a.jpg", picture())),
        "damaged": lambda: (b"no image", {}),
        "tensor": lambda: inference(pixels, pixels.ravel().tolist()),
        "binary tensor": lambda: inference(pixels, None),
    }[kind]()
    address = "/v2/models/first/infer" if kind.endswith("tensor") else "/classify"
    status, _, _ = one.ask("POST", address, body, headers)
    assert status == (400 if kind == "damaged" else 200)
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            one.ask("POST", address, body, headers)
        assert gc.collect() < 20
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\\b", "x" * 3000])
def test_a_clients_file_name_reaches_no_file(one: Running, name: str) -> None:
    opened: list[object] = []
    watching = True
    sys.addaudithook(lambda event, given: opened.append(given) if watching and event in ("open", "os.mkdir") else None)
    body, headers = form((name, picture()), ("large.jpg", picture() + b"\0" * 3_000_000))
    status, answer, _ = one.ask("POST", "/classify", body, headers)
    watching = False  # a hook stays
    assert status == 200
    assert answer["predictions"][0]["image"] == name[:200]
    assert opened == []


def test_tensors_go_in_and_out_as_the_session_gives_them(one: Running, artifact: Artifact) -> None:
    triton = pytest.importorskip("tritonclient.http")
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    (expected,) = convnext_deploy.load(artifact.path).run(pixels)
    client = triton.InferenceServerClient(f"{one.host}:{one.port}")
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("first", "1")
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
        facts = client.get_model_metadata("first")
        assert facts["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, SIDE, SIDE, 3]}]
        (output,) = facts["outputs"]
        for binary in (True, False):
            for compression in (None, "gzip", "deflate"):
                given = triton.InferInput("images", pixels.shape, "UINT8")
                given.set_data_from_numpy(pixels, binary_data=binary)
                wanted = [triton.InferRequestedOutput(output["name"], binary_data=binary)]
                found = client.infer(
                    "first", [given], outputs=wanted, request_id="id 7", request_compression_algorithm=compression
                )
                np.testing.assert_allclose(found.as_numpy(output["name"]), expected, rtol=1e-4, atol=1e-5)
                assert found.get_response()["id"] == "id 7"
        floats = triton.InferInput("images", (1, 3, SIDE, SIDE), "FP32")
        floats.set_data_from_numpy(np.zeros((1, 3, SIDE, SIDE), np.float32))
        assert client.infer("second", [floats]).as_numpy(output["name"]).shape == (1, 10)
        with pytest.raises(triton.InferenceServerException, match="datatype 'FP32'; expected UINT8"):
            client.infer("first", [floats])
        with pytest.raises(triton.InferenceServerException, match="no model 'third'"):
            client.infer("third", [floats])
    finally:
        client.close()


def test_more_images_than_the_artifact_takes_at_once_are_refused_and_fewer_are_split(one: Running) -> None:
    def ask(count: int) -> tuple[int, Any, dict[str, str]]:
        data = np.zeros((count, SIDE, SIDE, 3), np.uint8)
        head = json.dumps(
            {
                "inputs": [
                    {
                        "name": "images", "shape": data.shape, "datatype": "UINT8",
                        "parameters": {"binary_data_size": data.nbytes},
                    }
                ]
            }
        ).encode()  # fmt: skip
        headers = {"Inference-Header-Content-Length": str(len(head))}
        return one.ask("POST", "/v2/models/first/infer", head + data.tobytes(), headers)

    status, answer, _ = ask(4)
    assert (status, answer["outputs"][0]["shape"]) == (200, [4, 10])
    status, answer, _ = ask(5)
    assert (status, answer["error"]) == (400, "batch 5; this artifact takes 1 to 4 images at once")


def test_health_metrics_and_the_description_are_there(one: Running) -> None:
    assert one.ask("GET", "/healthz")[:2] == (200, {"live": True})
    assert one.ask("GET", "/readyz")[:2] == (200, {"ready": True})
    assert one.ask("POST", "/v2/repository/index")[1][0] == {"name": "first", "version": "1", "state": "READY"}
    before = one.metric('requests_total{path="/classify",status="200"}')
    best = one.ask("POST", "/classify?top=1", picture())[1]["predictions"][0]["classes"][0]
    assert one.metric('requests_total{path="/classify",status="200"}') == before + 1
    assert one.metric(f'answers_total{{model="first",name="{best["name"] or ""}",number="{best["number"]}"}}') >= 1
    status, text, headers = one.ask("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    assert b"convnext_deploy_batch_images_bucket" in text
    status, document, _ = one.ask("GET", "/openapi.json")
    assert document["openapi"] == "3.1.0"
    assert document["paths"]["/classify"]["post"]["parameters"][0]["schema"]["enum"] == ["first", "second"]
    status, page, headers = one.ask("GET", "/docs")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"POST /classify" in page
    assert b"src=" not in page  # it loads nothing


# Refusals


def damaged(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "message"),
    [
        ("/classify", b"", {}, 400, "the file is empty"),
        ("/classify", b"hello", {}, 400, "not an image in a format that is read here (JPEG, PNG, WEBP)"),
        ("/classify", damaged(picture("PNG")), {}, 400, "image file is truncated"),
        ("/classify", damaged(picture()), {}, 400, "image file is truncated"),
        ("/classify", picture("GIF", mode="P"), {}, 400, "not an image in a format that is read here"),  # readable
        ("/classify?top=0", picture(), {}, 400, "top '0'; expected a whole number of at least 1"),
        ("/classify?top=x", picture(), {}, 400, "top 'x'; expected"),
        ("/classify?timeout_ms=-1", picture(), {}, 400, "a time-out of -1 ms; expected more than 0"),
        ("/classify?timeout_ms=nan", picture(), {}, 400, "a time-out of nan ms"),
        ("/classify?model=nobody", picture(), {}, 404, "no model 'nobody' (models: first, second)"),
        ("/classify", picture(), {"content-type": "multipart/form-data"}, 400, "without a boundary"),
        ("/classify", b"--x\r\n", {"content-type": "multipart/form-data; boundary=x"}, 400, "ends in the middle"),
        ("/classify", form()[0], form()[1], 400, "the form has no file"),
        ("/classify", form(("a.jpg", b"nothing"))[0], form()[1], 400, "a.jpg: not an image"),
        ("/classify", form(*(("a", b""),) * 65)[0], form()[1], 400, "more than 64 parts"),
        ("/classify", gzip.compress(picture())[:-9], {"content-encoding": "gzip"}, 400, "ends in the middle"),
        ("/classify", picture(), {"content-encoding": "gzip"}, 400, "cannot be decompressed"),
        ("/classify", picture(), {"content-encoding": "br"}, 415, "Content-Encoding 'br'; expected gzip, deflate"),
        ("/v2/models/first/infer", b"{", {}, 400, "the body is no inference request"),
        ("/v2/models/first/infer", b"[" * 100_000, {}, 400, "the body is no inference request"),
        ("/v2/models/first/infer", b'{"inputs":[]}', {}, 400, "inputs none; expected one, images"),
        ("/v2/models/first/infer", b'{"inputs":[{"name":"x"}]}', {}, 400, "inputs 'x'; expected one, images"),
        ("/v2/models/first/versions/2/infer", b"{}", {}, 404, "no version '2'"),
        ("/v2/models/first/infer", b"{}", {"Inference-Header-Content-Length": "9"}, 400, "at most the 2 bytes"),
        ("/v2/models/first/infer", b"{}", {"Inference-Header-Content-Length": "-1"}, 400, "'-1'; expected at most"),
    ],
)  # fmt: skip
def test_a_wrong_request_gets_one_line(
    one: Running, path: str, body: bytes, headers: dict[str, str], status: int, message: str
) -> None:
    found, answer, _ = one.ask("POST", path, body, headers)
    assert (found, list(answer)) == (status, ["error"])
    assert message in answer["error"]
    assert "\n" not in answer["error"]


def tensor(**changes: Any) -> bytes:
    given = {"name": "images", "shape": [1, SIDE, SIDE, 3], "datatype": "UINT8", "data": [0] * (SIDE * SIDE * 3)}
    return json.dumps({"inputs": [given | changes]}).encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"data": np.zeros((1, SIDE, SIDE, 3), int).tolist()}, None),  # nested, as the protocol allows
        ({"shape": [1, SIDE, SIDE]}, "shape [1, 64, 64]; expected 4 sizes"),
        ({"shape": [-1, SIDE, SIDE, 3]}, "expected 4 sizes of at least 1"),
        ({"shape": [2**31, 2**31, 2**31, 3]}, "values; shape"),
        ({"shape": [1, 32, 128, 3]}, "images are 32x128 pixels; expected 64x64"),
        ({"data": [0.5] * (SIDE * SIDE * 3)}, "no whole numbers from 0 to 255"),
        ({"data": [256] * (SIDE * SIDE * 3)}, "no whole numbers from 0 to 255"),
        ({"data": ["x"] * (SIDE * SIDE * 3)}, "not numbers in equal rows"),
        ({"data": [[1], 2]}, "not numbers in equal rows"),
        ({"data": [1]}, "1 values; shape [1, 64, 64, 3] has 12288"),
        ({"data": None}, "neither data nor binary_data_size"),
        ({"parameters": {"binary_data_size": 5}}, "binary_data_size 5 and 0 bytes behind the JSON"),
    ],
)
def test_a_tensor_is_looked_at_before_it_is_used(one: Running, changes: dict[str, Any], message: str | None) -> None:
    status, answer, _ = one.ask("POST", "/v2/models/first/infer", tensor(**changes))
    if message is None:
        assert status == 200
    else:
        assert status == 400
        assert message in answer["error"]


def test_what_is_not_finite_is_refused_and_moves_no_neighbour(one: Running) -> None:
    bad = np.full((1, 3, SIDE, SIDE), np.inf).ravel().tolist()
    status, answer, _ = one.ask(
        "POST",
        "/v2/models/second/infer",
        json.dumps({"inputs": [{"name": "images", "shape": [1, 3, SIDE, SIDE], "datatype": "FP32", "data": bad}]})
        .replace("Infinity", "1e39")
        .encode(),
    )
    assert status == 400
    assert "NaN or infinite" in answer["error"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"slo_ms": 1e-3},
            r"slo_ms 0.001: onnx takes .* ms for one image alone here, so that nothing could be answered",
        ),
        ({"slo_ms": 1e9}, r"slo_ms 1e\+09 is more than deadline_ms 30000, after which a request is given up"),
        ({"slo_ms": 200, "deadline_ms": 100}, "slo_ms 200 is more than deadline_ms 100"),
    ],
)
def test_a_limit_that_cannot_be_kept_or_means_nothing_is_refused(
    artifact: Artifact, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        convnext_deploy.asgi(artifact.path, **options)


def test_unknown_addresses_and_methods_say_where_to_look(one: Running) -> None:
    assert one.ask("GET", "/nope")[:2] == (404, {"error": "no such address; GET /docs lists what there is"})
    assert one.ask("POST", "/reload", b"")[0] == 404  # of the admin address only
    status, answer, headers = one.ask("GET", "/classify")
    assert (status, headers["allow"]) == (405, "POST")
    assert answer["error"].startswith("GET is not taken here")


def test_large_bodies_are_refused_before_they_are_read(serve: Callable[..., Any]) -> None:
    with serve(max_body_bytes=1000) as one:
        with socket.create_connection((one.host, one.port), timeout=10) as plain:
            plain.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n")
            answer = plain.recv(65536)  # although not one byte of the body was sent
            assert answer.startswith(b"HTTP/1.1 413")
            assert plain.recv(65536) == b"" or b"at most 1000" in answer
        pieces = iter([b"x" * 600] * 2)
        connection = one.connection()
        connection.request("POST", "/classify", pieces)  # chunked: nothing tells its length
        assert connection.getresponse().status == 413
        connection.close()
        bomb = gzip.compress(b"\0" * 100_000)
        assert len(bomb) < 1000
        status, answer, _ = one.ask("POST", "/classify", bomb, {"content-encoding": "gzip"})
        assert (status, answer["error"]) == (413, "the body is larger than 1000 bytes when decompressed")
        assert one.service.body_bytes == 0


def test_images_of_many_pixels_are_refused_by_their_head(serve: Callable[..., Any]) -> None:
    with serve(max_pixels=10_000) as one:
        assert one.ask("POST", "/classify", picture(size=(100, 100)))[0] == 200
        status, answer, _ = one.ask("POST", "/classify", picture("PNG", size=(101, 100)))
        assert (status, answer["error"]) == (
            400, "101x100 pixels; at most 10,000 are decoded, make it smaller first",
        )  # fmt: skip
        # A PNG of 100,000x100,000 pixels in some bytes.
        head = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + b"\x01\x00\x00\x00\x00"
        bomb = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + head + zlib.crc32(head).to_bytes(4, "big")
        status, answer, _ = one.ask("POST", "/classify", bomb)
        assert status == 400


def test_without_the_token_nothing_but_health_is_told(serve: Callable[..., Any]) -> None:
    with serve(token="s3cret") as one:
        right = {"Authorization": "Bearer s3cret"}
        for method, path in (("POST", "/classify"), ("GET", "/metrics"), ("GET", "/v2/models/m"), ("GET", "/docs")):
            for headers in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "Basic s3cret"}):
                status, answer, found = one.ask(method, path, picture() if method == "POST" else None, headers)
                assert (status, found["www-authenticate"]) == (401, "Bearer")
                assert "s3cret" not in str(answer)
            assert one.ask(method, path, picture() if method == "POST" else None, right)[0] == 200
        assert one.ask("GET", "/healthz")[0] == one.ask("GET", "/readyz")[0] == 200


def test_a_reload_asks_the_gate_also_of_what_has_not_changed(artifact: Artifact, tmp_path: Path) -> None:
    """A verdict that is FAIL by now was "has not changed", and the server went on without a word."""
    gate = tmp_path / "verdict.json"
    passed = verdict(decision="PASS", candidate_sha256=artifact.sha256)
    gate.write_bytes(msgspec.json.encode(passed))
    with serving(f"m={artifact.path}", gate=gate) as running:
        assert running.service.reload() == [f"m: {artifact.path} has not changed"]
        gate.write_bytes(msgspec.json.encode(msgspec.structs.replace(passed, decision="FAIL")))
        with pytest.raises(CheckFailed, match=r"says FAIL of .*; only PASS is served"):
            running.service.reload()
        assert running.ask("POST", "/classify", picture())[0] == 200


def test_a_reload_says_what_its_clients_meet_anew(artifact_of: Callable[..., Artifact], tmp_path: Path) -> None:
    """Ten classes became seven, and pixels normalized floats, in a line that only had two hashes."""
    folder = tmp_path / "m"
    shutil.copytree(artifact_of("onnx").path, folder)
    new = artifact_of("onnx", {"num_classes": 7}, input="uint8")
    with serving(f"m={folder}") as running:
        before = running.service.models["m"].sha256
        shutil.rmtree(folder)
        shutil.copytree(new.path, folder)
        assert running.service.reload() == [
            f"m: {before[:12]} -> {new.sha256[:12]}; other input, outputs than before, which its clients have to know"
        ]


# Load, time, and clients that go away


def test_a_flood_is_refused_with_the_time_to_wait_and_what_was_taken_is_answered(serve: Callable[..., Any]) -> None:
    with serve(room=4, sessions=1) as one:
        one.hold()
        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(one.ask, "POST", "/classify", picture(seed=seed)) for seed in range(12)]
            until(lambda: sum(request.done() for request in asked) == 8)
            one.release()
            answers = [request.result() for request in asked]
    assert sorted(status for status, _, _ in answers) == [200] * 4 + [429] * 8
    for status, answer, headers in answers:
        if status == 429:
            assert int(headers["retry-after"]) >= 1
            assert answer["error"] == "4 images are waiting; at most 4 do"


def test_a_request_that_waits_too_long_is_given_up_and_leaves_the_queue(serve: Callable[..., Any]) -> None:
    with serve(deadline_ms=400, sessions=1) as one:
        one.hold()
        with ThreadPoolExecutor(3) as pool:
            asked = [
                pool.submit(one.ask, "POST", path, picture())
                for path in ("/classify", "/classify?timeout_ms=150", "/classify?timeout_ms=9000")
            ]
            answers = [request.result() for request in asked]
        assert [status for status, _, _ in answers] == [504] * 3
        assert answers[1][1]["error"] == "no answer within 150 ms"
        assert answers[2][1]["error"] == "no answer within 400 ms"
        assert one.service.models["m"].queue.waiting == 0
        one.release()
        assert one.ask("POST", "/classify", picture())[0] == 200


def test_a_client_that_goes_away_leaves_the_queue(serve: Callable[..., Any]) -> None:
    with serve(sessions=1) as one:
        one.hold()
        queue = one.service.models["m"].queue
        connections = [one.connection() for _ in range(3)]
        for connection in connections:
            connection.request("POST", "/classify", picture())
        until(lambda: queue.admitted == 3 and one.batches == 1)
        for connection in connections:
            connection.close()
        until(lambda: queue.admitted == 0)
        one.release()
        assert one.ask("POST", "/classify", picture())[0] == 200
        assert one.metric('refused_total{reason="gone"}') == 3
        assert one.batches == 2  # those that waited were never computed


def test_slow_clients_are_cut_off_and_hold_up_nobody(serve: Callable[..., Any]) -> None:
    with serve(idle_s=0.3, body_s=0.3) as one:
        silent = socket.create_connection((one.host, one.port), timeout=10)
        half = socket.create_connection((one.host, one.port), timeout=10)
        half.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nX-")
        body = socket.create_connection((one.host, one.port), timeout=10)
        body.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
        assert one.ask("POST", "/classify", picture())[0] == 200
        started = time.monotonic()
        assert silent.recv(100) == b""
        assert half.recv(100) == b""
        assert body.recv(100).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - started < 5
        for client in (silent, half, body):
            client.close()
        until(lambda: one.server.connections() == 0)


def test_many_idle_connections_hold_up_nobody(serve: Callable[..., Any]) -> None:
    with serve(idle_s=30) as one:
        idle = [socket.create_connection((one.host, one.port), timeout=10) for _ in range(400)]
        until(lambda: one.server.connections() >= 400)
        assert one.ask("POST", "/classify", picture())[0] == 200
        for connection in idle:
            connection.close()


def test_more_connections_than_the_process_may_have_are_closed_at_once(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_open_files", lambda: server.OWN_FILES + 3)
    with serve() as one:
        idle = [socket.create_connection((one.host, one.port), timeout=10) for _ in range(3)]
        until(lambda: one.server.connections() == 3)
        fourth = socket.create_connection((one.host, one.port), timeout=10)
        with fourth, contextlib.suppress(ConnectionError):
            assert fourth.recv(100) == b""
        idle.pop().close()
        until(lambda: one.server.connections() == 2)
        assert one.ask("POST", "/classify", picture())[0] == 200
        for connection in idle:
            connection.close()


def test_from_many_threads_every_answer_is_its_own(one: Running) -> None:
    pictures = [picture(seed=seed) for seed in range(6)]
    alone = [one.ask("POST", "/classify?top=1", content)[1]["predictions"][0]["classes"][0] for content in pictures]

    def ask(number: int) -> bool:
        status, answer, _ = one.ask("POST", "/classify?top=1", pictures[number % 6])
        found, right = answer["predictions"][0]["classes"][0], alone[number % 6]
        close = abs(found["probability"] - right["probability"]) <= 1e-4 * right["probability"]
        return status == 200 and found["number"] == right["number"] and close

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(120)))


def test_short_work_is_done_where_it_comes_in_unless_requests_wait_there(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as one:
        model, threads = one.service.models["m"], []
        run = model.queue._run

        def seen(images: Any) -> tuple[np.ndarray, ...]:
            threads.append(threading.current_thread().name)
            return run(images)

        def asked(content: bytes) -> str:
            assert one.ask("POST", "/classify", content)[0] == 200
            return threads.pop()

        model.queue._run = seen
        model._alone_s = model._pixel_s = 0.0  # as on a machine that nobody else uses
        here = asked(picture())
        assert not here.startswith("batch")
        assert asked(picture("PNG")).startswith("batch")  # a stranger's zlib may expand without end
        assert asked(picture() + bytes(2**17)).startswith("batch")
        monkeypatch.setattr(application, "BEHIND_S", 0.0)
        assert asked(picture()) == (here if one.service.options.cores == 1 else "batch-0")
        monkeypatch.setattr(application, "BEHIND_S", 60.0)
        assert asked(picture()) == here
        model._pixel_s = 1.0
        assert asked(picture()).startswith("batch")
        tensors, headers = inference(np.zeros((2, SIDE, SIDE, 3), np.uint8), None)

        def asked_for_tensors() -> str:
            assert one.ask("POST", "/v2/models/m/infer", tensors, headers)[0] == 200
            return threads.pop()

        assert asked_for_tensors() == here
        model._alone_s = 0.6 * SHORT_S  # of each of the two
        assert asked_for_tensors().startswith("batch")


def test_an_error_of_the_runtime_is_told_to_the_log_and_not_to_the_client(artifact: Artifact) -> None:
    said: list[str] = []
    with serving(f"m={artifact.path}", say=said.append) as one:

        def fails(images: object) -> tuple[np.ndarray, ...]:
            raise RuntimeError("secret path /home/me")

        one.service.models["m"].queue._run = fails
        status, answer, _ = one.ask("POST", "/classify", picture())
    assert (status, answer["error"]) == (500, "the request failed; the server's log says why")
    assert "a request failed: RuntimeError: secret path /home/me" in said


def test_a_log_on_a_full_disk_ends_no_request(artifact: Artifact) -> None:
    def full(line: str) -> None:
        raise OSError(28, "No space left on device")

    with serving(f"m={artifact.path}", say=full) as one:
        run, broken = one.service.models["m"].queue._run, threading.Event()

        def fails_once(images: Any) -> tuple[np.ndarray, ...]:
            if not broken.is_set():
                broken.set()
                raise RuntimeError("once")
            return run(images)

        one.service.models["m"].queue._run = fails_once
        assert one.ask("POST", "/classify", picture())[0] == 500
        assert one.ask("POST", "/classify", picture())[0] == 200


def test_at_the_end_what_was_asked_is_answered_and_connections_close_behind_it(serve: Callable[..., Any]) -> None:
    with serve(sessions=1) as one:
        one.hold()
        with ThreadPoolExecutor(5) as pool:
            asked = [pool.submit(one.ask, "POST", "/classify", picture(seed=seed)) for seed in range(5)]
            until(lambda: one.service.models["m"].queue.admitted == 5)
            one.server.stop()
            until(lambda: one.service.draining)
            time.sleep(0.2)
            one.release()
            answers = [request.result() for request in asked]
    assert [status for status, _, _ in answers] == [200] * 5
    assert {headers["connection"] for _, _, headers in answers} == {"close"}
    assert one.error is None


def test_an_end_that_gives_up_requests_says_so(serve: Callable[..., Any]) -> None:
    with serve(sessions=1, drain_s=1) as one:
        one.hold()
        connection = one.connection()
        connection.request("POST", "/classify", picture())
        until(lambda: one.batches == 1)
        one.server.stop()
        until(lambda: one.error is not None, 15)
        connection.close()
    assert str(one.error) == "1 request had no answer when the server ended; --drain-s gives them more time"


# Options and embedding


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slo_ms": 0}, "slo_ms 0; expected a number above 0"),
        ({"max_batch": 0}, "max_batch 0; expected a whole number of at least 1"),
        ({"max_batch": 5}, "max_batch 5; this artifact takes 1 to 4 images at once"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms nan"),
        ({"slo_ms": 5, "max_wait_ms": 5}, "max_wait_ms 5 leaves nothing of slo_ms 5"),
        ({"sessions": 1000, "threads": 1}, "sessions 1000 of 1 threads each; at most"),
        ({"token": "two\nlines"}, "token is empty or not one line"),
        ({"speed": 3}, "serve has no parameter speed; expected one of artifacts, host, port"),
        ({"device": "tpu"}, "device tpu; expected one of cpu, cuda"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_served(
    artifact: Artifact, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as error:
        convnext_deploy.serve(artifact.path, port=0, ready=lambda server: pytest.fail("served"), **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("artifacts", "message"),
    [
        ([], "no artifact"),
        (["build/a", "other/a"], "two artifacts are called a; serve one of them as NAME=other/a"),
        (["bad name"], "'bad name' cannot stand in an address"),
        (["absent"], "absent is not a folder"),
    ],
)
def test_wrong_artifacts_are_refused(artifacts: list[str], message: str) -> None:
    with pytest.raises(ConvNextDeployError) as error:
        convnext_deploy.serve(artifacts, port=0)
    assert message in str(error.value)


def test_an_address_that_is_taken_is_refused_before_an_artifact_is_opened() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"127\.0\.0\.1:{port} cannot be listened on: Address already in use"):
            convnext_deploy.serve("absent", port=port)


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({"port": "taken"}, "give another --port, or 0 for a free one"),
        ({"port": 0, "admin": "127.0.0.1:{}"}, "give --admin another port"),
        ({"port": 0, "host": "192.0.2.1"}, "give another --host"),  # kept for documentation: nobody has it
        ({"port": 0, "admin": "192.0.2.1:0"}, "give another --admin"),
    ],
)
def test_an_address_that_cannot_be_had_is_refused_with_the_option_to_change(options: dict[str, Any], cure: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        filled: dict[str, Any] = {
            name: port if value == "taken" else value.format(port) if isinstance(value, str) else value
            for name, value in options.items()
        }
        with pytest.raises(UsageError) as error:
            convnext_deploy.serve("absent", **filled)
    assert str(error.value).endswith(f"; {cure}")
    assert split_hint(str(error.value))[1] == cure


def test_only_the_given_address_is_listened_on(one: Running) -> None:
    assert ServeOptions().token is None
    assert one.host == "127.0.0.1"
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    mine = [fields[1] for fields in listening if fields[1].endswith(f":{one.port:04X}") and fields[3] == "0A"]
    assert mine == [f"0100007F:{one.port:04X}"]


def test_the_application_runs_in_somebody_elses_server(artifact: Artifact) -> None:
    import asyncio

    app = convnext_deploy.asgi({"mine": artifact.path}, max_batch=2)
    sent: list[dict[str, Any]] = []
    messages = iter([{"type": "http.request", "body": picture(), "more_body": False}])

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/classify", "query_string": b"top=1", "headers": [],
        "http_version": "1.1", "scheme": "http", "server": ("x", 80), "client": ("y", 1), "root_path": "",
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    app.state.service.close()
    assert sent[0]["status"] == 200
    assert json.loads(sent[1]["body"])["model"] == "mine"
