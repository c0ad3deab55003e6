"""The files of a `multipart/form-data` body, in memory: none is written, whatever name a client gives it."""

from python_multipart.multipart import parse_options_header

from ..errors import InputError

MOST = 64  # parts of a body


def files(body: bytes, content_type: str) -> list[tuple[str, bytes]]:
    """File name, or else field name, and content of each file; fields that are no files are not read.

    Raises:
        InputError: no multipart body, or one without files, or of more than `MOST` parts.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary or len(boundary) > 200:
        raise InputError("multipart/form-data without a boundary")
    parts = _parts(body, b"--" + boundary)
    if len(parts) > MOST:
        raise InputError(f"the form has more than {MOST} parts")
    read = [file for head, content in parts if (file := _file(head, content)) is not None]
    if not read:
        raise InputError("the form has no file; send one as in `curl -F image=@photo.jpg`")
    return read


def _parts(body: bytes, delimiter: bytes) -> list[tuple[bytes, bytes]]:
    """Head and content of each part, of which at most one more than `MOST` is read.

    Raises:
        InputError: the body is cut off, or has something else between its parts.
    """
    line = b"\r\n" + delimiter
    place = 0 if body.startswith(delimiter) else body.find(line) + 2  # what is before the first one is nobody's
    if place == 1:
        raise InputError(f"the body is not multipart/form-data: {_ENDS}")
    parts: list[tuple[bytes, bytes]] = []
    while len(parts) <= MOST:
        place += len(delimiter)
        if body.startswith(b"--", place):
            return parts
        start = body.find(b"\r\n", place)
        if start < 0:
            raise InputError(f"the body is not multipart/form-data: {_ENDS}")
        if body[place:start].strip(b" \t"):
            raise InputError("the body is not multipart/form-data: something stands behind a boundary")
        begin = start if body.startswith(b"\r\n\r\n", start) else body.find(b"\r\n\r\n", start)
        end = body.find(line, max(begin, start) + 2)
        if begin < 0 or end < 0:
            raise InputError(f"the body is not multipart/form-data: {_ENDS}")
        parts.append((body[start:begin], body[begin + 4 : end]))
        place = end + 2
    return parts


_ENDS = "it ends in the middle"


def _file(head: bytes, content: bytes) -> tuple[str, bytes] | None:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-disposition":
            _, options = parse_options_header(value.strip())
            if b"filename" in options:
                of_file = options[b"filename"] or options.get(b"name", b"")
                return of_file.decode(errors="replace")[:200], content
    return None
