"""Plans in 8 bits for several formats from one calibration: what is shared is done once, and nothing twice."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from .. import formats
from ..artifact.manifest import encode, write_file
from ..data import sources
from ..errors import UsageError, plain
from ..models import passes
from ..models.checkpoint import Loaded
from ..models.costs import share_of
from ..quantization import distance, saturation
from ..quantization import plan as plans
from ..quantization.counting import Runner
from ..quantization.draft import prepare
from ..quantization.plan import LoadedPlan
from ..records.base import InputKind, Precision, content_of

PROBE = 4  # images that folding is checked on
LINEARS = ("expand", "project")  # of all blocks: nearly all of the arithmetic
SENSITIVITY_IMAGES = 32

T = TypeVar("T")
Progress = Callable[[str], Callable[[int, int], None]]


def folded(loaded: Loaded, held_out: sources.ImageSource, input: InputKind) -> distance.Pixels:
    """Fold the loaded model in place; what corrections are judged on."""
    model, facts = loaded.model, loaded.preprocessing
    pixels = distance.pixels_of(held_out, facts, model)
    uint8 = facts if input == "uint8" else None
    passes.fold(model, uint8, lambda m: distance.outputs(m, pixels[:PROBE], facts))
    return pixels


@dataclass(kw_only=True)
class Drafts:
    """What drafts for one checkpoint share. `loaded` is folded; plans and statistics are kept in `folder`."""

    folder: Path
    loaded: Loaded
    calibration: sources.ImageSource
    held_out: distance.Pixels
    input: InputKind
    saturates: bool  # the machine that the plans are for, see `saturation`
    runner: Runner | None = None  # of the images of a calibration; None: this process
    say: Callable[[str], None]
    progress: Progress
    _whole: dict[str, LoadedPlan] = field(default_factory=dict)

    def whole(self, format: str, rest: Precision) -> LoadedPlan:
        """A plan for that format with every operation in 8 bits that it can run so.

        Formats that multiply the same types get the same scales and corrections: they differ in which operator has a
        product, and each artifact is compared with its own simulation when it is built.
        """
        how = formats.eight_bits_of(format)
        bits = saturation.bits_for(how.int8, self.saturates)
        key = f"{how.int8}-{bits}" + (f"-{rest}" if how.scales_in_rest else "")
        if key not in self._whole:
            self._whole[key] = self._kept(key) or self._drafted(key, format, rest)
        draft = self._whole[key]
        plan = msgspec.structs.replace(draft.plan, target=format, rest=rest)
        fused = formats.get(format).kernels
        named = [name for name in plan.operations if not fused or plans.kind_of(name) in LINEARS]
        return plans.restricted(replace(draft, plan=plan, eight_bits=how), named)

    def _kept(self, key: str) -> LoadedPlan | None:
        path = self.folder / f"plan-{key}.json"
        return plans.read(path) if path.is_file() else None

    def _drafted(self, key: str, format: str, rest: Precision) -> LoadedPlan:
        how, model = formats.eight_bits_of(format), self.loaded.model
        drafted = prepare(
            model,
            self.calibration,
            self.held_out,
            list(plans.products(model)),
            preprocessing=self.loaded.preprocessing,
            target=format,
            eight_bits=how,
            type=how.int8,
            method="mse",
            input=self.input,
            rest=rest,
            weights_sha256=self.loaded.weights.tensors_sha256,
            weight_bits=saturation.bits_for(how.int8, self.saturates),
            images=len(self.calibration),
            rounding=False,
            folder=self.folder,
            runner=self.runner,
            say=self.say,
            progress=self.progress,
        )
        plan = plans.write(self.folder / f"plan-{key}.json", drafted.plan, drafted.tensors)
        return replace(drafted, plan=plan)

    def linears(self, whole: LoadedPlan) -> LoadedPlan:
        """The same plan, for the linears of the blocks only."""
        return plans.restricted(whole, [name for name in whole.plan.operations if plans.kind_of(name) in LINEARS])

    def smaller(self, whole: LoadedPlan, share: float) -> LoadedPlan:
        """The same plan without the operations that do the most damage for their arithmetic.

        Args:
            share: of the damage of all operations, as each does it alone, that those which are left may do.
        """
        known = self._sensitivities(whole)
        spec = self.loaded.model.spec
        names = sorted(plans.quantized(whole.plan), key=lambda name: known[name] / max(share_of(spec, [name]), 1e-9))
        return plans.restricted(whole, _within(names, [known[name] for name in names], share))

    def _sensitivities(self, whole: LoadedPlan) -> dict[str, float]:
        """The sensitivity of every operation of a plan; kept after each."""
        path = self.folder / "sensitivities.json"
        known = read_kept(path, dict[str, float])
        steps = distance.sensitivities(
            self.loaded.model,
            whole,
            self.held_out[:SENSITIVITY_IMAGES],
            self.loaded.preprocessing,
            known,
            self.progress("damage of each operation"),
        )
        for name, value in steps:
            known[name] = value
            write_file(path, encode(known))
        return known


def _within(names: Sequence[str], damage: Sequence[float], share: float) -> Collection[str]:
    sums = np.cumsum(damage)
    return names[: int(np.searchsorted(sums, share * sums[-1] * (1 + 1e-9), side="right"))]


def read_kept(path: Path, kind: type[T]) -> T:
    """What an earlier call of `optimize` has kept, or nothing where it has not.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        return msgspec.json.decode(content_of(path), type=kind)
    except FileNotFoundError:
        return kind()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {plain(error)}; remove it, and it is made again") from None
