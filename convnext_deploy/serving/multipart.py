"""The files of a `multipart/form-data` body, in memory: none is written, whatever name it has from a client."""

from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ..errors import InputError, plain

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

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
    parts = _Parts()
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise InputError(f"the body is not multipart/form-data: {plain(error)}") from None
    if not parts.ended:
        raise InputError("the body is not multipart/form-data: it ends in the middle")
    if not parts.found:
        raise InputError("the form has no file; send one as in `curl -F image=@photo.jpg`")
    return parts.found


class _Parts:
    def __init__(self) -> None:
        self.found: list[tuple[str, bytes]] = []
        self.ended = False
        self._count = 0
        self._field, self._value = bytearray(), bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._content = bytearray()

    def callbacks(self) -> "MultipartCallbacks":
        """For a parser. Not kept: files would stay in memory until the garbage collector comes, and all go at once."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_part_data": lambda data, start, end: self._content.extend(data[start:end]),
            "on_part_end": self._end,
            "on_end": self._over,
        }

    def _begin(self) -> None:
        self._count += 1
        if self._count > MOST:
            raise InputError(f"the form has more than {MOST} parts")
        self._headers, self._content = {}, bytearray()

    def _header(self) -> None:
        self._headers[bytes(self._field).lower()] = bytes(self._value)
        self._field, self._value = bytearray(), bytearray()

    def _end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"filename" in options:
            name = options[b"filename"] or options.get(b"name", b"")
            self.found.append((name.decode(errors="replace")[:200], bytes(self._content)))

    def _over(self) -> None:
        self.ended = True
