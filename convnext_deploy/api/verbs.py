"""What every public function has in common: its groups of options, and errors of one line for what it does not know."""

import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin

from .. import env
from ..errors import UsageError, full_disk, plain
from ..models import given

P = ParamSpec("P")
T = TypeVar("T")


def verb(function: Callable[P, T]) -> Callable[P, T]:
    """A public function, as it is called and as `help` and completion show it.

    A package that is missing and a parameter that does not exist are refused in one line. Where the function takes
    `**options: Unpack[Group]`, each option of the group is a parameter of the signature and of the docstring.
    """
    signature = inspect.signature(function)
    documented = function.__doc__
    group = next((p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    if group is not None:
        own = [parameter for parameter in signature.parameters.values() if parameter is not group]
        (options,) = get_args(group.annotation)
        signature = signature.replace(parameters=[*own, *_parameters(options)])
        documented = documented and _documented(inspect.cleandoc(documented), texts(options))
    known = list(signature.parameters)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                expected = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
                raise UsageError(f"{function.__name__} has no parameter {name[:60]}; {expected}")
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            reason = plain(error).replace("keyword-only ", "")  # newer Pythons say it, and the form of the call does
            raise UsageError(
                f"{function.__name__}: {reason}; call it as {function.__name__}{_shape(signature)}"
            ) from None
        try:
            with env.missing_named(), given.written():
                return function(*args, **kwargs)
        except OSError as error:
            full = full_disk(error)
            if full is None:
                raise
            raise UsageError(full) from error

    called.__signature__ = signature  # type: ignore[attr-defined]
    called.__doc__ = documented
    return called


def _shape(signature: inspect.Signature) -> str:
    """What a call has to have, and that there is more: `(path, data, ...)`, `(weights=..., out=..., ...)`."""
    given = [
        name if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD else f"{name}=..."
        for name, parameter in signature.parameters.items()
        if parameter.default is inspect.Parameter.empty or parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    return f"({', '.join(given)}{', ...' if len(given) < len(signature.parameters) else ''})"


def part(options: Mapping[str, Any], group: type) -> dict[str, Any]:
    """Those options that are of one group, where a function takes several groups."""
    return {name: options[name] for name in group.__annotations__ if name in options}


def texts(group: type) -> dict[str, str]:
    """What the options of a group mean, by their names."""
    return {name: get_args(annotated)[1] for name, annotated in group.__annotations__.items()}


def defaults_of(group: type) -> dict[str, Any]:
    """What the options of a group are where they are left out: None where that is allowed, False, or the first word."""
    kinds = {name: get_args(annotated)[0] for name, annotated in group.__annotations__.items()}
    return {
        name: get_args(kind)[0] if get_origin(kind) is Literal else False if kind is bool else None
        for name, kind in kinds.items()
    }


def _parameters(group: type) -> list[inspect.Parameter]:
    kinds = {name: get_args(annotated)[0] for name, annotated in group.__annotations__.items()}
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kinds[name])
        for name, default in defaults_of(group).items()
    ]


def _documented(docstring: str, options: Mapping[str, str]) -> str:
    """The docstring with the options as the last of its arguments."""
    lines = [
        textwrap.fill(f"{name}: {text}", 112, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)
        for name, text in options.items()
    ]
    before, args, rest = docstring.partition("\nArgs:\n")
    own, *after = re.split(r"\n(?=\S)", rest, maxsplit=1)  # the next section begins at the margin
    return "\n".join([f"{before}{args}{own.rstrip()}", *lines, *(f"\n{section}" for section in after)])
