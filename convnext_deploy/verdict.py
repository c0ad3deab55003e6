"""A verdict in words: for a terminal, as Markdown for a pull request, as JUnit XML for a build server."""

from xml.etree import ElementTree

from .types import Check, Flip, Verdict

FLIPS_SHOWN = 10  # in words; the JSON document holds all

_TITLES = {
    "top1_drop": "top-1 drop, points",
    "class_drop": "largest class drop beyond chance, points",
    "agreement": "agreement, %",
    "latency_ratio": "latency, candidate / baseline",
    "size_ratio": "size, candidate / baseline",
}


def text(verdict: Verdict) -> str:
    """The lines of a terminal, the decision first."""
    lines = [headline(verdict)]
    lines += [f"  {doubt}" for doubt in verdict.doubts]
    lines += [
        f"  {check.decision}: {_TITLES[check.name]}: {_measured(check)}; limit {_number(check, check.limit)}"
        for check in verdict.checks
    ]
    lines.append(counts(verdict))
    if verdict.checks[0].decision == "INCONCLUSIVE":
        lines.append(needed(verdict))
    lines += warnings(verdict)
    if verdict.flips:
        said = ", the first:" if len(verdict.flips) > FLIPS_SHOWN else ":"
        lines.append(f"{_images(len(verdict.flips))} changed class{said}")
    for name, label, classes, margins in _flips(verdict):
        lines.append(f"  {name} ({label}): {classes}, margin {margins}")
    return "\n".join(lines)


def markdown(verdict: Verdict) -> str:
    """A section of a GitHub step summary."""
    rows = [(_TITLES[c.name], _measured(c), _number(c, c.limit), f"**{c.decision}**") for c in verdict.checks]
    parts = [
        f"### {_escaped(headline(verdict))}",
        _table(("check", "measured", "limit", "decision"), rows),
        *(f"**{_escaped(doubt)}**" for doubt in verdict.doubts),
        _escaped(counts(verdict)),
    ]
    if verdict.checks[0].decision == "INCONCLUSIVE":
        parts.append(needed(verdict))
    warned = warnings(verdict)
    if warned:
        parts.append("\n".join(f"- {_escaped(line)}" for line in warned))
    if verdict.flips:
        said = f", the first {FLIPS_SHOWN} of them" if len(verdict.flips) > FLIPS_SHOWN else ""
        parts.append(f"<details><summary>{_images(len(verdict.flips))} changed class{said}</summary>")
        parts.append(_table(("image", "label", "classes", "margin, nats"), _flips(verdict)))
        parts.append("</details>")
    return "\n\n".join(parts) + "\n"


def junit(verdict: Verdict) -> bytes:
    """A test suite with a case a check, and one a doubt: FAIL is a failure, INCONCLUSIVE and a doubt are errors."""
    decisions = [check.decision for check in verdict.checks]
    suite = ElementTree.Element(
        "testsuite",
        name="convnext-deploy gate",
        tests=str(len(decisions) + len(verdict.doubts)),
        failures=str(decisions.count("FAIL")),
        errors=str(decisions.count("INCONCLUSIVE") + len(verdict.doubts)),
        skipped="0",
    )
    for check in verdict.checks:
        case = ElementTree.SubElement(suite, "testcase", classname="gate", name=check.name)
        if check.decision != "PASS":
            message = f"{_TITLES[check.name]}: {_measured(check)}; limit {_number(check, check.limit)}"
            kind = "failure" if check.decision == "FAIL" else "error"
            ElementTree.SubElement(case, kind, type=check.decision, message=message)
    for number, doubt in enumerate(verdict.doubts, 1):
        case = ElementTree.SubElement(suite, "testcase", classname="gate", name=f"doubt {number}")
        ElementTree.SubElement(case, "error", type="INCONCLUSIVE", message=_printable(doubt))
    ElementTree.SubElement(suite, "system-out").text = _printable(text(verdict))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def headline(verdict: Verdict) -> str:
    images = f"{_images(verdict.images)} of {verdict.data}"
    return f"{verdict.decision}: {verdict.candidate} against {verdict.baseline} on {images}"


def counts(verdict: Verdict) -> str:
    return (
        f"top-1 {verdict.baseline_top1:.2%} before, {verdict.candidate_top1:.2%} after: {_images(verdict.lost)} lost, "
        f"{verdict.gained} gained (exact McNemar p = {verdict.p_value:.2g})"
    )


def needed(verdict: Verdict) -> str:
    """How many images would decide the drop."""
    if verdict.images_needed is None:
        return "no number of images will decide: the drop seen is too close to the limit"
    return f"about {verdict.images_needed:,} images would decide with 80 % chance, if flips and drop stay what they are"


def warnings(verdict: Verdict) -> list[str]:
    """What moves before accuracy does."""
    lines = [
        f"first class agrees on {verdict.agreement:.2%}; of {_images(verdict.confident)} that the baseline is sure of "
        f"(first class twice as probable as the second), {verdict.confident_flips} changed; KL at least "
        f"{verdict.kl_at_least:.2g} nats"
    ]
    lines += [
        f"class {found.name}: {found.lost} lost, {found.gained} gained of {found.images}, beyond chance "
        f"(p = {found.p_value:.2g} over all classes)"
        for found in verdict.per_class
        if found.beyond_chance
    ]
    return lines


def _number(check: Check, value: float) -> str:
    return f"{value:.3f}" if check.name in ("latency_ratio", "size_ratio") else f"{value * 100:.3f}"


def _measured(check: Check) -> str:
    value = _number(check, check.value)
    if check.lower is None or check.upper is None:
        return value
    return f"{value} ({_number(check, check.lower)} to {_number(check, check.upper)})"


def _images(count: int) -> str:
    return f"{count:,} image" + ("" if count == 1 else "s")


def _flips(verdict: Verdict) -> list[tuple[str, str, str, str]]:
    """Of the first ones: image, its label, the two classes, the two margins."""
    names = {found.label: found.name for found in verdict.per_class}

    def cells(flip: Flip) -> tuple[str, str, str, str]:
        label, before, after = (names.get(n, str(n)) for n in (flip.label, flip.baseline, flip.candidate))
        margins = ("-" if m is None else f"{m:.2f}" for m in (flip.baseline_margin, flip.candidate_margin))
        return flip.name, label, f"{before} -> {after}", " -> ".join(margins)

    return [cells(flip) for flip in verdict.flips[:FLIPS_SHOWN]]


def _table(columns: tuple[str, ...], rows: list[tuple[str, str, str, str]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *(tuple(map(_escaped, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _escaped(words: str) -> str:
    """A name out of the data may hold what Markdown or HTML takes for its own."""
    for sign, instead in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("`", "&#96;")):
        words = words.replace(sign, instead)
    return " ".join(words.split())


def _printable(words: str) -> str:
    """Without the control characters that XML 1.0 cannot hold."""
    return "".join(sign if sign in "\n\t" or sign.isprintable() else "?" for sign in words)
