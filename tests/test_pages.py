"""The pages that people read: their commands run, their links lead somewhere, and what is generated is current.

A command stands in a `console` block behind `$`, with its output below it. In that output numbers may differ, and
`...` on a line of its own stands for any lines. A comment above a block says what is not usual about it:

    <!-- not run: REASON -->    its commands are parsed only
    <!-- file: PATH -->         it is the content of a file that later commands read
    <!-- served: HOW -->        its first command is a server, which is asked by the others and then ended
"""

import io
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import typer

from convnext_deploy import errors
from convnext_deploy.cli import app as cli
from convnext_deploy.data import sources

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TAUGHT = [ROOT / "README.md", DOCS / "index.md", *sorted(DOCS.glob("guides/*.md")), *sorted(DOCS.glob("concepts/*.md"))]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")),
         *sorted(DOCS.rglob("*.md"))]  # fmt: skip
RUN = [ROOT / "README.md", *sorted(DOCS.glob("guides/*.md")), DOCS / "reference" / "python.md"]
CHECKPOINT, IMAGES = "examples/fashion-mnist/model.safetensors", "examples/fashion-mnist/test-2000.parquet"
BLOCK = re.compile(r"(?:^<!-- (?P<word>not run|file|served): (?P<value>.*?) -->\n)?"
                   r"^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)  # fmt: skip
WORDS = 16.0  # of a sentence, on average, in what teaches


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    kind: str  # "console", "python" ...
    text: str
    file: str | None  # where its content belongs
    is_run: bool
    is_served: bool

    def commands(self) -> list[tuple[str, list[str]]]:
        """Each command with the lines of output below it."""
        found: list[tuple[str, list[str]]] = []
        for line in re.sub(r" \\\n +", " ", self.text).splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif found:
                found[-1][1].append(line)
        return found


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(BLOCK.findall(text)), f"{page}: an open block"
    return [
        Block(
            page=str(page.relative_to(ROOT)),
            kind=found["kind"],
            text=found["text"],
            file=found["value"] if found["word"] == "file" else None,
            is_run=found["word"] not in ("not run", "served"),
            is_served=found["word"] == "served",
        )
        for found in BLOCK.finditer(text)
    ]


def command_lines(page: Path) -> list[str]:
    """Every `convnext-deploy` command in a block of the page, whatever the block is."""
    text = "\n".join(block.text for block in blocks_of(page) if block.kind in ("", "console"))
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?convnext-deploy ", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_on_a_page_is_one_that_the_program_takes(page: Path) -> None:
    group = typer.main.get_command(cli.app)
    for line in command_lines(page):
        name, *arguments = shlex.split(line.partition(">")[0], comments=True)[1:]
        group.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]  # refuses what it does not know


def test_what_the_program_does_not_take_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ convnext-deploy eval build/x --dta photos\n```\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "ROOT", tmp_path)
        with pytest.raises(cli.CommandLineError, match="dta"):
            test_every_command_on_a_page_is_one_that_the_program_takes(page)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the guides suppose: the examples of a checkout, and photos in class folders."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "build").mkdir()
    source = sources.open_source(str(ROOT / IMAGES))
    assert source.labels is not None
    assert source.class_names is not None
    for index in range(60):
        name = source.class_names[source.labels[index]]
        if "/" not in name:  # T-shirt/top, which no folder can be called
            folder = tmp_path / "photos" / name
            folder.mkdir(parents=True, exist_ok=True)
            source.read(index).save(folder / f"{len(list(folder.iterdir()))}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pattern(lines: list[str]) -> str:
    """What matches an output like these lines."""

    def line_pattern(line: str) -> str:
        if line == "...":
            return r"(?:.*\n)*?"
        text = re.escape(line).replace(r"\.\.\.", ".*")
        return re.sub(r"\d(?:[\d,]|\\\.\d|e\\?[-+]\d)*", r"[\\d.,e+-]+", text) + r"\n"

    return "".join(map(line_pattern, lines))


@pytest.mark.parametrize(
    ("shown", "output", "same"),
    [
        (["top-1 93.10%, 2,000 images"], "top-1 9.2%, 60 images\n", True),
        (["error 9.4e-07, cosine 1.0000000"], "error 2e-06, cosine 0.9999999\n", True),
        (["first", "...", "last 3"], "first\nsecond\nthird\nlast 41\n", True),
        (["first", "..."], "first\n", True),
        (["top-1 93.10%"], "top-5 93.10%\nmore\n", False),
        (["verified"], "refused\n", False),
    ],
)
def test_an_output_is_that_of_a_page_where_only_numbers_differ(shown: list[str], output: str, same: bool) -> None:
    assert bool(re.fullmatch(pattern(shown), output)) == same


def run(command: str) -> str:
    """The command's output, in this process: its words are what is tested, and imports take seconds."""
    assert command.startswith("convnext-deploy "), f"{command}: expected a block that is not run"
    stdout = io.StringIO()
    with redirect_stdout(stdout):
        code = cli.run(shlex.split(command, comments=True)[1:])
    assert code == 0, f"exit code {code}: {command}"
    return stdout.getvalue()


def serve_and_ask(block: Block) -> None:
    """Start what a block starts, on a port that is free, ask it as the block does, and end it."""
    (command, shown), *questions = block.commands()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "convnext_deploy", *shlex.split(command)[1:], "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("serving "):
                break
        assert re.fullmatch(pattern(shown), "".join(lines)), f"{block.page}: {command}\n{''.join(lines)}"
        for question, answer in questions:
            words = shlex.split(question.replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
            output = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, timeout=60).stdout
            # One line, which the page breaks so that it can be read.
            assert re.fullmatch(pattern(["".join(answer)]), f"{output.strip()}\n"), (
                f"{block.page}: {question}\n{output}"
            )
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.usefixtures("workspace")
def test_every_command_of_the_readme_and_the_guides_prints_what_its_page_shows(
    need_format: Callable[[str], None],
) -> None:
    for name in ("onnx", "openvino", "native"):
        need_format(name)
    outputs: dict[str, str] = {}  # a command that several pages show is run once
    for page in RUN:
        namespace: dict[str, object] = {}
        for block in blocks_of(page):
            if block.file is not None:
                Path(block.file).write_text(block.text)
            if block.is_served:
                serve_and_ask(block)
            if not block.is_run:
                continue
            if block.kind == "python":
                exec(compile(block.text, block.page, "exec"), namespace)
            for command, shown in block.commands() if block.kind == "console" else []:
                if command not in outputs:
                    # The pages show a CPU with VNNI.
                    outputs[command] = run(command).replace(", weights of 7 bits", "")
                if shown:
                    expected = pattern(shown)
                    assert re.fullmatch(expected, outputs[command]), f"{block.page}: {command}\n{outputs[command]}"


def test_the_guide_to_a_server_takes_five_commands_from_a_checkpoint_to_an_answer() -> None:
    blocks = blocks_of(DOCS / "guides" / "serve.md")[:2]
    assert [block.is_run or block.is_served for block in blocks] == [True, True]
    commands = [command.split() for block in blocks for command, _ in block.commands()]
    assert [words[0] if words[0] == "curl" else words[1] for words in commands] == [
        "quantize", "export", "eval", "serve", "curl",
    ]  # fmt: skip


def test_what_is_not_run_says_why() -> None:
    for page in RUN:
        for found in BLOCK.finditer(page.read_text("utf-8")):
            assert found["word"] not in ("not run", "served") or len(found["value"].split()) >= 3


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and the site make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.replace("`", ""))
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_on_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page if not name else (page.parent / name).resolve()
        assert target.exists(), f"{page}: {link}"
        if anchor and target != DOCS / "reference" / "python.md":  # most of its headings come from docstrings
            assert anchor in anchors(target), f"{page}: {link}; expected one of {sorted(anchors(target))}"


def test_every_test_that_a_page_names_is_there() -> None:
    named = {found for page in PAGES for found in re.findall(r"`(tests/[\w/]+\.py)::(\w+)", page.read_text("utf-8"))}
    assert len(named) > 80  # of docs/design/faults.md
    missing = [f"{file}::{test}" for file, test in named if f"\ndef {test}(" not in _text(ROOT / file)]
    assert missing == []


def _text(file: Path) -> str:
    return file.read_text("utf-8") if file.is_file() else ""


def test_the_sites_menu_has_every_page_once() -> None:
    menu = msgspec.toml.decode((ROOT / "zensical.toml").read_text())["project"]["nav"]

    def pages(entries: list[dict[str, object]]) -> Iterator[str]:
        for entry in entries:
            for value in entry.values():
                if isinstance(value, list):
                    yield from pages(value)
                else:
                    yield str(value)

    assert sorted(pages(menu)) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_the_readme_names_every_extra_but_that_of_developers() -> None:
    project = msgspec.toml.decode((ROOT / "pyproject.toml").read_text())["project"]
    rows = re.findall(r"^\| (`[^|]*`) \|", (ROOT / "README.md").read_text().partition("| extra |")[2], re.MULTILINE)
    names = re.findall(r"`([^`]*)`", " ".join(rows))
    assert sorted(names) == sorted(set(project["optional-dependencies"]) - {"dev"})


def test_the_page_of_python_names_every_error_with_its_exit_code() -> None:
    page = (DOCS / "reference" / "python.md").read_text()
    for name, error in vars(errors).items():
        if isinstance(error, type) and issubclass(error, errors.ConvNextDeployError):
            assert re.search(rf"`{name}` \|.*\| {error.exit_code} \|", page), name


@pytest.mark.parametrize("script", ["make_reference.py", "make_pictures.py"])
def test_what_scripts_write_into_the_pages_is_current(script: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / script), "--check"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_sentences_of_the_pages_that_teach_are_short() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "sentence_lengths.py"), "--limit", str(WORDS), *map(str, TAUGHT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
