"""For `docs/reference/python.md`: a public function's groups of options, listed as its own parameters.

griffe reads the sources, where a group stands as `**options: Unpack[Group]`. `api.verbs.verb` has the function as users
see it, with a line for each option; this extension shows that one.
"""

import inspect
from typing import Any

import griffe

from convnext_deploy import api


class Options(griffe.Extension):
    """Replaces `**options` by what it stands for, in the signature and in the docstring."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        group = next((p for p in func.parameters if p.kind is griffe.ParameterKind.var_keyword), None)
        if group is None or func.docstring is None or func.name not in api.__all__ or ".api." not in func.path:
            return
        function = getattr(api, func.name)
        keyword_only: Any = griffe.ParameterKind.keyword_only  # an enumeration of texts, which mypy takes for a text
        func.docstring.value = inspect.getdoc(function) or ""
        del func.parameters[group.name]
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name not in func.parameters:
                func.parameters.add(
                    griffe.Parameter(
                        parameter.name,
                        kind=keyword_only,
                        annotation=inspect.formatannotation(parameter.annotation).replace("typing.", ""),
                        default=repr(parameter.default),
                    )
                )
