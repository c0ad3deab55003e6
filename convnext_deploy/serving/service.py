"""What a server serves: its models by name, exchanged without losing a request, and the threads that decode."""

import asyncio
import contextlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
from prometheus_client.core import Metric

from ..artifact import manifest
from ..artifact.manifest import Artifact
from ..errors import CheckFailed, ConvNextDeployError, UsageError, counted, plain
from ..records.accuracy import ScoreVerdict, Verdict, is_scored
from ..records.base import content_of
from ..records.manifest import TensorRecord
from . import drift
from .batching import Job
from .log import Say, unhindered
from .metrics import Metrics
from .model import Model
from .options import ServeOptions
from .shadow import Shadow, ShadowOptions


class Service:
    """Opened models, and what they share.

    Args:
        artifacts: folders by name; the first is the default.
        labels: of a server of one model.
        gate: likewise: what `gate --json` printed, read again at every reload; only what it passed is served.
        shadow: likewise: a candidate whose answers are compared with the model's.
        say: told what happens, a line each.

    Raises:
        UsageError, ArtifactError: an artifact that cannot be opened or does not run as the options say.
        CheckFailed: one that computes wrong outputs here.
    """

    def __init__(
        self,
        artifacts: Mapping[str, Path],
        options: ServeOptions,
        *,
        labels: Path | None = None,
        gate: Path | None = None,
        shadow: ShadowOptions | None = None,
        trust: bool = False,
        say: Say = lambda line: None,
    ) -> None:
        beside = None if shadow is None else shadow.path
        for option, file in (("--labels", labels), ("--gate", gate), ("--shadow", beside)):
            if file is not None and len(artifacts) > 1:
                raise UsageError(f"{option} {file} with {counted(len(artifacts), 'artifact')}; serve them one by one")
        self.options, self.metrics = options, Metrics()
        self.say = unhindered(say)
        self.draining = False
        self.abandoned = 0  # requests that the end of the server cancelled
        self.body_bytes = 0  # of requests under way; the event loop's
        self._paths, self._labels, self._gate, self._trust = dict(artifacts), labels, gate, trust
        self._reloading = threading.Lock()
        self.pool = ThreadPoolExecutor(options.cores, thread_name_prefix="decode")
        self.models: dict[str, Model] = {}
        self._beside, self.shadow = shadow, None
        try:
            for name, path in self._paths.items():
                self.models[name] = self._opened(name, path)
            self.shadow = self._shadowed(self.models[self.default])
        except BaseException:
            self.close()
            raise
        for model in self.models.values():
            self._tell(model)
        self._watch(self.models[self.default], self.shadow)
        self.metrics.collect(self._watched)
        self.metrics.ready.set(1)

    def _shadowed(self, model: Model) -> Shadow | None:
        if self._beside is None:
            return None
        made = Shadow(model, self._beside, trust=self._trust, say=self.say)
        self.say(
            f"{model.name}: {self._beside.path} is asked {self._beside.share:.2%} of the requests as well; more than "
            f"{self._beside.limit:.2%} other answers are too many"
        )
        return made

    def _watch(self, model: Model, shadow: Shadow | None) -> None:
        if shadow is not None:
            model.watch(shadow.look)

    def _watched(self) -> Iterable[Metric]:
        yield from drift.metrics({name: model.drift for name, model in self.models.items() if model.drift is not None})
        if self.shadow is not None:
            yield from self.shadow.metrics()

    def _opened(self, name: str, path: Path) -> Model:
        artifact = manifest.verified(path)
        if self._gate is not None:
            refuse_ungated(artifact, self._gate)
        return Model(
            artifact,
            name,
            self.options,
            self.metrics,
            deliver,
            labels=self._labels,
            trust=self._trust,
            say=self.say,
        )

    def _tell(self, model: Model) -> None:
        self.metrics.model.labels(*_facts(model)).set(1)
        for gauge, read in (
            (self.metrics.waiting, lambda: self.models[model.name].queue.waiting),
            (self.metrics.admitted, lambda: self.models[model.name].queue.admitted),
        ):
            gauge.labels(model.name).set_function(read)

    @property
    def default(self) -> str:
        """The name of the first model."""
        return next(iter(self._paths))

    def reload(self) -> list[str]:
        """Open every artifact folder that has changed anew; requests go on with the old one until the new one is ready.

        Blocks; to be called in a thread.

        Returns:
            A line for each model, which says what its clients meet anew.

        Raises:
            UsageError: another reload is going on, or an artifact cannot be taken; nothing has changed then.
            CheckFailed: an artifact computes wrong outputs; nothing has changed then.
        """
        if not self._reloading.acquire(blocking=False):
            raise UsageError("a reload is going on already; wait for its end")
        fresh: dict[str, Model] = {}
        try:
            lines = []
            for name, path in self._paths.items():
                old = self.models[name]
                artifact = manifest.verified(path)
                if artifact.sha256 == old.sha256:
                    if self._gate is not None:  # the verdict may be another than the one that it was opened by
                        refuse_ungated(artifact, self._gate)
                    lines.append(f"{name}: {path} has not changed")
                    continue
                fresh[name] = self._opened(name, path)
                change = _interface_change(old, fresh[name])
                lines.append(f"{name}: {old.sha256[:12]} -> {fresh[name].sha256[:12]}{change}")
            shadow = self._reshadowed(fresh, lines)
        except ConvNextDeployError:
            for model in fresh.values():
                model.close()
            self.metrics.reloads.labels("refused").inc()
            raise
        else:
            if shadow is not self.shadow:
                before, self.shadow = self.shadow, shadow
                self._watch(fresh.get(self.default, self.models[self.default]), shadow)
                if before is not None:
                    before.close()
            for name, model in fresh.items():
                old, self.models[name] = self.models[name], model
                self.metrics.model.remove(*_facts(old))
                self._tell(model)
                old.close()  # after the exchange: whoever finds it closed finds the new one in its place
            self.metrics.reloads.labels("done").inc()
            return lines
        finally:
            self._reloading.release()

    def _reshadowed(self, fresh: Mapping[str, Model], lines: list[str]) -> Shadow | None:
        """The candidate anew where it or what answers has changed: what is known is of the two that were."""
        if self.shadow is None:
            return None
        baseline = fresh.get(self.default)
        if baseline is None and manifest.verified(self.shadow.options.path).sha256 == self.shadow.sha256:
            return self.shadow
        lines.append(f"{self.default}: the comparison with {self.shadow.options.path} begins anew")
        return self._shadowed(baseline or self.models[self.default])

    def drain(self) -> None:
        """Not ready any more; what comes is still answered, and connections close behind their answers."""
        self.draining = True
        self.metrics.ready.set(0)

    def close(self) -> None:
        """End the threads; requests under way are answered first."""
        if self.shadow is not None:
            self.shadow.close()
        for model in self.models.values():
            model.close()
        for model in self.models.values():
            model.queue.join(self.options.drain_s)
        self.pool.shutdown(wait=False, cancel_futures=True)


def refuse_ungated(artifact: Artifact, file: Path) -> None:
    """Refuse an artifact that a gate has not passed.

    Args:
        file: with the verdict, as `gate --json` prints it.

    Raises:
        UsageError: it contains no verdict.
        CheckFailed: the verdict is another than PASS, or of another artifact.
    """
    try:
        content = content_of(file)
        kind: type[Verdict | ScoreVerdict] = ScoreVerdict if is_scored(content) else Verdict
        verdict = msgspec.json.decode(content, type=kind)
    except OSError as error:
        raise UsageError(f"--gate {file} cannot be read: {plain(error)}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(
            f"--gate {file} contains no verdict: {plain(error)}; expected what `gate --json` prints"
        ) from None
    if verdict.candidate_sha256 != artifact.sha256:
        raise CheckFailed(
            f"--gate {file} is about the candidate {verdict.candidate_sha256[:12]}, and {artifact.path} is "
            f"{artifact.sha256[:12]}; run the gate on it"
        )
    if verdict.decision != "PASS":
        raise CheckFailed(f"--gate {file} says {verdict.decision} of {artifact.path}; only PASS is served")


def _interface_change(old: Model, new: Model) -> str:
    """What clients meet anew, for the end of a line: unaware of it they send wrong images, or read wrong classes."""

    def facts(model: Model) -> dict[str, object]:
        held = model.manifest
        return {
            "input": of_an_image(held.inputs),
            "preprocessing": msgspec.structs.replace(held.preprocessing, assumed=()),
            "outputs": of_an_image(held.outputs),
            "class names": model.labels,
            "problem": model.problem,
        }

    def of_an_image(tensors: Sequence[TensorRecord]) -> list[tuple[object, ...]]:
        return [(tensor.name, tensor.dtype, tensor.shape[1:]) for tensor in tensors]  # batches are the server's affair

    before = facts(old)
    changed = [what for what, fact in facts(new).items() if fact != before[what]]
    return f"; other {', '.join(changed)} than before, which its clients have to know" if changed else ""


def _facts(model: Model) -> tuple[str, str, str, str]:
    """The labels of the metric `model_info`."""
    export = model.manifest.export
    return model.name, export.format, export.eight_bits or export.precision, model.sha256


def deliver(jobs: Sequence[Job]) -> None:
    """Wake whoever waits for these jobs: their owners are futures of an event loop in another thread."""
    loops: dict[asyncio.AbstractEventLoop, list[Job]] = {}
    for job in jobs:
        if job.owner is None:  # it was computed by whoever waits
            continue
        loops.setdefault(job.owner.get_loop(), []).append(job)
    for loop, these in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
            loop.call_soon_threadsafe(_resolve, these)


def _resolve(jobs: Sequence[Job]) -> None:
    for job in jobs:
        if job.owner.done():
            continue
        if job.error is not None:
            job.owner.set_exception(job.error)
        else:
            job.owner.set_result(job.outputs)
