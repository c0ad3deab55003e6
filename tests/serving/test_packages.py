"""Artifacts packed for Triton, KServe and Docker, read by the parsers of those who will read them."""

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import convnext_deploy
from convnext_deploy.artifact.manifest import Artifact, verified
from convnext_deploy.cli.app import app
from convnext_deploy.errors import UsageError
from convnext_deploy.serving.packages import docker, triton
from convnext_deploy.serving.packages.kserve import _dns

TOPS = {"triton": "m/config.pbtxt", "kserve": "inferenceservice.yaml", "docker": "Dockerfile"}


@pytest.fixture(scope="module")
def artifact(artifact_of: Callable[..., Artifact]) -> Artifact:
    return artifact_of("onnx", input="uint8")


def config(folder: Path) -> Any:
    """As Triton reads it: an unknown field is an error."""
    pytest.importorskip("grpc", reason="the extra triton is not installed")
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), model_config_pb2.ModelConfig())


def test_a_model_repository_says_what_the_artifact_takes_and_gives(artifact: Artifact, tmp_path: Path) -> None:
    pytest.importorskip("grpc", reason="the extra triton is not installed")
    convnext_deploy.package(artifact.path, "triton", out=tmp_path / "models", name="m", instances=2)
    found = config(tmp_path / "models" / "m")
    batch = artifact.manifest.export.batch
    assert (found.name, found.backend, found.default_model_filename) == ("m", "onnxruntime", "model.onnx")
    assert found.max_batch_size == batch.max
    (given,), (output,) = found.input, found.output
    assert (given.name, list(given.dims)) == (artifact.manifest.inputs[0].name, [64, 64, 3])
    assert (output.name, list(output.dims)) == (artifact.manifest.outputs[0].name, [10])
    assert found.dynamic_batching.preferred_batch_size == [batch.opt]
    assert [(group.count, group.kind) for group in found.instance_group] == [(2, 2)]  # KIND_CPU
    assert found.version_policy.latest.num_versions == 1
    assert [warm_up.batch_size for warm_up in found.model_warmup] == [1, batch.opt]
    assert list(found.model_warmup[0].inputs[given.name].dims) == [64, 64, 3]
    assert found.parameters["artifact_sha256"].string_value == artifact.sha256
    assert json.loads(found.parameters["preprocessing"].string_value)["interpolation"] == "bicubic"
    model = tmp_path / "models" / "m" / "1"
    assert [file.name for file in model.iterdir()] == ["model.onnx"]
    assert (model / "model.onnx").read_bytes() == (artifact.path / "model.onnx").read_bytes()


@pytest.mark.parametrize(
    ("format", "options", "backend", "shape", "most"),
    [
        ("torchscript", {}, ("pytorch", "", "INPUT__0", "OUTPUT__0"), [3, 64, 64], 4),
        ("onnx", {"batch": 3}, ("onnxruntime", "", "images", "logits"), [3, 3, 64, 64], 0),  # one size only
        pytest.param(
            "onnx",
            {"dynamic_image_size": True},
            ("onnxruntime", "", "images", "logits"),
            [3, -1, -1],
            4,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_backends_names_and_batches_are_those_that_triton_expects(
    artifact_of: Callable[..., Artifact], format: str, options: dict[str, Any],
    backend: tuple[str, ...], shape: list[int], most: int, tmp_path: Path,
) -> None:  # fmt: skip
    pytest.importorskip("grpc", reason="the extra triton is not installed")
    convnext_deploy.package(artifact_of(format, **options).path, "triton", out=tmp_path / "r", name="m")
    found = config(tmp_path / "r" / "m")
    assert (found.backend, found.platform, found.input[0].name, found.output[0].name) == backend
    assert list(found.input[0].dims) == shape
    assert found.max_batch_size == most
    assert found.HasField("dynamic_batching") == (most > 0)
    (first, *_) = found.model_warmup
    assert -1 not in first.inputs[backend[2]].dims


def test_every_backend_is_of_a_format_that_there_is() -> None:
    from convnext_deploy import formats

    assert set(triton.BACKENDS) <= set(formats.names())


@pytest.mark.parametrize(
    ("given", "own"), [({"image": "me/clothes:1"}, True), ({"storage_uri": "s3://bucket/models"}, False)]
)
def test_kserve_gets_one_predictor(artifact: Artifact, given: dict[str, str], own: bool, tmp_path: Path) -> None:
    convnext_deploy.package(artifact.path, "kserve", out=tmp_path / "k", name="My_Model.1", **given)  # type: ignore[arg-type]
    document = yaml.safe_load((tmp_path / "k" / "inferenceservice.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert document["metadata"]["name"] == "my-model-1"
    predictor = document["spec"]["predictor"]
    if own:
        (container,) = predictor["containers"]
        assert container["image"] == "me/clothes:1"
        assert container["name"] == "kserve-container"
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
    else:
        assert predictor["model"]["storageUri"] == "s3://bucket/models"
        assert predictor["model"]["modelFormat"]["name"] == "triton"


@pytest.mark.parametrize(("name", "taken"), [("A_b.C", "a-b-c"), ("-x-", "x"), ("é", "model"), ("a" * 70, "a" * 63)])
def test_kubernetes_takes_the_name(name: str, taken: str) -> None:
    assert _dns(name) == taken


@pytest.mark.parametrize("format", ["onnx", "native"])
def test_a_container_has_the_artifact_and_runs_as_nobody(
    artifact_of: Callable[..., Artifact], format: str, tmp_path: Path
) -> None:
    made = artifact_of(format, input="uint8")
    convnext_deploy.package(made.path, "docker", out=tmp_path / "d", name="m")
    folder = tmp_path / "d"
    assert verified(folder / "artifact").sha256 == made.sha256
    text = (folder / "Dockerfile").read_text()
    assert f"USER {docker.USER}:{docker.USER}\n" in text
    assert ("g++" in text) == (format == "native")
    assert yaml.safe_load((folder / "compose.yaml").read_text())["name"] == "m"
    assert "HEALTHCHECK" in text
    last = text[text.rindex("FROM ") :]
    assert "apt-get" not in last
    words = json.loads(next(line[4:] for line in text.splitlines() if line.startswith("CMD [")))
    from typer.main import get_command

    context = get_command(app).commands["serve"].make_context("serve", words[1:])  # type: ignore[attr-defined]
    assert (context.params["host"], context.params["port"]) == ("0.0.0.0", docker.PORT)
    compose = yaml.safe_load((folder / "compose.yaml").read_text())
    assert compose["services"]["serve"]["read_only"] is True
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service.get("volumes", ()):
            assert (folder / volume.split(":")[0]).is_file()
    assert yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]


@pytest.mark.parametrize("brought", [True, False])
def test_a_compiler_is_installed_only_where_the_wheel_brings_no_engine(
    artifact_of: Callable[..., Artifact], brought: bool, tmp_path: Path
) -> None:
    convnext_deploy.package(artifact_of("native", input="uint8").path, "docker", out=tmp_path / "d")
    text = (tmp_path / "d" / "Dockerfile").read_text()
    (step,) = (one for one in re.split(r"\n(?=[A-Z]+ |#)", text) if "g++" in one)
    command = step.removeprefix("RUN ").replace("/opt", str(tmp_path)).replace("/var/lib/apt", str(tmp_path / "apt"))
    commands, log = tmp_path / "venv" / "bin", tmp_path / "log"
    commands.mkdir(parents=True)
    for name, code in (("python", f"grep -q shipped <<< $2 && exit {int(not brought)}"), ("apt-get", "")):
        (commands / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {log}\n{code}\nexit 0\n')
        (commands / name).chmod(0o755)
    subprocess.run(["sh", "-ec", command], check=True, env={"PATH": f"{commands}:/usr/bin:/bin"})
    ran = log.read_text()
    assert ("apt-get install -y --no-install-recommends g++" in ran) == (not brought)
    assert ("library.build()" in ran) == (not brought)


@pytest.mark.parametrize(("name", "project"), [("1e5", "1e5"), ("My.Model", "my-model"), ("007", "007")])
def test_compose_takes_the_name(artifact: Artifact, name: str, project: str, tmp_path: Path) -> None:
    convnext_deploy.package(artifact.path, "docker", out=tmp_path / "d", name=name)
    assert yaml.safe_load((tmp_path / "d" / "compose.yaml").read_text())["name"] == project


def test_what_is_to_be_typed_has_its_paths_quoted(artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "my model; x"
    out.mkdir()
    for target, options in (("docker", {}), ("kserve", {"image": "a.example/c:1"}), ("triton", {})):
        for note in convnext_deploy.package(artifact.path, target, out=out / target, **options):  # type: ignore[arg-type]
            assert str(out) not in note or any(str(out) in word for word in shlex.split(note))


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
    from convnext_deploy.serving.metrics import Metrics

    metrics = Metrics()
    names = {
        sample
        for family in metrics.registry.collect()
        for sample in (family.name, *(f"{family.name}_{end}" for end in ("total", "bucket", "sum", "count")))
    }
    asked = {name for _, expression, _ in docker._PANELS for name in re.findall(r"convnext_deploy_\w+", expression)}
    assert asked <= names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--for", "tritn"], "--for tritn; expected one of triton, kserve, docker; did you mean triton?"),
        (
            ["--for", "kserve"],
            "KServe runs an image (--image, built from --for docker) or a repository (--storage-uri)",
        ),
        (["--for", "kserve", "--image", "a", "--storage-uri", "b"], "KServe runs an image"),
        (["--for", "docker", "--image", "a"], "--image is for --for kserve, not for --for docker"),
        (["--for", "docker", "--name", "a/b"], "cannot stand in an address"),
        (["--for", "docker", "--out", "."], ". exists; choose another --out"),
    ],
)
def test_wrong_words_are_refused_and_leave_nothing(
    artifact: Artifact, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(app, ["package", str(artifact.path), "--out", "new", *words])
    assert isinstance(ran.exception, UsageError)
    assert message in str(ran.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_format_without_a_backend_is_told_the_other_way(artifact_of: Callable[..., Artifact], tmp_path: Path) -> None:
    made = artifact_of("native", input="uint8")
    with pytest.raises(UsageError, match=r"format native, for which Triton has no backend; .*\(or take --for docker\)"):
        convnext_deploy.package(made.path, "triton", out=tmp_path / "r")
    with pytest.raises(UsageError, match="has no backend; give --image"):
        convnext_deploy.package(made.path, "kserve", out=tmp_path / "r", storage_uri="s3://x")
    assert list(tmp_path.iterdir()) == []


def test_a_container_serves_the_model_under_its_own_name(artifact: Artifact, tmp_path: Path) -> None:
    convnext_deploy.package(artifact.path, "docker", out=tmp_path / "image", name="clothes")
    assert 'CMD ["serve", "clothes=/artifact", ' in (tmp_path / "image" / "Dockerfile").read_text()
    convnext_deploy.package(artifact.path, "kserve", out=tmp_path / "k", name="clothes", image="a.example/c:1")
    assert '"serve", "clothes=/artifact", ' in (tmp_path / "k" / "inferenceservice.yaml").read_text()
    with pytest.raises(UsageError, match=r"exists; choose another --out$"):
        convnext_deploy.package(artifact.path, "docker", out=tmp_path / "image")


@pytest.mark.parametrize("requirement", ['a"; rm -rf /', "a\nRUN b", "$(c)", "`d`"])
def test_what_pip_installs_cannot_be_another_line_of_the_dockerfile(
    requirement: str, artifact: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="is no requirement of pip's"):
        convnext_deploy.package(artifact.path, "docker", out=tmp_path / "image", requirement=requirement)
    assert not (tmp_path / "image").exists()
