"""The Ray Serve application: its settings, and answers over HTTP from replicas of a cluster on this machine."""

import http.client
import io
import json
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

import ray_cluster
from PIL import Image
from server_process import picture

import convnext_deploy
from convnext_deploy.artifact import manifest
from convnext_deploy.errors import ArtifactError, UsageError
from convnext_deploy.serving import ray

ARTIFACT = Path(__file__).parents[1] / "golden" / "0.1.0" / "native-int8"


def test_settings_are_read_from_texts_as_from_values() -> None:
    texts = {
        "artifacts": '["a=x","b=y, z"]',
        "max_replicas": "4",
        "cpus": "2",
        "max_batch": "16",
        "slo_ms": "50",
        "trust": "true",
    }
    settings, options = ray.read(texts)
    assert settings == ray.Settings(artifacts=("a=x", "b=y, z"), max_replicas=4, cpus=2, trust=True)
    assert (options.max_batch, options.slo_ms, options.threads, options.sessions) == (16, 50.0, 2, 1)
    values = {
        "artifacts": ["a=x", "b=y, z"],
        "max_replicas": 4,
        "cpus": 2,
        "max_batch": 16,
        "slo_ms": 50.0,
        "trust": True,
    }
    assert ray.read(values) == (settings, options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "required field `artifacts`"),
        ({"artifacts": "[a=x]"}, r"artifacts \[a=x\]: JSON is malformed"),
        ({"artifacts": "x", "workers": 2}, "argument workers; expected any of artifacts, body_s, cpus"),
        ({"artifacts": "x", "max_batch": "many"}, "Expected `int"),
        ({"artifacts": "x", "max_batch": 0}, "max_batch 0; expected a whole number of at least 1"),
        ({"artifacts": "x", "cpus": 0}, "cpus 0, 1 to 1 replicas; expected at least one artifact and one core"),
        ({"artifacts": "x", "min_replicas": 3}, "3 to 1 replicas"),
        ({"artifacts": "x", "cpus": 2, "threads": 3}, "threads 3 on 2 cores of a replica"),
        ({"artifacts": "x", "min_replicas": 0, "max_replicas": 0}, "max_replicas 0; expected at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as found:
        ray.read(arguments)
    assert "\n" not in str(found.value)


def test_a_node_with_another_artifact_under_the_path_serves_nothing(tmp_path: Path) -> None:
    shutil.copytree(ARTIFACT, tmp_path / "m")
    settings, options = ray.read({"artifacts": str(tmp_path / "m")})
    with pytest.raises(ArtifactError, match=r"on this node, and 000000000000 where the application was made"):
        ray.opened({"m": tmp_path / "m"}, {"m": "0" * 64}, settings, options)
    service = ray.opened({"m": tmp_path / "m"}, {"m": manifest.verified(tmp_path / "m").sha256}, settings, options)
    service.close()


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def wait_for_the_route(port: int) -> None:
    """Ray says that an application is ready before its proxy knows where to send requests."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("GET", "/-/routes")
            if "clothes" in connection.getresponse().read().decode():
                return
        finally:
            connection.close()
        time.sleep(0.1)
    pytest.fail("Ray's proxy knows no route to the application")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # Ray's own of pydantic
def test_replicas_answer_over_http_as_one_server_does() -> None:
    with ray_cluster.nodes(2, cpus=2) as cluster:
        import ray as cluster_of
        from ray import serve

        cluster_of.init(address=cluster.address, log_to_driver=False, logging_level="CRITICAL")
        try:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            with pytest.raises(ArtifactError, match="is not a folder"):
                ray.app({"artifacts": "nowhere"})
            serve.run(ray.app({"artifacts": f"m={ARTIFACT}", "min_replicas": 2, "max_replicas": 3}), name="clothes")
            wait_for_the_route(port)
            assert ask(port, "GET", "/readyz")[0] == 200
            expected = convnext_deploy.predict(ARTIFACT, Image.open(io.BytesIO(picture(seed=3)))).predictions[0]
            for _ in range(20):
                status, answer = ask(port, "POST", "/classify?top=1", picture(seed=3))
                assert status == 200
                assert answer["predictions"][0]["classes"][0]["number"] == expected.classes[0].number
            assert ask(port, "POST", "/classify", b"nothing")[0] == 400
            status = serve.status().applications["clothes"].deployments["convnext-deploy"]
            assert sum(status.replica_states.values()) >= 2
        finally:
            serve.shutdown()
            cluster_of.shutdown()
