"""How large a JPEG XL image is, from its first bytes (ISO/IEC 18181-1, SizeHeader; 18181-2, the boxes around it)."""

from fractions import Fraction

CODESTREAM = b"\xff\x0a"
CONTAINER = b"\x00\x00\x00\x0cJXL "
_WIDTHS = (9, 13, 18, 30)  # bits of a side less one, by a selector of two bits
_RATIOS = tuple(map(Fraction, ("1", "6/5", "4/3", "3/2", "16/9", "5/4", "2")))  # of width to height


def sides(content: bytes) -> tuple[int, int] | None:
    """(width, height) in pixels; None for bytes that are no JPEG XL, or end too early."""
    start = _codestream(content)
    if start is None or content[start : start + 2] != CODESTREAM:
        return None
    bits, place = int.from_bytes(content[start + 2 : start + 12], "little"), 0  # the lowest bit of a byte is first

    def read(count: int) -> int:
        nonlocal place
        place += count
        return bits >> (place - count) & ((1 << count) - 1)

    def side() -> int:
        return (read(5) + 1) * 8 if is_small else read(_WIDTHS[read(2)]) + 1

    is_small = read(1)
    height = side()
    ratio = read(3)
    width = side() if not ratio else int(height * _RATIOS[ratio - 1])
    return None if len(content) * 8 < start * 8 + 16 + place else (width, height)


def _codestream(content: bytes) -> int | None:
    """Where the image itself begins."""
    if not content.startswith(CONTAINER):
        return 0
    place = 0
    while place + 8 <= len(content):
        size, kind, head = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8], 8
        if size == 1:
            size, head = int.from_bytes(content[place + 8 : place + 16], "big"), 16
        if kind == b"jxlc":
            return place + head
        if kind == b"jxlp":  # a part of it, behind the part's number
            return place + head + 4
        if size < head:  # 0: to the end of the file
            return None
        place += size
    return None
