"""A container image for `serve`, and a compose file with Prometheus and Grafana beside it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from ... import env, formats
from ...artifact.manifest import MANIFEST_NAME, Artifact
from ...errors import UsageError

USER = 10001
PORT = 8000
PYTHON = "3.12"
_REQUIREMENT = re.compile(r"[A-Za-z0-9._/:@%+,=<>!~ \[\]-]+")  # nothing that a Dockerfile or a shell reads as its own


def written(artifact: Artifact, name: str, folder: Path, *, package: str | None = None) -> list[str]:
    """Write a Dockerfile with the artifact beside it, and what compose needs.

    Args:
        package: what pip installs in place of this version from PyPI: a requirement, or the name of a wheel that is
            put beside the Dockerfile.

    Raises:
        UsageError: the artifact runs on a GPU, whose image is another.
    """
    export = artifact.manifest.export
    fmt = formats.of(artifact)
    if export.device != "cpu":
        raise UsageError(f"{artifact.path} is for {export.device}, and the image is for CPUs; take --for triton")
    extras = ",".join(filter(None, ("serve", fmt.extra)))
    target = folder / "artifact"
    target.mkdir()
    for path in (*(file.path for file in artifact.manifest.files), MANIFEST_NAME):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.path / path, target / path)
    (folder / "wheels").mkdir()
    (folder / "wheels" / "README").write_text("Wheels here are found by pip before those of PyPI.\n")
    requirement = package or f"convnext-deploy[{extras}]=={env.version()}"
    if not _REQUIREMENT.fullmatch(requirement):
        raise UsageError(f"{requirement!r} is no requirement of pip's; expected such as 'convnext-deploy[serve]==1.0'")
    native = export.format == "native"
    files: dict[str, str] = {
        "Dockerfile": _DOCKERFILE.format(
            python=PYTHON, requirement=requirement, user=USER, port=PORT,
            library=_LIBRARY if native else "RUN mkdir -p /opt/cache", name=name,
        ),
        ".dockerignore": "*\n!artifact\n!wheels\n",
        "compose.yaml": _COMPOSE.format(name=_project(name), port=PORT),
        "prometheus.yml": _PROMETHEUS.format(port=PORT),
        "grafana/datasource.yaml": _DATASOURCE,
        "grafana/dashboards.yaml": _DASHBOARDS,
        "grafana/dashboard.json": json.dumps(_dashboard(), indent=2) + "\n",
    }  # fmt: skip
    for path, text in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text, "utf-8")
    return [f"docker compose -f {{out}}/compose.yaml up --build  # on port {PORT}, Grafana on 3000"]


# Where the wheel brings no engine it is compiled here, so that the image itself needs no compiler.
_LIBRARY = """\
# hadolint ignore=DL3008
RUN mkdir -p /opt/cache \\
    && if ! /opt/venv/bin/python -c \\
        "import sys; from convnext_deploy.native import shipped; sys.exit(shipped.library() is None)"; then \\
        apt-get update \\
        && apt-get install -y --no-install-recommends g++ \\
        && rm -rf /var/lib/apt/lists/* \\
        && XDG_CACHE_HOME=/opt/cache /opt/venv/bin/python -c \\
            "from convnext_deploy.native import library; library.build()"; \\
    fi\
"""
_DOCKERFILE = """\
FROM python:{python}-slim AS build
RUN python -m venv /opt/venv
COPY wheels /wheels
ARG PACKAGE="{requirement}"
RUN /opt/venv/bin/pip install --no-cache-dir --find-links /wheels "$PACKAGE"
{library}

FROM python:{python}-slim
COPY --from=build /opt/venv /opt/venv
COPY --from=build --chown={user}:{user} /opt/cache /opt/cache
COPY artifact /artifact
ENV PATH=/opt/venv/bin:$PATH XDG_CACHE_HOME=/opt/cache PYTHONDONTWRITEBYTECODE=1
USER {user}:{user}
EXPOSE {port}
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \\
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}/readyz', timeout=2)"]
ENTRYPOINT ["convnext-deploy"]
CMD ["serve", "{name}=/artifact", "--host", "0.0.0.0", "--port", "{port}"]
"""
_COMPOSE = """\
name: "{name}"
services:
  serve:
    build: .
    read_only: true
    tmpfs: [/tmp]
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
    environment:
      CONVNEXT_DEPLOY_TOKEN: ${{CONVNEXT_DEPLOY_TOKEN:-}}
    ports: ["127.0.0.1:{port}:{port}"]
    stop_grace_period: 40s
    restart: unless-stopped
  prometheus:
    image: prom/prometheus:v3.5.0
    volumes: ["./prometheus.yml:/etc/prometheus/prometheus.yml:ro"]
    ports: ["127.0.0.1:9090:9090"]
  grafana:
    image: grafana/grafana:12.1.0
    volumes:
      - ./grafana/datasource.yaml:/etc/grafana/provisioning/datasources/datasource.yaml:ro
      - ./grafana/dashboards.yaml:/etc/grafana/provisioning/dashboards/dashboards.yaml:ro
      - ./grafana/dashboard.json:/var/lib/grafana/dashboards/dashboard.json:ro
    ports: ["127.0.0.1:3000:3000"]
"""
_PROMETHEUS = """\
global:
  scrape_interval: 5s
scrape_configs:
  - job_name: convnext-deploy
    static_configs:
      - targets: ["serve:{port}"]
"""
_DATASOURCE = """\
apiVersion: 1
datasources:
  - name: Prometheus
    uid: prometheus
    type: prometheus
    access: proxy
    url: http://prometheus:9090
    isDefault: true
"""
_DASHBOARDS = """\
apiVersion: 1
providers:
  - name: convnext-deploy
    type: file
    options:
      path: /var/lib/grafana/dashboards
"""
_PANELS = (
    ("Requests a second, by status", "sum by (status) (rate(convnext_deploy_requests_total[1m]))", "reqps"),
    (
        "Time of an answer, p99",
        "histogram_quantile(0.99, sum by (le, path) (rate(convnext_deploy_request_seconds_bucket[1m])))",
        "s",
    ),
    (
        "Wait for a session, p99",
        "histogram_quantile(0.99, sum by (le, model) (rate(convnext_deploy_wait_seconds_bucket[1m])))",
        "s",
    ),
    (
        "Images of a batch, mean",
        "rate(convnext_deploy_batch_images_sum[1m]) / rate(convnext_deploy_batch_images_count[1m])",
        "none",
    ),
    ("Requests refused a second, by reason", "sum by (reason) (rate(convnext_deploy_refused_total[1m]))", "reqps"),
    ("Answers a second, by class", "topk(10, sum by (name, number) (rate(convnext_deploy_answers_total[5m])))", "cps"),
)


def _project(name: str) -> str:
    """A name that compose takes for a project: lower case, without dots."""
    return name.lower().replace(".", "-")


def _dashboard() -> dict[str, Any]:
    panels = [
        {
            "id": index + 1,
            "type": "timeseries",
            "title": title,
            "datasource": {"type": "prometheus", "uid": "prometheus"},
            "gridPos": {"x": 12 * (index % 2), "y": 8 * (index // 2), "w": 12, "h": 8},
            "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
            "targets": [{"refId": "A", "expr": expression}],
        }
        for index, (title, expression, unit) in enumerate(_PANELS)
    ]
    return {
        "title": "convnext-deploy", "uid": "convnext-deploy", "schemaVersion": 39, "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"}, "panels": panels,
    }  # fmt: skip
