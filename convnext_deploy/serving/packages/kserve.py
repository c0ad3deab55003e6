"""Manifests for KServe: the server of this package as a container, or Triton with a model repository."""

from pathlib import Path

from ...artifact.manifest import Artifact
from ...errors import UsageError
from . import triton

FILE = "inferenceservice.yaml"


def written(
    artifact: Artifact, name: str, folder: Path, *, image: str | None = None, storage_uri: str | None = None
) -> list[str]:
    """Write an InferenceService.

    Args:
        image: of the container that `--for docker` describes; then this package's server is run.
        storage_uri: where the repository of `--for triton` is; then Triton is run.

    Raises:
        UsageError: neither or both, or a format for which Triton has no backend.
    """
    if (image is None) == (storage_uri is None):
        raise UsageError("KServe runs an image (--image, built from --for docker) or a repository (--storage-uri)")
    if storage_uri is not None and artifact.manifest.export.format not in triton.BACKENDS:
        raise UsageError(
            f"{artifact.path} is of format {artifact.manifest.export.format}, for which Triton has no backend; give "
            "--image"
        )
    head = _HEAD.format(name=_dns(name), sha256=artifact.sha256)
    body = (
        _OWN.format(image=_quoted(image), name=_dns(name)) if image else _TRITON.format(uri=_quoted(storage_uri or ""))
    )
    (folder / FILE).write_text(head + body, "utf-8")
    return [f"kubectl apply -f {{out}}/{FILE}  # serves it as {_dns(name)}"]


def _dns(name: str) -> str:
    """A name that Kubernetes takes: at most 63 small letters, digits and hyphens."""
    label = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in name.lower()).strip("-")
    return label[:63].strip("-") or "model"


def _quoted(text: str) -> str:
    if not text.isprintable() or not text.isascii():
        raise UsageError(f"{text!r} has other than printable ASCII; expected an image's name or an address")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


_HEAD = """\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {name}
  annotations:
    convnext-deploy/artifact-sha256: "{sha256}"
spec:
  predictor:
"""
_OWN = """\
    containers:
      - name: kserve-container
        image: {image}
        args: ["serve", "{name}=/artifact", "--host", "0.0.0.0", "--port", "8080"]
        ports:
          - containerPort: 8080
            protocol: TCP
        readinessProbe:
          httpGet: {{path: /readyz, port: 8080}}
          periodSeconds: 5
        livenessProbe:
          httpGet: {{path: /healthz, port: 8080}}
          periodSeconds: 10
        securityContext:
          runAsNonRoot: true
          readOnlyRootFilesystem: true
          allowPrivilegeEscalation: false
          capabilities: {{drop: ["ALL"]}}
        resources:
          requests: {{cpu: "1", memory: 512Mi}}
          limits: {{memory: 2Gi}}
"""
_TRITON = """\
    model:
      modelFormat:
        name: triton
      protocolVersion: v2
      storageUri: {uri}
      resources:
        requests: {{cpu: "1", memory: 1Gi}}
        limits: {{memory: 4Gi}}
"""
