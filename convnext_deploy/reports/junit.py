"""Decisions as JUnit XML, which build servers read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One test case; what did not pass says why."""

    group: str
    name: str
    outcome: Literal["passed", "failure", "error", "skipped"] = "passed"
    type: str | None = None
    message: str = ""
    output: str | None = None


def document(name: str, cases: Sequence[Case], output: str | None = None) -> bytes:
    """One suite of test cases, and what it wrote."""
    count = {kind: sum(case.outcome == kind for case in cases) for kind in ("failure", "error", "skipped")}
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        name=name,
        tests=str(len(cases)),
        failures=str(count["failure"]),
        errors=str(count["error"]),
        skipped=str(count["skipped"]),
    )
    for case in cases:
        node = ElementTree.SubElement(suite, "testcase", classname=printable(case.group), name=printable(case.name))
        if case.outcome != "passed":
            why = {"message": printable(case.message)}
            ElementTree.SubElement(node, case.outcome, why if case.type is None else {"type": case.type, **why})
        if case.output is not None:
            ElementTree.SubElement(node, "system-out").text = printable(case.output)
    if output is not None:
        ElementTree.SubElement(suite, "system-out").text = printable(output)
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def printable(words: str) -> str:
    """Without the control characters that XML 1.0 cannot hold."""
    return "".join(sign if sign in "\n\t" or sign.isprintable() else "?" for sign in words)
