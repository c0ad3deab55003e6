"""A verdict in words: for a terminal, as Markdown for a pull request, as JUnit XML for a build server."""

from pathlib import Path

from ..errors import counted
from ..records.accuracy import Check, Flip, ScoreResult, ScoreVerdict, Verdict
from ..reports.junit import Case, document
from ..reports.markdown import escaped, table

SUITE = "convnext-deploy gate"
FLIPS_SHOWN = 10  # in words; the JSON document contains all
KL_SHOWN = 1e-3  # nats; what rounding moves is below, and is in the JSON document
Given = tuple[Path, Path]  # baseline and candidate as the user named them

_TITLES = {
    "top1_drop": "top-1 drop, points",
    "map_drop": "mAP drop, points",
    "mask_map_drop": "mAP drop of masks, points",
    "r2_drop": "R2 drop, points",
    "miou_drop": "mIoU drop, points",
    "class_drop": "largest class drop beyond chance, points",
    "agreement": "agreement, %",
    "latency_ratio": "latency, candidate / baseline",
    "size_ratio": "size, candidate / baseline",
}


METRICS = {"multi-label": "mAP", "regression": "R2", "segmentation": "mIoU", "detection": "mAP"}


def score_lines(result: ScoreResult) -> list[str]:
    """An evaluation of a model that has no top-1."""
    parts = [f"{METRICS[result.problem]} {result.score:.2%}"]
    if result.exact is not None:
        parts.append(f"all labels right {result.exact:.2%}")
    if result.average_precision_50 is not None:
        parts.append(f"AP50 {result.average_precision_50:.2%}")
    if result.mask_average_precision is not None:
        parts.append(f"mAP of masks {result.mask_average_precision:.2%}")
    if result.mask_average_precision_50 is not None:
        parts.append(f"AP50 of masks {result.mask_average_precision_50:.2%}")
    if result.pixel_accuracy is not None:
        parts.append(f"pixels right {result.pixel_accuracy:.2%}")
    if result.mean_absolute_error is not None and result.root_mean_square_error is not None:
        parts.append(f"mean absolute error {result.mean_absolute_error:.4g}")
        parts.append(f"root mean square error {result.root_mean_square_error:.4g}")
    lines = [
        f"{'  '.join(parts)}  on {counted(result.images, 'image')} of {result.data}",
        f"{result.images_per_s:.1f} images/s including reading and resizing",
    ]
    if result.corrupt:
        lines.append(f"{counted(len(result.corrupt), 'corrupt image')} left out, the first: {result.corrupt[0]}")
    known = [(one.score, one.name) for one in result.per_output if one.score is not None]
    what = "classes" if result.problem in ("segmentation", "detection") else "outputs"
    lines.append(f"lowest {what}: " + ", ".join(f"{name} {score:.1%}" for score, name in sorted(known)[:3]))
    without = len(result.per_output) - len(known)
    if without:
        words = "has no image and counts" if without == 1 else "have no image and count"
        lines.append(f"{counted(without, 'class' if what == 'classes' else 'output')} {words} in no mean")
    return lines


def text(verdict: Verdict | ScoreVerdict, given: Given | None = None) -> str:
    """The lines of a terminal, the decision first."""
    lines = [headline(verdict, given)]
    lines += [f"  {doubt}" for doubt in (*same(verdict), *verdict.doubts)]
    lines += [
        f"  {check.decision}: {_TITLES[check.name]}: {_measured(check)}; limit {_number(check, check.limit)}"
        for check in verdict.checks
    ]
    lines.append(counts(verdict))
    if verdict.checks[0].decision == "INCONCLUSIVE":
        lines.append(needed(verdict))
    if isinstance(verdict, ScoreVerdict):
        return "\n".join(lines)
    lines += warnings(verdict)
    if verdict.flips:
        said = ", the first:" if len(verdict.flips) > FLIPS_SHOWN else ":"
        lines.append(f"{counted(len(verdict.flips), 'image')} changed class{said}")
    for name, label, classes, margins in _flips(verdict):
        lines.append(f"  {name} ({label}): {classes}, margin {margins}")
    return "\n".join(lines)


def markdown(verdict: Verdict | ScoreVerdict, given: Given | None = None) -> str:
    """A section of a GitHub step summary."""
    rows = [(_TITLES[c.name], _measured(c), _number(c, c.limit), f"**{c.decision}**") for c in verdict.checks]
    parts = [
        f"### {escaped(headline(verdict, given))}",
        table(("check", "measured", "limit", "decision"), rows, code=False).rstrip(),
        *(f"**{escaped(doubt)}**" for doubt in (*same(verdict), *verdict.doubts)),
        escaped(counts(verdict)),
    ]
    if verdict.checks[0].decision == "INCONCLUSIVE":
        parts.append(needed(verdict))
    if isinstance(verdict, ScoreVerdict):
        return "\n\n".join(parts) + "\n"
    warned = warnings(verdict)
    if warned:
        parts.append("\n".join(f"- {escaped(line)}" for line in warned))
    if verdict.flips:
        said = f", the first {FLIPS_SHOWN} of them" if len(verdict.flips) > FLIPS_SHOWN else ""
        parts.append(f"<details><summary>{counted(len(verdict.flips), 'image')} changed class{said}</summary>")
        parts.append(table(("image", "label", "classes", "margin, nats"), _flips(verdict), code=False).rstrip())
        parts.append("</details>")
    return "\n\n".join(parts) + "\n"


def junit(verdict: Verdict | ScoreVerdict, given: Given | None = None) -> bytes:
    """A test suite with a case a check, and one a doubt: FAIL is a failure, INCONCLUSIVE and a doubt are errors."""
    cases = [_case(check) for check in verdict.checks]
    cases += [
        Case(group="gate", name=f"doubt {number}", outcome="error", type="INCONCLUSIVE", message=doubt)
        for number, doubt in enumerate(verdict.doubts, 1)
    ]
    return document(SUITE, cases, text(verdict, given))


def _case(check: Check) -> Case:
    if check.decision == "PASS":
        return Case(group="gate", name=check.name)
    return Case(
        group="gate",
        name=check.name,
        outcome="failure" if check.decision == "FAIL" else "error",
        type=check.decision,
        message=f"{_TITLES[check.name]}: {_measured(check)}; limit {_number(check, check.limit)}",
    )


def outputs(verdict: Verdict | ScoreVerdict) -> str:
    """A line a fact, as a GitHub step hands them on. The drop is in percentage points."""
    drop = verdict.checks[0]
    needed = "" if verdict.images_needed is None else str(verdict.images_needed)
    return f"decision={verdict.decision}\ndrop={_number(drop, drop.value)}\nimages-needed={needed}\n"


def error_markdown(message: str) -> str:
    """Where there is no verdict: the section of a step summary that says why."""
    return f"### ERROR: no verdict\n\n{escaped(message)}\n"


def error_junit(message: str) -> bytes:
    """Likewise a test suite, of one case that is an error."""
    return document(SUITE, [Case(group="gate", name="verdict", outcome="error", type="ERROR", message=message)])


ERROR_OUTPUTS = "decision=ERROR\ndrop=\nimages-needed=\n"


def headline(verdict: Verdict | ScoreVerdict, given: Given | None = None) -> str:
    baseline, candidate = verdict.baseline, verdict.candidate
    if given is not None:
        baseline, candidate = _called(given[0], baseline), _called(given[1], candidate)
    images = f"{counted(verdict.images, 'image')} of {_last_part(verdict.data)}"
    return f"{verdict.decision}: {candidate} against {baseline} on {images}"


def same(verdict: Verdict | ScoreVerdict) -> list[str]:
    """A line where an artifact was held against itself."""
    if verdict.baseline_sha256 != verdict.candidate_sha256:
        return []
    return ["both sides are the same artifact, which loses nothing to itself: is --candidate the one that you meant?"]


def _called(path: Path, artifact: str) -> str:
    """The name that the user gave, and the artifact that was evaluated where that has another."""
    return path.name if path.name in (artifact, "") else f"{path.name} ({artifact})"


def _last_part(data: str) -> str:
    """A file's or folder's own name; the name of a data set, which contains slashes too, is left as it is."""
    return data if data.startswith("hfds:") else Path(data).name or data


def counts(verdict: Verdict | ScoreVerdict) -> str:
    if isinstance(verdict, ScoreVerdict):
        line = (
            f"{METRICS[verdict.problem]} {verdict.baseline_score:.2%} before, {verdict.candidate_score:.2%} after; the "
            f"drop's standard error is {verdict.standard_error * 100:.3f} points, over images that both saw"
        )
        if verdict.baseline_mask_score is not None and verdict.candidate_mask_score is not None:
            before, after = verdict.baseline_mask_score, verdict.candidate_mask_score
            line += f"; mAP of masks {before:.2%} before, {after:.2%} after"
        return line
    return (
        f"top-1 {verdict.baseline_top1:.2%} before, {verdict.candidate_top1:.2%} after: "
        f"{counted(verdict.lost, 'image')} lost "
        f"(only the baseline is right), {verdict.gained} gained (only the candidate is); exact McNemar "
        f"p = {verdict.p_value:.2g}"
    )


def needed(verdict: Verdict | ScoreVerdict) -> str:
    """How many images would decide the drop."""
    if verdict.images_needed is None:
        return "no number of images will decide: the drop seen is too close to the limit"
    return (
        f"about {counted(verdict.images_needed, 'image')} would decide with 80 % chance, if flips and drop "
        "stay what they are"
    )


def warnings(verdict: Verdict) -> list[str]:
    """What moves before accuracy does."""
    lines = [
        f"first class agrees on {verdict.agreement:.2%}; of {counted(verdict.confident, 'image')} that the "
        "baseline is sure of "
        f"(first class twice as probable as the second), {verdict.confident_flips} changed"
    ]
    if verdict.kl_at_least >= KL_SHOWN:
        lines.append(f"the probabilities moved: KL from the baseline's at least {verdict.kl_at_least:.2g} nats")
    lines += [
        f"class {row.name}: {row.lost} lost, {row.gained} gained of {row.images}, beyond chance "
        f"(p = {row.p_value:.2g} over all classes)"
        for row in verdict.per_class
        if row.beyond_chance
    ]
    return lines


def _number(check: Check, value: float) -> str:
    return f"{value:.3f}" if check.name in ("latency_ratio", "size_ratio") else f"{value * 100:.3f}"


def _measured(check: Check) -> str:
    value = _number(check, check.value)
    if check.lower is None or check.upper is None:
        return value
    return f"{value} ({_number(check, check.lower)} to {_number(check, check.upper)})"


def _flips(verdict: Verdict) -> list[tuple[str, str, str, str]]:
    """Of the first ones: image, its label, the two classes, the two margins."""
    names = {row.label: row.name for row in verdict.per_class}

    def cells(flip: Flip) -> tuple[str, str, str, str]:
        label, before, after = (names.get(n, str(n)) for n in (flip.label, flip.baseline, flip.candidate))
        margins = ("-" if m is None else f"{m:.2f}" for m in (flip.baseline_margin, flip.candidate_margin))
        return flip.name, label, f"{before} -> {after}", " -> ".join(margins)

    return [cells(flip) for flip in verdict.flips[:FLIPS_SHOWN]]
