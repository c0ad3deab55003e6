"""Quantize an ONNX file with NNCF or ModelOpt: run by an interpreter that has them, which this project's need not.

    python foreign.py nncf|nncf-transformer|nncf-accuracy|modelopt SOURCE.onnx IMAGES.npz OUT BATCH

Every setting that is not named here is the tool's own default. IMAGES.npz contains `images` float32 (N, C, H, W) and,
for accuracy control, `labels` int64 (N,). OUT is an OpenVINO .xml for NNCF, which takes batches of BATCH images or
(-1) of any size, and an .onnx for ModelOpt.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

MAX_DROP = 0.002  # of top-1, absolute, for accuracy control


def nncf_model(mode: str, source: str, images: Any, labels: Any) -> Any:
    import nncf
    import openvino as ov

    model = ov.Core().read_model(source)
    model.reshape([1, *images.shape[1:]])  # what it is calibrated with; see `foreign` in bench_quantize.py
    batches = nncf.Dataset([image[None] for image in images])
    if mode == "nncf":
        return nncf.quantize(model, batches, subset_size=len(images))
    if mode == "nncf-transformer":
        return nncf.quantize(model, batches, subset_size=len(images), model_type=nncf.ModelType.TRANSFORMER)

    def top1(compiled: Any, items: Any) -> tuple[float, list[float]]:
        hits = [float(compiled(image)[0].argmax() == label) for image, label in items]
        return float(np.mean(hits)), hits

    labelled = nncf.Dataset(
        [(image[None], label) for image, label in zip(images, labels, strict=True)], lambda item: item[0]
    )
    validation = nncf.Dataset([(image[None], label) for image, label in zip(images, labels, strict=True)])
    return nncf.quantize_with_accuracy_control(
        model, labelled, validation, top1, max_drop=MAX_DROP, subset_size=len(images)
    )


def main() -> None:
    mode, source, images_file, out, batch = sys.argv[1:]
    with np.load(images_file) as file:
        images, labels = file["images"], file["labels"]
    if mode == "modelopt":
        from modelopt.onnx.quantization import quantize

        quantize(
            source,
            quantize_mode="int8",
            calibration_data={"images": images},
            calibration_shapes="images:" + "x".join(map(str, (8, *images.shape[1:]))),
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",  # its default, fp16, is for GPUs
            output_path=out,
        )
        return
    import openvino as ov

    model = nncf_model(mode, source, images, labels)
    model.reshape([int(batch), *images.shape[1:]])
    ov.save_model(model, Path(out), compress_to_fp16=False)


if __name__ == "__main__":
    main()
