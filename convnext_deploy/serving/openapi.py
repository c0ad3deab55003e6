"""The description of the server's addresses, for programs (OpenAPI 3.1) and for people."""

import html
from typing import Any

from .. import env
from .service import Service

_ERROR = {"description": 'one line in JSON: {"error": ...}'}


def document(service: Service) -> dict[str, Any]:
    """The OpenAPI document of what is served now."""
    names = list(service.models)
    classifiers = [name for name, model in service.models.items() if model.has_classes]
    default = service.default
    said = f"default: {default}" if default in classifiers else f"needed: the default, {default}, has no classes"
    secured: dict[str, Any] = {}
    components: dict[str, Any] = {}
    if service.options.token is not None:
        secured = {"security": [{"token": []}]}
        components = {"components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}}
    binary = {"schema": {"type": "string", "format": "binary"}}
    classify: dict[str, Any] = {
        "/classify": {
            "post": {
                "summary": "The most probable classes of an image",
                "parameters": [
                    _query("model", {"type": "string", "enum": classifiers}, said),
                    _query("top", {"type": "integer", "minimum": 1, "default": 5}, "classes an image"),
                    _query("timeout_ms", {"type": "number"}, "after which the answer is of no use"),
                ],
                "requestBody": {
                    "required": True,
                    "content": {
                        **dict.fromkeys(("image/jpeg", "image/png", "image/webp"), binary),
                        "multipart/form-data": {
                            "schema": {"type": "object", "properties": {"image": binary["schema"]}}
                        },
                    },
                },
                "responses": {
                    "200": {
                        "description": "classes and probabilities, the most probable first",
                        "content": {"application/json": {"schema": _CLASSIFIED}},
                    },
                    **_errors("400", "401", "404", "408", "413", "415", "429", "503", "504"),
                },
                **secured,
            }
        },
    }
    paths: dict[str, Any] = {
        **(classify if classifiers else {}),
        "/v2/models/{model}/infer": {
            "post": {
                "summary": "Tensors in, tensors out: Open Inference Protocol 2, with the binary tensor extension",
                "parameters": [_path("model", names)],
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {}, "application/octet-stream": binary},
                },
                "responses": {
                    "200": {"description": "the outputs"},
                    **_errors("400", "401", "404", "408", "413", "415", "429", "503", "504"),
                },
                **secured,
            }
        },
        "/v2/models/{model}": {
            "get": {
                "summary": "Names, types and shapes of a model's inputs and outputs",
                "parameters": [_path("model", names)],
                "responses": {"200": {"description": "metadata"}, **_errors("401", "404")},
                **secured,
            }
        },
        "/healthz": _get("Whether the process lives", open=True),
        "/readyz": _get("Whether requests are taken", open=True, errors=("503",)),
        "/metrics": _get("Measurements for Prometheus"),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "convnext-deploy", "version": env.version(), "description": f"Serves {', '.join(names)}."},
        "paths": paths,
        **components,
    }


_CLASSIFIED = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "artifact_sha256": {"type": "string"},
        "predictions": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "image": {"type": "string"},
                    "classes": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {
                                "number": {"type": "integer"},
                                "name": {"type": ["string", "null"]},
                                "probability": {"type": "number"},
                            },
                        },
                    },
                },
            },
        },
    },
}


def _query(name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": description}


def _path(name: str, values: list[str]) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "enum": values}}


def _errors(*statuses: str) -> dict[str, Any]:
    return dict.fromkeys(statuses, _ERROR)


def _get(summary: str, *, open: bool = False, errors: tuple[str, ...] = ()) -> dict[str, Any]:
    refused = errors if open else ("401", *errors)
    return {"get": {"summary": summary, "responses": {"200": {"description": "OK"}, **_errors(*refused)}}}


def page(description: dict[str, Any]) -> str:
    """The document as one HTML page, which loads nothing from anywhere."""
    rows = []
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            parameters = "".join(
                f"<li><code>{html.escape(one['name'])}</code> ({html.escape(one['in'])}) "
                f"{html.escape(one.get('description', ''))}</li>"
                for one in operation.get("parameters", ())
            )
            answers = "".join(
                f"<li><code>{status}</code> {html.escape(answer['description'])}</li>"
                for status, answer in operation["responses"].items()
            )
            rows.append(
                f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(operation['summary'])}</p>"
                f"<ul>{parameters}</ul><ul>{answers}</ul>"
            )
    title = html.escape(description["info"]["title"])
    tried = "http://HOST:PORT/v2/models/MODEL"
    if "/classify" in description["paths"]:
        tried = "--data-binary @photo.jpg http://HOST:PORT/classify"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        "<style>body{font:16px/1.5 sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem}"
        "h2{border-top:1px solid #ccc;padding-top:1rem}</style>"
        f"<h1>{title}</h1><p>{html.escape(description['info']['description'])} "
        "The same for programs: <a href=openapi.json>openapi.json</a>.</p>"
        f"<p><code>curl {tried}</code></p>{''.join(rows)}</html>"
    )
