"""Groups of options: declared once, and shown by each function that takes them as if it declared them itself."""

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import pytest

import convnext_deploy
from convnext_deploy import api
from convnext_deploy.api.artifacts import ExportOptions, OpeningOptions, SessionOptions
from convnext_deploy.api.images import JudgedOptions, LabelOptions
from convnext_deploy.api.serving import ServerOptions
from convnext_deploy.api.verbs import defaults_of, part, texts, verb
from convnext_deploy.arguments import Unpack
from convnext_deploy.artifact.session import RunOptions
from convnext_deploy.errors import UsageError
from convnext_deploy.models.source import CheckpointOptions, Source, SourceOptions
from convnext_deploy.serving.options import ServeOptions
from convnext_deploy.workflows.evaluate import Images

VERBS = [getattr(api, name) for name in api.__all__]


class Colours(TypedDict, total=False):
    colour: Annotated[str | None, "of the thing; None: as it is."]
    dry: Annotated[bool, "paint nothing."]


class Tools(Colours, total=False):
    tool: Annotated[Literal["brush", "roll"], "what paints."]


@verb
def paint(thing: str, *, coats: int = 1, **options: Unpack[Tools]) -> Mapping[str, Any]:
    """Paint a thing.

    Args:
        thing: what is painted.
        coats: how often.

    Raises:
        UsageError: it cannot be.
    """
    return {"thing": thing, "coats": coats, **options}


def test_a_group_of_options_is_shown_as_the_functions_own_parameters() -> None:
    assert str(inspect.signature(paint)) == (
        "(thing: str, *, coats: int = 1, colour: str | None = None, dry: bool = False, "
        "tool: Literal['brush', 'roll'] = 'brush') -> collections.abc.Mapping[str, typing.Any]"
    )
    assert paint.__doc__ == (
        "Paint a thing.\n\nArgs:\n    thing: what is painted.\n    coats: how often.\n"
        "    colour: of the thing; None: as it is.\n    dry: paint nothing.\n    tool: what paints.\n\n"
        "Raises:\n    UsageError: it cannot be."
    )


def test_options_that_are_left_out_are_the_functions_own_to_fill_in() -> None:
    assert paint("door", tool="roll") == {"thing": "door", "coats": 1, "tool": "roll"}
    assert part({"colour": "red", "tool": "roll"}, Colours) == {"colour": "red"}


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: paint("door", color="red"), "paint has no parameter color; did you mean colour?"),  # type: ignore[call-arg]
        (
            lambda: paint("door", speed=3),  # type: ignore[call-arg]
            "paint has no parameter speed; expected one of thing, coats, colour, dry, tool",
        ),
        (
            lambda: convnext_deploy.export("a.pth", image_siz=64),  # type: ignore[call-arg]
            "export has no parameter image_siz; did you mean image_size?",
        ),
        (
            lambda: convnext_deploy.load("a", cudagraph=True),  # type: ignore[call-arg]
            "load has no parameter cudagraph; did you mean cuda_graph?",
        ),
        (
            lambda: convnext_deploy.refit("a", "b", out="c", sya=print),  # type: ignore[call-arg]
            "refit has no parameter sya; did you mean say?",
        ),
    ],
)
def test_an_unknown_parameter_is_refused_with_the_nearest(call: Callable[[], object], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda: convnext_deploy.evaluate("build/a"),  # type: ignore[call-arg]
            "evaluate: missing a required argument: 'data'; call it as evaluate(path, data, ...)",
        ),
        (
            lambda: convnext_deploy.quantize("a.pth", target="onnx"),  # type: ignore[call-arg]
            "quantize: missing a required argument: 'out'; call it as quantize(weights, out=..., calibration=..., "
            "target=..., ...)",
        ),
        (
            lambda: convnext_deploy.load("build/a", "cuda"),  # type: ignore[call-arg]
            "load: too many positional arguments; call it as load(path, ...)",
        ),
    ],
)
def test_a_call_that_lacks_an_argument_is_refused_with_the_form_of_a_right_one(
    call: Callable[[], object], line: str
) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert str(caught.value) == line


@pytest.mark.parametrize("function", VERBS)
def test_every_parameter_of_a_public_function_has_its_line_in_the_docstring(function: Any) -> None:
    documented = inspect.cleandoc(function.__doc__)
    for name in inspect.signature(function).parameters:
        assert f"\n    {name}: " in documented, name


@pytest.mark.parametrize("function", VERBS)
def test_no_public_function_takes_more_than_24_parameters_of_its_own(function: Any) -> None:
    """Groups are counted as one: what several functions take is declared once."""
    own = inspect.signature(inspect.unwrap(function), follow_wrapped=False).parameters
    assert len(own) <= 24


@pytest.mark.parametrize(
    ("group", "record"),
    [
        (SourceOptions, Source),
        (JudgedOptions, Images),
        (SessionOptions, RunOptions),
    ],
)
def test_an_option_that_is_left_out_is_what_the_record_says(group: type, record: Any) -> None:
    kept = {field.name: field.default for field in fields(record)}
    for name, default in defaults_of(group).items():
        if name != "trust":
            assert kept[name] == default, name


def test_a_server_has_an_option_for_each_of_its_settings() -> None:
    others = {"labels", "gate", "bench", "shadow", "shadow_share", "shadow_limit", "trust"}
    assert set(ServerOptions.__annotations__) - others == {field.name for field in fields(ServeOptions)}


@pytest.mark.parametrize("group", [CheckpointOptions, ExportOptions, LabelOptions, OpeningOptions, ServerOptions])
def test_every_option_has_a_text(group: type) -> None:
    assert all(text.endswith(".") for text in texts(group).values())


def test_the_page_of_python_lists_every_parameter_and_warns_of_none(caplog: pytest.LogCaptureFixture) -> None:
    griffe = pytest.importorskip("griffe")
    root = Path(convnext_deploy.__file__).parents[1]
    extensions = griffe.load_extensions(str(root / "scripts" / "griffe_options.py"))
    with caplog.at_level(logging.INFO):
        package = griffe.load("convnext_deploy", search_paths=[root], docstring_parser="google", extensions=extensions)
        for function in VERBS:
            shown = package[f"api.{function.__name__}"].final_target
            parameters = list(inspect.signature(function).parameters)
            assert [parameter.name for parameter in shown.parameters] == parameters
            sections = {section.kind.value: section.value for section in shown.docstring.parsed}
            assert {row.name for row in sections["parameters"]} == set(parameters)
    assert [line for line in caplog.messages if "/api/" in line] == []
