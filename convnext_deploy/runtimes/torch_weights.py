"""A folded module's weights as safetensors: written, read back, and run by PyTorch from this package's own code."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..artifact.batches import Images
from ..artifact.readback import Contents
from ..artifact.session import RunOptions
from ..errors import ArtifactError, InputError, plain
from ..graph.capture import DeployGraph
from ..graph.module_contents import stored
from ..models.convnext import ConvNeXt
from ..records.manifest import Manifest
from ..records.plan import OperationPlan
from .torch_session import TorchSession, opening

FILE = "model.safetensors"


def build(graph: DeployGraph, folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: value.contiguous() for name, value in graph.module.state_dict().items()}
    for name, module in graph.module.named_modules():
        if f"{name}.weight_scale" in tensors:
            tensors[f"{name}.shift"] = torch.tensor(module.shift, dtype=torch.float64)
    save_file(tensors, folder / FILE)
    if graph.export.kernels:
        _prebuild(graph.module, graph.example, graph.say)


def _prebuild(module: nn.Module, images: Tensor, say: Callable[[str], None] = lambda _: None) -> None:
    """Compile all kernels for such images, if they are on a GPU: a first step would, one after another, for minutes."""
    from ..kernels.launch import capability
    from ..kernels.prebuild import prebuild, variants

    if images.is_cuda:
        prebuild(variants(module, images), capability(images), say)


class WeightsSession(TorchSession):
    """With kernels, those for a new shape of images are compiled when it is bound, not in the step that is timed."""

    def __init__(self, module: nn.Module, manifest: Manifest, options: RunOptions) -> None:
        super().__init__(module, manifest, options)
        self._module = module
        self._compiled: set[torch.Size] = set()

    def _bind(self, images: Images) -> None:
        super()._bind(images)
        assert self._images is not None
        if self.manifest.export.kernels and self._images.shape not in self._compiled:
            _prebuild(self._module, self._images)
            self._compiled.add(self._images.shape)


def load(folder: Path, manifest: Manifest, options: RunOptions) -> TorchSession:
    from safetensors.torch import load_file

    with opening(folder / FILE, options):
        tensors = load_file(folder / FILE)
    with torch.device("meta"):
        module = ConvNeXt(manifest.model)
    module.takes_uint8 = manifest.export.input == "uint8"
    module.puts_out_classes = manifest.export.argmax
    module.puts_out_detections = module.detector is not None
    if module.segmenter is not None:
        for _, unit in module.segmenter.units():
            unit.norm = None  # folded into its convolution
    if "stem.input_mean" in tensors:
        module.stem.input_mean = tensors["stem.input_mean"]
    if manifest.export.quantization is not None:
        _refuse_gpu(tensors, options)
        _quantize(module, tensors)
    for name, _ in list(module.named_parameters()):
        if name not in tensors:  # folded into what follows
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, None)
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ArtifactError(f"{folder / FILE} does not fit its manifest: {plain(error)}".replace("\n", " ")) from None
    if manifest.export.kernels:
        from ..kernels.use import use_kernels  # which looks for triton

        use_kernels(module, manifest.export.kernels)
    runnable: nn.Module = module.eval().requires_grad_(False).to(options.device)
    return WeightsSession(runnable, manifest, options)


def read_back(folder: Path) -> Contents:
    """Loaded by name; epsilons and activations are not in the file, but in the manifest's spec of the model."""
    from safetensors.torch import load_file

    tensors = load_file(folder / FILE)
    return Contents(
        tensors=[stored(name, tensor) for name, tensor in tensors.items() if not name.endswith(".shift")],
        named=True,
        scalars=None,
        activations=None,
        shifts={name.removesuffix(".shift"): t.item() for name, t in tensors.items() if name.endswith(".shift")},
        unread="epsilons and activations stand in the manifest",
    )


def _refuse_gpu(tensors: dict[str, Tensor], options: RunOptions) -> None:
    """An artifact may have been made on another GPU than this."""
    from ..kernels.launch import E4M3_SINCE

    if options.device != "cuda" or torch.float8_e4m3fn not in {tensor.dtype for tensor in tensors.values()}:
        return
    here = torch.cuda.get_device_capability()
    if here < E4M3_SINCE:
        raise InputError(
            f"the artifact computes in fp8, and {torch.cuda.get_device_name()} has compute capability "
            f"{here[0]}.{here[1]}; E4M3 needs 8.9. Export with a plan of --type int8"
        )


def _quantize(module: ConvNeXt, tensors: dict[str, Tensor]) -> None:
    """Put a quantized linear in the place of each whose weight is in codes; takes their shifts out of the tensors."""
    from ..quantization.apply import TYPES, QuantizedLinear

    for path in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
        weight, scale, zero_point = (tensors[f"{path}.{name}"] for name in ("weight", "scale", "zero_point"))
        types = (zero_point.dtype, weight.dtype)
        operation = OperationPlan(
            type=next(name for name, codes in TYPES.items() if codes == types),
            scale=scale.item(),
            zero_point=int(zero_point.float()),
            shift=tensors.pop(f"{path}.shift").item(),
        )
        layer = QuantizedLinear(operation, weight.t(), tensors[f"{path}.weight_scale"], tensors[f"{path}.bias"])
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, layer)
