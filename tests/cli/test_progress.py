"""What a command that takes seconds says of the time that is left."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convnext_deploy import api, cli
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.cli.terminal import Clock
from convnext_deploy.workflows.agenda import View


class Watched(io.StringIO):
    """A stream that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


def clock_at(*updates: tuple[int, int, float]) -> Clock:
    clock = Clock()
    clock.begin(0.0)
    for done, total, now in updates:
        clock.update(done, total, now)
    return clock


def test_the_time_that_is_left_goes_on_falling_while_a_long_step_takes_its_time() -> None:
    clock = clock_at((0, 100, 0.0), (20, 100, 10.0))
    assert clock.words(10.0) == "0:00:40 left"
    assert clock.words(25.0) == "0:00:25 left"


def test_where_a_step_takes_longer_than_thought_the_time_so_far_is_said() -> None:
    assert clock_at((0, 2, 0.0), (1, 2, 5.0)).words(12.0) == "0:00:12 so far"


def test_what_an_earlier_call_has_done_tells_nothing_of_the_speed() -> None:
    assert clock_at((5000, 10000, 0.0), (5100, 10000, 1.0)).words(1.0) == "0:00:49 left"


def test_a_second_round_of_the_same_steps_has_a_speed_of_its_own() -> None:
    assert clock_at((0, 10, 0.0), (10, 10, 1.0), (0, 10, 1.0), (1, 10, 3.0)).words(3.0) == "0:00:18 left"


def test_an_export_tells_each_step_and_how_much_is_behind_it(checkpoint: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    api.export(checkpoint, format="eager", image_size=64, out=tmp_path / "m", progress=lambda *step: told.append(step))
    assert [what for _, _, what in told] == [
        "loading the checkpoint", "computing the reference in fp32", "folding", "building eager", "verifying",
    ]  # fmt: skip
    shares = [done for done, _, _ in told]
    assert shares == sorted(set(shares))
    assert shares[0] == 0
    assert {total for _, total, _ in told} == {100}


def test_a_profile_tells_its_inferences(artifact_of: Callable[..., Artifact]) -> None:
    told: list[tuple[int, int, str]] = []
    api.profile(artifact_of("eager").path, steps=2, progress=lambda *step: told.append(step))
    assert told[0] == (0, 10, "timing")
    assert told[-1] == (5, 10, "profiling")


def test_looking_for_the_runtimes_shows_which_one_and_how_many_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Watched()
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.run(["doctor"]) == 0
    assert "looking for" in stream.getvalue()


def test_what_the_cpu_multiplies_is_measured_with_a_bar(
    monkeypatch: pytest.MonkeyPatch, need_format: Callable[[str], None]
) -> None:
    need_format("native")
    monkeypatch.setenv("CONVNEXT_DEPLOY_ISA", "portable")
    stream = Watched()
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.run(["doctor", "--peaks"]) == 0
    assert "preparing the CPU engine" in stream.getvalue()


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_nothing_is_drawn_for_a_script(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Watched()
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.run(["list", option]) == 0
    assert stream.getvalue() == ""


@pytest.mark.parametrize("watched", [True, False])
def test_an_interrupted_optimize_says_that_everything_is_kept_also_below_its_live_table(
    watched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **options: Any) -> None:
        options["watch"](View(rows=(), doing="building a", done=0, total=None, left_s=60.0, elapsed_s=1.0))
        raise KeyboardInterrupt

    stream = Watched() if watched else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(api, "optimize", interrupted)
    assert cli.run(["optimize", "--weights", "m.pth", "--data", "a", "--out", str(tmp_path / "o")]) == 130
    assert "everything is kept; the same command goes on where this one stopped\n" in stream.getvalue()
    assert stream.getvalue().endswith("error: interrupted\n")
