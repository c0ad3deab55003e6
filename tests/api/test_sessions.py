"""What `load` returns, as people use it: by name, in a `with` block, from several threads."""

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convnext_deploy import api, formats
from convnext_deploy.artifact import manifest
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.artifact.session import RunOptions, Session
from convnext_deploy.errors import DataError, UsageError


@pytest.fixture(scope="module")
def artifact(artifact_of: Callable[..., Artifact]) -> Artifact:
    return artifact_of("eager")


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def zeros(batch: int) -> np.ndarray:
    return np.zeros((batch, 3, 64, 64), np.float32)


def test_a_model_predicts_by_itself_what_the_function_predicts(artifact: Artifact, picture: Image.Image) -> None:
    with api.load(artifact.path) as model:
        assert model.predict(picture, top=3) == api.predict(model, picture, top=3)


def test_options_of_a_session_are_not_given_again(artifact: Artifact, picture: Image.Image) -> None:
    with api.load(artifact.path) as model, pytest.raises(UsageError, match="threads is the session's own"):
        model.predict(picture, threads=1)


def test_a_session_that_was_opened_below_the_interface_says_how_to_ask_it(
    artifact: Artifact, picture: Image.Image
) -> None:
    session = formats.opened(artifact, RunOptions(), trust=True)
    with pytest.raises(UsageError, match=r"call convnext_deploy\.predict with it"):
        session.predict(picture)


def test_a_representation_says_what_it_is_in_one_line(artifact: Artifact) -> None:
    with api.load(artifact.path) as model:
        assert repr(model) == (
            "<session of test_convnext as eager fp32 on cpu: float32 (batch, 3, 64, 64) to logits (batch, 10)>"
        )
    size = f"{artifact.bytes / 1e6:.1f} MB"
    assert (
        repr(manifest.read(artifact.path)) == f"<artifact {str(artifact.path)!r}: test_convnext as eager fp32, {size}>"
    )


@pytest.mark.parametrize("send", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_session_is_not_copied_or_sent_to_another_process(artifact: Artifact, send: Callable[..., Any]) -> None:
    """A pool of processes does that. It ended in `cannot pickle '_thread.RLock' object`."""
    with (
        api.load(artifact.path) as model,
        pytest.raises(UsageError, match=r"^<session of .*> cannot be copied .*; load its artifact again there$"),
    ):
        send(model)


def test_a_close_waits_for_the_runs_that_are_going_on_and_refuses_those_that_wait(artifact: Artifact) -> None:
    model = api.load(artifact.path, threads=1)
    entered, go_on = threading.Event(), threading.Event()
    step = model._step

    def slow() -> None:
        entered.set()
        assert go_on.wait(20)
        step()

    model._step = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(model.run, zeros(1))
        assert entered.wait(20)
        closing = pool.submit(model.close)
        while not model._closed:
            pass
        with pytest.raises(UsageError, match="closed> takes no more calls"):
            model.run(zeros(1))
        assert not closing.done()
        go_on.set()
        assert running.result(20)[0].shape == (1, 10)
        closing.result(20)


def test_threads_that_run_while_another_closes_get_their_outputs_or_a_refusal(artifact: Artifact) -> None:
    model = api.load(artifact.path, threads=1)
    refused = 0

    def ask(session: Session) -> int:
        count = 0
        while True:
            try:
                session.run(zeros(1))
            except UsageError:
                return count
            count += 1

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, model) for _ in range(4)]
        threading.Event().wait(0.3)
        model.close()
        refused = sum(future.result(20) >= 0 for future in asked)
    assert refused == 4


def test_closing_twice_at_once_is_closing_once(artifact: Artifact) -> None:
    model = api.load(artifact.path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: model.close(), range(8)))
    assert "closed" in repr(model)


def test_a_session_that_pythons_end_closes_says_nothing(
    artifact_of: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules are emptied before the last sessions go, which ended in a traceback of `__del__`."""
    from convnext_deploy.native import engine

    session = api.load(artifact_of("native").path)
    session.run(zeros(1))
    monkeypatch.setattr(engine, "ctypes", None)
    session.close()


@pytest.mark.parametrize("images", ["x" * 5000, "x/" * 3000, "\ud800", "a\0b"], ids=["name", "path", "text", "zero"])
def test_what_can_be_no_image_is_one_line(artifact: Artifact, images: str) -> None:
    with (
        api.load(artifact.path) as model,
        pytest.raises(DataError, match="does not exist; expected an image") as caught,
    ):
        model.predict(images)
    assert len(str(caught.value)) < 400
