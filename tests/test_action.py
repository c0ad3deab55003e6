"""The GitHub Action: its steps as GitHub runs them, beside a checkout that tries to forge the verdict."""

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image

from convnext_deploy import cli
from convnext_deploy.accuracy import prediction_files
from convnext_deploy.accuracy import predictions as predictions_of
from convnext_deploy.artifact import manifest
from convnext_deploy.artifact.manifest import Artifact
from convnext_deploy.records.accuracy import ClassAccuracy, EvalResult

ROOT = Path(__file__).resolve().parent.parent
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
IMAGES, CLASSES = 2000, 10


def write_evaluation(out: Path, right: int) -> Path:
    """What `eval --out` keeps of a model that is right on the first so many of 2,000 images."""
    labels = np.arange(IMAGES) % CLASSES
    first = np.where(np.arange(IMAGES) < right, labels, (labels + 1) % CLASSES)
    top = np.column_stack([first, (first + 2) % CLASSES]).astype(np.int32)
    predictions = predictions_of.Predictions(
        names=tuple(f"{index:04d}" for index in range(IMAGES)),
        labels=labels.astype(np.int64),
        top_classes=top,
        top_log_probs=np.log(np.tile([0.7, 0.1], (IMAGES, 1))).astype(np.float32),
        label_log_prob=np.log(np.where(first == labels, 0.7, 0.05)).astype(np.float32),
    )
    hits = first == labels
    result = EvalResult(
        artifact="m", artifact_sha256="0" * 64, data="d", data_sha256="0" * 64, images=IMAGES, corrupt=(),
        top1=float(hits.mean()), top5=1.0, images_per_s=1.0, predictions=f"{out.name}.npz",
        per_class=tuple(
            ClassAccuracy(label=n, name=str(n), images=IMAGES // CLASSES, top1=float(hits[labels == n].mean()))
            for n in range(CLASSES)
        ),
    )  # fmt: skip
    out.with_name(f"{out.name}.npz").write_bytes(
        prediction_files.encode(predictions_of.Chunk(0, IMAGES, predictions, ()))
    )
    out.with_name(f"{out.name}.json").write_bytes(manifest.encode(result))
    return out.with_name(f"{out.name}.json")


# Whatever of these runs in the gate's process ends it with success and a summary of its own.
FORGED = "import os, sys; open(os.environ['GITHUB_STEP_SUMMARY'], 'a').write('FORGED'); os._exit(0)\n"
FORGERIES = {
    "package": ("convnext_deploy/__init__.py", "convnext_deploy/__main__.py"),
    "dependency": ("msgspec.py", "typer.py", "numpy.py"),
    "sitecustomize": ("sitecustomize.py", "usercustomize.py"),
    "conftest": ("conftest.py",),
    "installer": ("pip/__init__.py", "pip/__main__.py", "venv/__init__.py", "venv/__main__.py", "ensurepip.py",
                  "setuptools/__init__.py", "setuptools/build_meta.py", "setup.py"),
}  # fmt: skip

# An action's folder that installs in no time: this checkout and what is installed here, by a .pth file.
BACKEND = f"""
import zipfile
def get_requires_for_build_wheel(config_settings=None):
    return []
def build_wheel(folder, config_settings=None, metadata_directory=None):
    info = "convnext_deploy-0.1.0.dist-info/"
    with zipfile.ZipFile(folder + "/convnext_deploy-0.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("stand_in.pth", {f"{ROOT}{os.linesep}{sysconfig.get_path('purelib')}{os.linesep}"!r})
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: convnext-deploy\\nVersion: 0.1.0\\n"
                       "Provides-Extra: openvino\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nGenerator: t\\nRoot-Is-Purelib: true\\n"
                       "Tag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return "convnext_deploy-0.1.0-py3-none-any.whl"
"""


class Runner:
    """GitHub's runner, as far as a composite action sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkout, self.temp, self.action = folder / "checkout", folder / "temp", folder / "action"
        for made in (self.checkout, self.temp, self.action):
            made.mkdir()
        (self.action / "backend.py").write_text(BACKEND)
        (self.action / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        )
        self.outputs: dict[str, dict[str, str]] = {}

    def step(self, name: str, **inputs: str) -> tuple[int, str, str]:
        """(exit code, summary, log) of one step."""
        (step,) = (step for step in ACTION["runs"]["steps"] if step["name"] == name)
        defaults = {key: said.get("default", "") for key, said in ACTION["inputs"].items()}
        values = {
            f"inputs.{key}": value
            for key, value in (defaults | {k.replace("_", "-"): v for k, v in inputs.items()}).items()
        }
        values |= {f"steps.{id}.outputs.{key}": v for id, found in self.outputs.items() for key, v in found.items()}
        settings = {
            key: re.sub(r"\${{ ([\w.-]+) }}", lambda found: values.get(found[1], ""), text)
            for key, text in step["env"].items()
        }
        summary, output = self.folder / "summary.md", self.folder / "output"
        for file in (summary, output):
            file.write_text("")
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],  # as GitHub runs it
            cwd=self.checkout, capture_output=True, text=True, check=False,
            env={
                **os.environ, **settings, "GITHUB_STEP_SUMMARY": str(summary), "GITHUB_OUTPUT": str(output),
                "GITHUB_ACTION_PATH": str(self.action), "RUNNER_TEMP": str(self.temp),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": ".", "PYTHONSTARTUP": "conftest.py", "PIP_NO_INDEX": "1",  # the first as many jobs set it
            },
        )  # fmt: skip
        self.outputs[step["id"]] = dict(line.split("=", 1) for line in output.read_text().splitlines())
        return done.returncode, summary.read_text(), done.stdout + done.stderr


def plant(checkout: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text(FORGED)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """After the step Install, in a checkout with every forgery at once."""
    runner = Runner(tmp_path_factory.mktemp("runner"))
    for names in FORGERIES.values():
        plant(runner.checkout, names)
    (runner.checkout / "pyproject.toml").write_text("[build-system]\nrequires = ['nothing']\n")
    (runner.checkout / "setup.cfg").write_text("[install]\nprefix = /nowhere\n")
    (runner.checkout / "pip.conf").write_text("[global]\ntarget = .\n")
    code, summary, log = runner.step("Install", extras="openvino", python=sys.executable)
    assert (code, summary) == (0, ""), log
    return runner


@pytest.fixture
def job(runner: Runner) -> Runner:
    """The same with an empty checkout, but for three evaluations."""
    subprocess.run(["rm", "-rf", runner.checkout], check=True)
    runner.checkout.mkdir()
    for name, right in (("baseline", 1800), ("worse", 1000), ("about", 1796)):
        write_evaluation(runner.checkout / name, right)
    return runner


def test_the_action_is_what_github_takes() -> None:
    assert set(ACTION) == {"name", "description", "inputs", "outputs", "runs"}
    assert ACTION["runs"]["using"] == "composite"
    assert {name for name, said in ACTION["inputs"].items() if said.get("required")} == {"baseline", "candidate"}
    for step in ACTION["runs"]["steps"]:
        assert set(step) <= {"name", "id", "shell", "run", "env"}
        assert step["shell"] == "bash"
        assert "${{" not in step["run"]  # an input that is pasted into a script can be a command
        checked = subprocess.run(["bash", "-n", "-c", step["run"]], capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")
    used = re.findall(r"inputs\.([\w-]+)", str(ACTION["runs"]))
    assert sorted(used) == sorted(ACTION["inputs"])
    ids = {step["id"] for step in ACTION["runs"]["steps"]}
    assert all(re.fullmatch(rf"\${{{{ steps\.({'|'.join(ids)})\.outputs\.{name}( \|\| 'ERROR')? }}}}", said["value"])
               for name, said in ACTION["outputs"].items())  # fmt: skip


def test_the_workflow_runs_what_ci_runs_and_every_template_is_yaml() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands.pop() == ".ci/run"
    assert all("apt-get install" in command for command in commands)  # what tests of emulated CPUs need
    assert workflow["permissions"] == {"contents": "read"}
    for path in [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"]:
        assert yaml.safe_load(path.read_text()), path


def test_the_actions_options_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["gate", "--help"]) == 0
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    given = set(re.findall(r"options\+=\(.*?(--[a-z-]+)", ACTION["runs"]["steps"][1]["run"]))
    given |= {"--baseline", "--candidate", "--markdown", "--outputs"}
    assert known - given == {
        "--json",
        "--quiet",
        "--debug",
        "--help",
        "--multi-label",
    }  # the last is short for a problem
    assert given <= known


@pytest.mark.slow  # makes a virtual environment
@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_checkout_cannot_forge_the_verdict(forgery: str, job: Runner) -> None:
    plant(job.checkout, FORGERIES[forgery])
    code, summary, log = job.step("Gate", baseline="baseline.json", candidate="worse.json", max_drop="0.3")
    assert code == 1, log
    assert summary.startswith("### FAIL: worse.json (m) against baseline.json (m) on 2,000 images of d")
    assert job.outputs["gate"] == {"decision": "FAIL", "drop": "40.000", "images-needed": ""}


@pytest.mark.slow
@pytest.mark.parametrize(("warn", "code"), [("false", 3), ("true", 0)])
def test_inconclusive_stops_the_job_unless_it_is_only_to_warn(warn: str, code: int, job: Runner) -> None:
    inputs = {"baseline": "baseline.json", "candidate": "about.json", "max_drop": "0.3", "warn_on_inconclusive": warn}
    found, summary, log = job.step("Gate", **inputs)
    assert found == code, log
    assert summary.startswith("### INCONCLUSIVE")
    assert job.outputs["gate"]["decision"] == "INCONCLUSIVE"
    assert int(job.outputs["gate"]["images-needed"]) > IMAGES
    assert ("::warning" in log) == (warn == "true")


@pytest.fixture
def images_and_labels(job: Runner) -> dict[str, str]:
    """Images of five of ten classes, by folders, and the ten names."""
    for number in range(1, 10, 2):
        (job.checkout / "images" / f"class{number}").mkdir(parents=True)
        Image.new("RGB", (64, 64), (20 * number, 90, 200 - 20 * number)).save(
            job.checkout / "images" / f"class{number}" / "one.png"
        )
    (job.checkout / "labels.txt").write_text("".join(f"class{number}\n" for number in range(10)))
    return {"data": "images", "labels": "labels.txt", "max_drop": "1"}


@pytest.mark.slow
def test_labels_number_the_classes_and_only_trust_runs_an_artifacts_code(
    job: Runner,
    images_and_labels: dict[str, str],
    artifact_of: Callable[..., Artifact],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    artifact = str(artifact_of("torchscript").path)
    inputs = {"baseline": artifact, "candidate": artifact, **images_and_labels}
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # another user's: there it was not built
    code, summary, log = job.step("Gate", **inputs)
    assert code == 2, log
    assert "format torchscript runs code that the artifact brings" in summary
    code, summary, log = job.step("Gate", **inputs, trust="true")
    assert job.outputs["gate"]["decision"] != "ERROR", log
    assert "on 5 images of images" in summary
    code, summary, log = job.step("Gate", **inputs | {"labels": ""}, trust="true")
    assert code == 2, log
    assert "has 5 classes and the model has 10 outputs" in summary


@pytest.mark.parametrize("flag", ["trust", "warn_on_inconclusive"])
def test_a_flag_that_is_neither_true_nor_false_is_refused(flag: str, tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    code, summary, log = runner.step("Gate", **{"baseline": "b.json", "candidate": "c.json", flag: "Yes"})
    assert code == 2
    assert f"error: {flag.replace('_', '-')}=Yes; expected true or false" in log
    assert summary == f"### ERROR: {flag.replace('_', '-')}=Yes; expected true or false\n"
    assert runner.outputs["gate"]["decision"] == "ERROR"


@pytest.mark.parametrize("empty", ["baseline", "candidate"])
def test_a_required_input_that_is_empty_is_named(empty: str, tmp_path: Path) -> None:
    """GitHub takes it: a variable of the workflow that is not set."""
    runner = Runner(tmp_path)
    code, summary, _ = runner.step("Gate", **{"baseline": "b.json", "candidate": "c.json", empty: ""})
    assert code == 2
    assert summary == f"### ERROR: the input {empty} is empty; expected an artifact or an evaluation\n"
    assert runner.outputs["gate"]["decision"] == "ERROR"


@pytest.mark.slow
def test_no_input_becomes_a_command_and_every_error_is_in_the_summary(job: Runner) -> None:
    hostile = "$(touch forged); `touch forged` \"; touch forged; ' --quiet"
    for inputs, message in (
        ({"candidate": hostile}, "does not exist; expected an artifact folder"),
        ({"candidate": "worse.json", "alpha": "x; touch forged"}, "--alpha x; touch forged; expected a number"),
        ({"candidate": "worse.json", "device": "tpu"}, "--device tpu; expected one of cpu, cuda"),
    ):
        code, summary, log = job.step(
            "Gate", **{"baseline": "baseline.json", "max_drop": "0.3", "junit": "with space.xml", **inputs}
        )
        assert code == 2, log
        assert summary.startswith("### ERROR: no verdict\n\n")
        assert message in summary
        assert job.outputs["gate"]["decision"] == "ERROR"
        found = ElementTree.parse(job.checkout / "with space.xml").find(".//error")
        assert found is not None
        assert message in found.get("message", "")
    assert not (job.checkout / "forged").exists()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"extras": "openvino] x; touch forged"}, "expected names such as openvino,hf"),
        ({"python": "/bin/false"}, "is not Python 3.11 or later; run actions/setup-python before"),
    ],
)
def test_an_installation_that_cannot_be_says_so(inputs: dict[str, str], message: str, tmp_path: Path) -> None:
    code, summary, log = Runner(tmp_path).step("Install", **{"python": sys.executable, **inputs})
    assert code == 2
    assert message in log
    assert summary.startswith("### ERROR: convnext-deploy was not installed")


def test_a_request_that_cannot_be_carried_out_is_in_the_files_of_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files: dict[str, Any] = {name: tmp_path / name for name in ("s.md", "j.xml", "o")}
    arguments = ["gate", "--baseline", "no|ne.json", "--candidate", "no|ne.json", "--max-drop", "1"]
    written = ["--markdown", str(files["s.md"]), f"--junit={files['j.xml']}", "--outputs", str(files["o"])]
    assert cli.run([*arguments, *written]) == 2
    line = capsys.readouterr().err
    assert "does not exist" in line
    assert files["s.md"].read_text().startswith("### ERROR: no verdict\n\n--baseline no&#124;ne.json does not exist")
    assert files["o"].read_text() == "decision=ERROR\ndrop=\nimages-needed=\n"
    suite = ElementTree.parse(files["j.xml"]).find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("errors")) == ("1", "1")
