r"""Make `examples/fashion-mnist/test-2000.parquet`: the first test images of Fashion-MNIST as Hugging Face stores them.

    python scripts/make_demo_data.py t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz \
        examples/fashion-mnist/test-2000.parquet

The two inputs are the files that Zalando publishes (Debian packages them as `dataset-fashion-mnist`). With the same
versions of Pillow, zlib and pyarrow the output is the same byte for byte.
"""

import argparse
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def idx(path: Path) -> NDArray[np.uint8]:
    """The array of one gzipped IDX file of unsigned bytes, of whatever rank its header says.

    Raises:
        SystemExit: another type than unsigned byte, or not as many bytes as the header says.
    """
    content = gzip.decompress(path.read_bytes())
    zeros, kind, rank = int.from_bytes(content[:2], "big"), content[2], content[3]
    shape = tuple(int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(rank))
    start = 4 + 4 * rank
    if zeros != 0 or kind != 0x08 or len(content) - start != np.prod(shape):
        raise SystemExit(f"{path} is not an IDX file of unsigned bytes")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def png(pixels: NDArray[np.uint8]) -> bytes:
    """A grey image (H, W) as an optimised PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()


def table(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> pa.Table:
    """Columns `image` {bytes, path} and `label`, with the features that `datasets` reads from the schema.

    Args:
        images: (N, H, W).
        labels: (N,), indices into CLASSES.
    """
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = [{"bytes": png(pixels), "path": f"test/{number:05d}.png"} for number, pixels in enumerate(images)]
    return pa.table({"image": rows, "label": labels.astype(np.int64)}, schema=schema)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", type=Path, help="t10k-images-idx3-ubyte.gz")
    parser.add_argument("labels", type=Path, help="t10k-labels-idx1-ubyte.gz")
    parser.add_argument("out", type=Path, help="the parquet file to write")
    parser.add_argument("--count", type=int, default=2000, help="how many of the first test images to take")
    arguments = parser.parse_args()
    images, labels = idx(arguments.images)[: arguments.count], idx(arguments.labels)[: arguments.count]
    # Row groups of 500 so that a reader with little memory never has more than those.
    pq.write_table(table(images, labels), arguments.out, compression="zstd", compression_level=9, row_group_size=500)
    print(f"{arguments.out}: {len(images)} images, {arguments.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
