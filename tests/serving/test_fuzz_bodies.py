"""Damaged bodies of requests: the service's own errors come out, and nothing else.

CONVNEXT_DEPLOY_FUZZ=20000 takes so many mutations of each.
"""

import contextlib
import gzip
import json
import zlib
from collections.abc import Callable

import fuzz
import msgspec
import pytest
from artifact_files import PROBE

pytest.importorskip("python_multipart")
from convnext_deploy.errors import InputError
from convnext_deploy.serving import multipart, protocol, requests

TYPE = "multipart/form-data; boundary=XyZ"
FORM = (
    b'--XyZ\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    b'\x89PNG\r\n--Xy\r\n--XyZ\r\nContent-Disposition: form-data; name="k"\r\n\r\n5\r\n--XyZ--\r\n'
)
SMALL = msgspec.structs.replace(PROBE, export=msgspec.structs.replace(PROBE.export, dynamic_image_size=True))


def test_a_damaged_form_is_refused_in_a_line() -> None:
    def read(body: bytes) -> object:
        return multipart.files(body, TYPE)

    assert fuzz.tracebacks(fuzz.damaged([FORM], fuzz.THINNED), read) == {}


def test_a_damaged_content_type_is_refused_in_a_line() -> None:
    def read(header: bytes) -> object:
        return multipart.files(FORM, header.decode("latin-1"))

    assert (
        fuzz.tracebacks(fuzz.damaged([TYPE.encode(), b'multipart/form-data; boundary="X; Z"'], fuzz.THINNED), read)
        == {}
    )


def document(**fields: object) -> bytes:
    images = {"name": "images", "shape": [1, 3, 32, 32], "datatype": "FP32"}
    return json.dumps({"id": "a", "inputs": [images | fields], "outputs": [{"name": "logits"}]}).encode()


def test_a_damaged_request_of_the_open_inference_protocol_is_refused_in_a_line() -> None:
    bodies = [
        document(data=[0.5] * 3072),
        document(data=[[[[0.5] * 32] * 32] * 3]),
        document(parameters={"binary_data_size": 12288}),
    ]

    def read(body: bytes) -> object:
        return protocol.parsed(body, None, SMALL)

    assert fuzz.tracebacks(fuzz.records(bodies, fuzz.THINNED), read) == {}


def test_a_number_beyond_float64_is_refused_in_a_line() -> None:
    with pytest.raises(InputError, match="input images has data that are not numbers in equal rows"):
        protocol.parsed(document(data=[10**400] + [0] * 3071), None, SMALL)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "a\nb"}, r"inputs 'a\\nb'; expected one, "),
        ({"parameters": {"binary_data_size": "a\nb"}}, r"binary_data_size 'a\\nb' and 0 bytes"),
        ({"shape": [10**400, 1, 1]}, "has shape .{1,100}; expected 4 sizes"),
    ],
)
def test_what_a_request_says_is_shown_in_one_short_line(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        protocol.parsed(document(**fields), None, SMALL)
    assert "\n" not in str(caught.value)


def test_damaged_bytes_behind_a_request_are_refused_in_a_line() -> None:
    head = document(parameters={"binary_data_size": 12288})
    whole = head + bytes(12288)

    def read(body: bytes) -> object:
        return protocol.parsed(body, str(len(head)), SMALL)

    assert read(whole)
    assert fuzz.tracebacks(fuzz.damaged([whole], fuzz.THINNED), read) == {}
    for header in ("-1", "x", "9" * 30, "", "1e3"):
        with pytest.raises(InputError, match="expected at most the"):
            protocol.parsed(whole, header, SMALL)


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_damaged_compressed_body_is_refused_in_a_line(encoding: str, pack: Callable[[bytes], bytes]) -> None:
    packed = [pack(FORM), pack(bytes(5000))]

    def read(body: bytes) -> object:
        with contextlib.suppress(requests.Refusal):  # larger than 10,000 bytes
            return requests.decompressed(body, encoding, 10_000)
        return None

    assert fuzz.tracebacks(fuzz.damaged(packed, fuzz.THINNED), read) == {}


def test_a_damaged_message_of_grpc_is_refused_in_a_line() -> None:
    service_pb2 = pytest.importorskip("tritonclient.grpc").service_pb2
    decode_error = pytest.importorskip("google.protobuf.message").DecodeError
    from convnext_deploy.serving import rpc

    whole = service_pb2.ModelInferRequest(model_name="m", id="a")
    whole.inputs.add(name="images", datatype="FP32", shape=[1, 3, 32, 32])
    listed = service_pb2.ModelInferRequest()
    listed.CopyFrom(whole)
    listed.inputs[0].contents.fp32_contents.extend([0.5] * 3072)
    whole.raw_input_contents.append(bytes(12288))

    def read(content: bytes) -> object:
        try:
            message = service_pb2.ModelInferRequest.FromString(content)
        except decode_error:  # which gRPC answers itself
            return None
        asked, rest = rpc._asked(message)
        protocol.outputs(asked, SMALL)
        return protocol.images_of(asked, memoryview(rest), SMALL)

    contents = [whole.SerializeToString(), listed.SerializeToString()]
    assert all(read(content) is not None for content in contents)
    assert fuzz.tracebacks(fuzz.damaged(contents, fuzz.THINNED), read) == {}
