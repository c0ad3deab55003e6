"""A candidate beside the model that answers: what is compared, what is decided, and that no client notices it."""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec import structs

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from server_process import Running, picture, serving, until

import convnext_deploy
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.errors import ConvNextDeployError, UsageError
from convnext_deploy.serving import application
from convnext_deploy.serving.batching import Job
from convnext_deploy.serving.service import Service
from convnext_deploy.serving.shadow import WAITING, ShadowOptions, _refuse_unlike

SIDE = 64


@pytest.fixture(scope="module")
def pixels(artifact_of: Callable[..., Artifact]) -> Artifact:
    return artifact_of("onnx", input="uint8")


@pytest.fixture(scope="module")
def same(artifact_of: Callable[..., Artifact]) -> Artifact:
    """The same network, which takes normalized images."""
    return artifact_of("onnx")


@pytest.fixture(scope="module")
def other(artifact_of: Callable[..., Artifact]) -> Artifact:
    """Another network of as many classes."""
    return artifact_of("onnx", {"name": "test_convnext2"})


def job(seed: int, logits: np.ndarray[Any, Any] | None = None) -> Job:
    """One that was answered."""
    images = np.random.default_rng(seed).integers(0, 256, (1, SIDE, SIDE, 3), np.uint8)
    return Job(1, images=images, outputs=(np.zeros((1, 10), np.float32) if logits is None else logits,))


def compared(running: Running) -> int:
    return int(running.service.shadow.state()["images"])  # type: ignore[union-attr]


def test_a_candidate_that_agrees_passes_and_no_answer_is_another(pixels: Artifact, same: Artifact) -> None:
    lines: list[str] = []
    beside = ShadowOptions(path=same.path, share=1.0, limit=0.2)
    with serving(f"m={pixels.path}", shadow=beside, say=lines.append) as running:
        shadow = running.service.shadow
        assert shadow is not None
        needed = shadow.state()["more_images"]
        for seed in range(needed):
            status = running.ask("POST", "/classify?top=1", picture(seed=seed))[0]
            assert status == 200
            until(lambda seed=seed: compared(running) == seed + 1)  # type: ignore[misc]
        until(lambda: any("shadow: PASS" in line for line in lines))
        state = shadow.state()
        assert (state["decision"], state["other_answers"], state["more_images"], state["died"]) == ("PASS", 0, 0, None)
        assert state["upper"] < 0.2
        assert running.metric('shadow_decision{decision="PASS"}') == 1
        assert running.metric('shadow_images_total{outcome="same"}') == needed
        running.ask("POST", "/classify?top=1", picture(seed=999))  # it is decided: nothing is compared any more
        assert compared(running) == needed
    (line,) = (line for line in lines if line.startswith("shadow: "))
    assert line.startswith(f"shadow: PASS after {needed} images: {same.path} answers 0 otherwise, at most ")


def test_a_candidate_of_other_answers_fails(pixels: Artifact, other: Artifact) -> None:
    lines: list[str] = []
    beside = ShadowOptions(path=other.path, share=1.0, limit=0.01)
    with serving(f"m={pixels.path}", shadow=beside, say=lines.append) as running:
        for seed in range(40):
            running.ask("POST", "/classify", picture(seed=seed))
            if running.service.shadow.state()["decision"] == "FAIL":  # type: ignore[union-attr]
                break
        until(lambda: any(line.startswith("shadow: FAIL after") for line in lines))


async def asked_of_admin(service: Service, path: str) -> tuple[int, Any]:
    """As a server asks the application; Starlette's own client needs one of two packages, by its release."""
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": path, "query_string": b"", "headers": []}
    await application.admin(service)(scope, receive, send)
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


def test_what_it_says_is_on_the_admin_address_only(pixels: Artifact, same: Artifact) -> None:
    with serving(f"m={pixels.path}", shadow=ShadowOptions(path=same.path)) as running:
        assert running.ask("GET", "/shadow")[0] == 404
        found = asyncio.run(asked_of_admin(running.service, "/shadow"))[1]
        assert (found["decision"], found["images"], found["limit"]) == ("INCONCLUSIVE", 0, 0.01)
        assert (found["baseline_sha256"], found["candidate_sha256"]) == (pixels.sha256, same.sha256)
        assert found["more_requests"] == 10 * found["more_images"]  # a tenth is asked
    with serving(f"m={pixels.path}") as running:
        status, answer = asyncio.run(asked_of_admin(running.service, "/shadow"))
        assert (status, answer["error"][:24]) == (404, "no candidate is compared")


def test_a_candidate_that_dies_costs_no_answer_and_fails(pixels: Artifact, same: Artifact) -> None:
    lines: list[str] = []
    beside = ShadowOptions(path=same.path, share=1.0)
    with serving(f"m={pixels.path}", shadow=beside, say=lines.append) as running:
        shadow = running.service.shadow
        assert shadow is not None
        os.kill(shadow._worker._process.pid, signal.SIGKILL)
        for seed in range(5):
            assert running.ask("POST", "/classify", picture(seed=seed))[0] == 200
        until(lambda: shadow.state()["decision"] == "FAIL")
        assert "was killed by SIGKILL" in shadow.state()["died"]
        assert running.ask("POST", "/classify", picture())[0] == 200
    assert any(line.startswith("shadow: FAIL, the candidate ") for line in lines)


def test_a_candidate_that_hangs_holds_up_nobody_and_is_given_up(pixels: Artifact, same: Artifact) -> None:
    beside = ShadowOptions(path=same.path, share=1.0)
    with serving(f"m={pixels.path}", shadow=beside, deadline_ms=1000) as running:
        shadow = running.service.shadow
        assert shadow is not None
        os.kill(shadow._worker._process.pid, signal.SIGSTOP)
        for seed in range(WAITING + 5):
            shadow.look([job(seed)])
        assert running.ask("POST", "/classify", picture())[0] == 200
        assert shadow.state()["dropped"] >= 4  # one is asked, and `WAITING` wait
        until(lambda: shadow.state()["decision"] == "FAIL")


def test_an_image_that_was_compared_does_not_count_again(pixels: Artifact, same: Artifact) -> None:
    with serving(f"m={pixels.path}", shadow=ShadowOptions(path=same.path, share=1.0)) as running:
        for _ in range(3):
            running.ask("POST", "/classify", picture())
        until(lambda: running.metric('shadow_images_total{outcome="repeated"}') == 2)
        assert compared(running) == 1


def test_only_a_share_of_the_requests_is_asked_and_one_image_of_each(pixels: Artifact, same: Artifact) -> None:
    with serving(f"m={pixels.path}", shadow=ShadowOptions(path=same.path, share=0.05)) as running:
        shadow = running.service.shadow
        assert shadow is not None
        taken: list[Any] = []
        shadow._queue.put_nowait = taken.append  # type: ignore[method-assign, assignment]
        for seed in range(10):
            many = Job(40, images=np.repeat(job(seed).images, 40, 0), outputs=(np.zeros((40, 10), np.float32),))  # type: ignore[arg-type]
            for _ in range(100):
                shadow.look([many])
        assert 20 < len(taken) < 90
        assert all(one[0].shape[0] == 1 for one in taken)


def test_a_watcher_that_fails_is_dismissed_and_requests_are_answered(pixels: Artifact) -> None:
    lines: list[str] = []
    with serving(f"m={pixels.path}", say=lines.append) as running:

        def broken(jobs: object) -> None:
            raise ValueError("broken")

        running.service.models["m"].watch(broken)
        for seed in range(3):
            assert running.ask("POST", "/classify", picture(seed=seed))[0] == 200
    assert [line for line in lines if "broken" in line] == [
        "m: nothing is watched any more by what failed: ValueError: broken"
    ]


def test_a_reload_begins_the_comparison_anew(pixels: Artifact, same: Artifact, other: Artifact, tmp_path: Path) -> None:
    shutil.copytree(same.path, tmp_path / "candidate")
    beside = ShadowOptions(path=tmp_path / "candidate", share=1.0)
    with serving(f"m={pixels.path}", shadow=beside) as running:
        service = running.service
        before = service.shadow
        assert service.reload() == [f"m: {pixels.path} has not changed"]
        assert service.shadow is before
        shutil.rmtree(tmp_path / "candidate")
        shutil.copytree(other.path, tmp_path / "candidate")
        assert service.reload()[-1] == f"m: the comparison with {tmp_path / 'candidate'} begins anew"
        assert service.shadow is not None
        assert service.shadow.sha256 == other.sha256
        assert before is not None
        until(lambda: not before._thread.is_alive())
        running.ask("POST", "/classify", picture())
        until(lambda: compared(running) == 1)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("model", {"num_classes": 7}, r"another classes than .* \(10, and the candidate 7\)"),
        ("model", {"task": "embed"}, "another task than"),
        ("model", {"image_size": (96, 96)}, r"another image size than .* \(\(64, 64\), and the candidate \(96, 96\)\)"),
        ("model", {"problem": "multi-label"}, "another problem than"),
        ("preprocessing", {"mean": (0.1, 0.2, 0.3)}, "another mean than"),
        ("preprocessing", {"crop_pct": 0.9}, "another crop_pct than"),
        ("export", {"dynamic_image_size": True}, "another dynamic image size than"),
        (None, {"labels": tuple("abcdefghij")}, "another labels than"),
    ],
)
def test_a_candidate_that_cannot_be_compared_is_refused_in_one_line(
    pixels: Artifact, part: str | None, changes: dict[str, Any], message: str
) -> None:
    facts = structs.replace(
        pixels.manifest,
        labels=tuple("0123456789"),
        model=structs.replace(pixels.manifest.model, problem="single-label"),
    )
    baseline: Any = SimpleNamespace(manifest=facts, has_classes=True, artifact=pixels)
    if part is not None:
        changes = {part: structs.replace(getattr(facts, part), **changes)}
    _refuse_unlike(baseline, facts, Path("c"))
    with pytest.raises(UsageError, match=f"--shadow c has {message}"):
        _refuse_unlike(baseline, structs.replace(facts, **changes), Path("c"))


def test_normalized_images_are_not_turned_back_into_pixels(pixels: Artifact, same: Artifact) -> None:
    with pytest.raises(UsageError, match=r"has another input than .* \(float32, and the candidate uint8\)"):
        convnext_deploy.asgi(same.path, shadow=pixels.path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shadow_share": 0}, "shadow_share 0; expected a share above 0 and at most 1"),
        ({"shadow_share": "half"}, "shadow_share 'half'; expected a share"),
        ({"shadow_limit": 0.9}, "shadow_limit 0.9; expected a share above 0 and at most 0.5"),
        ({"shadow_limit": float("nan")}, "shadow_limit nan; expected a share"),
    ],
)
def test_a_share_that_is_none_is_refused(pixels: Artifact, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        convnext_deploy.asgi(pixels.path, shadow=pixels.path, **options)


def test_shadow_options_without_a_candidate_and_with_two_models_are_refused(pixels: Artifact, same: Artifact) -> None:
    with pytest.raises(UsageError, match="shadow_share without shadow; name the candidate's folder"):
        convnext_deploy.asgi(pixels.path, shadow_share=0.5)
    with pytest.raises(UsageError, match=r"--shadow .* with 2 artifacts; serve them one by one"):
        convnext_deploy.asgi({"a": pixels.path, "b": same.path}, shadow=same.path)
    with pytest.raises(ConvNextDeployError, match="nowhere"):
        convnext_deploy.asgi(pixels.path, shadow="nowhere")


def test_its_end_leaves_no_process_and_no_thread(pixels: Artifact, same: Artifact) -> None:
    app = convnext_deploy.asgi(pixels.path, shadow=same.path)
    shadow = app.state.service.shadow
    process = shadow._worker._process
    app.state.service.close()
    until(lambda: process.poll() is not None)
    until(lambda: not shadow._thread.is_alive())
