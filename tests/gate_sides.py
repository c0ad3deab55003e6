"""What the accuracy gate compares, from made-up logits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from convnext_deploy.accuracy.gate import Side
from convnext_deploy.accuracy.predictions import Predictions
from convnext_deploy.records.accuracy import ClassAccuracy, EvalResult

CLASSES = 12


def side(
    logits: NDArray[np.float64], labels: NDArray[np.int64], names: tuple[str, ...] | None = None, **fields: Any
) -> Side:
    """What `evaluate` would have made of these logits, (N, classes)."""
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    top = np.argsort(-logits, axis=1, kind="stable")[:, :5].astype(np.int32)
    right = top[:, 0] == labels
    predictions = Predictions(
        names=names or tuple(f"{index}.png" for index in range(len(labels))),
        labels=labels,
        top_classes=top,
        top_log_probs=np.take_along_axis(log_probs, top, axis=1).astype(np.float32),
        label_log_prob=log_probs[np.arange(len(labels)), labels].astype(np.float32),
    )
    result = EvalResult(
        artifact="model",
        artifact_sha256="a" * 64,
        data="images",
        data_sha256="d" * 64,
        images=len(labels),
        corrupt=(),
        top1=float(right.mean()),
        top5=1.0,
        per_class=tuple(
            ClassAccuracy(label=n, name=f"class {n}", images=int(of.sum()), top1=float(right[of].mean()))
            for n in range(logits.shape[1])
            if (of := labels == n).any()
        ),
        images_per_s=1.0,
        predictions="out.parquet",
    )
    return Side(result=result, predictions=predictions, **fields)


def answering(answers: NDArray[np.int64], labels: NDArray[np.int64], margin: float = 3.0, **fields: Any) -> Side:
    """A model that gives these classes, each by that many nats."""
    return side(margin * np.eye(CLASSES)[answers] + np.linspace(0, 0.01, CLASSES), labels, **fields)


def flipped(images: int, lost: int, gained: int) -> tuple[Side, Side]:
    """Baseline and candidate, both right but for the lost and the gained images."""
    labels = np.arange(images) % CLASSES
    before, after = labels.copy(), labels.copy()
    after[:lost] = (labels[:lost] + 1) % CLASSES
    before[lost : lost + gained] = (labels[lost : lost + gained] + 1) % CLASSES
    return answering(before, labels), answering(after, labels)
