"""What is said of this machine and its Python, where something that is asked for is not there."""

import importlib.metadata
from typing import Any

import pytest

from convnext_deploy import env


def test_a_checkout_that_is_not_installed_has_a_version_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert env.version() == "0+unknown"
    assert env.versions()["convnext-deploy"] == "0+unknown"


def test_the_version_is_that_of_the_installed_package() -> None:
    assert env.version() == env.versions()["convnext-deploy"]
