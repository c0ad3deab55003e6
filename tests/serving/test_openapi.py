"""The page at /docs: only what the served models answer."""

from types import SimpleNamespace
from typing import Any

import pytest

from convnext_deploy.serving import openapi


def served(default: str, **classes: bool) -> Any:
    models = {name: SimpleNamespace(has_classes=has) for name, has in classes.items()}
    return SimpleNamespace(models=models, default=default, options=SimpleNamespace(token=None))


def test_a_server_without_classes_is_not_asked_for_them() -> None:
    document = openapi.document(served("maps", maps=False))
    assert "/classify" not in document["paths"]
    page = openapi.page(document)
    assert "classify" not in page
    assert "curl http://HOST:PORT/v2/models/MODEL" in page


@pytest.mark.parametrize(
    ("default", "said"), [("maps", "needed: the default, maps, has no classes"), ("photos", "default: photos")]
)
def test_beside_a_model_without_classes_the_one_with_them_is_named(default: str, said: str) -> None:
    document = openapi.document(served(default, maps=False, photos=True))
    (model, *_) = document["paths"]["/classify"]["post"]["parameters"]
    assert (model["schema"]["enum"], model["description"]) == (["photos"], said)
    assert "--data-binary @photo.jpg http://HOST:PORT/classify" in openapi.page(document)
