"""Limits the work of decoding an uploaded file, by counting its parts before it is decoded.

A limit of pixels does not limit the work: a JPEG may have thousands of scans, a PNG a million
compressed chunks, a WebP many frames and a canvas of gigabytes. Counting stops at the limits, so it
is always fast. Other and truncated files are left for the decoder to refuse.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Final

from stepweave.errors import InvalidRequestError

MAX_SCANS = 100  # of a JPEG: progressive ones have about 10
MAX_SEGMENTS = 1000  # of a JPEG besides scans: tables, up to 255 parts of a profile, other data
MAX_FILL = 4096  # bytes of a JPEG between its segments, which Pillow reads one by one
MAX_CHUNKS = 20_000  # of a PNG: its data may be in parts of 4 KB or less
MAX_OTHER_CHUNKS = 1000  # of a PNG besides its data; of a WebP
# of a PNG besides its data; Pillow decompresses each to at most 1 MiB
MAX_COMPRESSED_CHUNKS = 64
MAX_EXIF_BYTES = 1 << 18
# of a colour profile: those of printing presses have up to 3 MB. In a PNG, Pillow allows 1 MiB
MAX_PROFILE_BYTES = 1 << 22
CODE: Final = "image_too_complex"

# except restart markers and stuffed bytes, which are within a scan
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_SOF = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SOS, _SOI, _EOI, _APP1, _APP2 = 0xDA, 0xD8, 0xD9, 0xE1, 0xE2
_ALONE = {*range(0x01, 0xC0), _SOI, _EOI}  # markers without a length
_COMPRESSED = (b"zTXt", b"iTXt", b"iCCP")


def check(data: bytes, param: str, max_pixels: int) -> None:
    """Raise InvalidRequestError, with value and limit, if decoding would need more work than an
    image of `max_pixels` should."""
    if data.startswith(b"\xff\xd8\xff"):
        _check_jpeg(data, param)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data, param)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        _check_webp(data, param, max_pixels)


def check_exif(length: int, param: str) -> None:
    """Raise InvalidRequestError if EXIF data of this many bytes exceeds the limit."""
    _bound(length, MAX_EXIF_BYTES, "bytes of EXIF data", param)


def _bound(count: int, limit: int, what: str, param: str) -> None:
    if count > limit:
        raise InvalidRequestError(
            f"{param} has {count} {what}; the limit is {limit}.", code=CODE, param=param
        )


def _check_jpeg(data: bytes, param: str) -> None:
    """Check a JPEG as Pillow and libjpeg read it: segments by their lengths, scans to their next
    marker, until the first end of an image after a scan; before it Pillow ignores such an end, and
    searches for segments byte by byte."""
    scans = segments = headers = exif = profile = fill = 0
    scanning = False
    for marker, start, end, skipped in _segments(data):
        fill += 0 if scanning else skipped
        scanning = marker == _SOS
        _bound(fill, MAX_FILL, "bytes between its segments", param)
        scans += marker == _SOS
        segments += marker not in (_SOS, None)
        headers += marker in _SOF
        if marker == _APP1 and data[start : start + 4] == b"Exif":
            exif += end - start
        if marker == _APP2 and data[start : start + 11] == b"ICC_PROFILE":
            profile += end - start
        if scans > MAX_SCANS:
            # a fast upper limit of their number, for the message
            _bound(max(scans, data.count(b"\xff\xda")), MAX_SCANS, "scans", param)
        _bound(segments, MAX_SEGMENTS, "or more segments", param)
        _bound(headers, 1, "or more frame headers", param)
        check_exif(exif, param)
        _bound(profile, MAX_PROFILE_BYTES, "bytes of colour profile", param)


def _segments(data: bytes) -> Iterator[tuple[int | None, int, int, int]]:
    """Yield each marker of a JPEG, start and end of its content, and the number of bytes skipped
    before it; at the end of the data, the marker None."""
    at = 2
    scanned = False
    while found := _MARKER.search(data, at):
        skipped, marker, at = found.start() - at, found[1][0], found.end()
        if marker == _EOI and scanned:
            return
        scanned = scanned or marker == _SOS
        if marker in _ALONE:
            yield marker, at, at, skipped
            continue
        length = int.from_bytes(data[at : at + 2])
        yield marker, at + 2, at + length, skipped
        at += max(length, 2)
    yield None, len(data), len(data), max(0, len(data) - at)


def _check_png(data: bytes, param: str) -> None:
    chunks = others = compressed = 0
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IEND":
            return
        chunks += 1
        others += kind != b"IDAT"
        compressed += kind in _COMPRESSED
        if kind == b"eXIf":
            check_exif(length, param)
        if kind == b"acTL":
            _check_frames(int.from_bytes(data[at + 8 : at + 12]), param)
        _bound(
            compressed, MAX_COMPRESSED_CHUNKS, "or more compressed text and profile chunks", param
        )
        _bound(others, MAX_OTHER_CHUNKS, "or more chunks beside its data", param)
        _bound(chunks, MAX_CHUNKS, "or more chunks", param)
        at += 12 + length


def _check_webp(data: bytes, param: str, max_pixels: int) -> None:
    chunks = frames = 0
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        size = _webp_size(kind, data[at + 8 : at + 18])
        if size is not None:
            check_pixels(*size, max_pixels, param)
        chunks += 1
        frames += kind == b"ANMF"
        if kind == b"EXIF":
            check_exif(length, param)
        if kind == b"ICCP":
            _bound(length, MAX_PROFILE_BYTES, "bytes of colour profile", param)
        _check_frames(frames, param)
        _bound(chunks, MAX_OTHER_CHUNKS, "or more chunks", param)
        at += 8 + length + length % 2


def _webp_size(kind: bytes, content: bytes) -> tuple[int, int] | None:
    """The size in a chunk, for which libwebp allocates memory before it reads anything else."""
    if kind == b"VP8X" and len(content) == 10:
        width, height = (int.from_bytes(side, "little") for side in (content[4:7], content[7:]))
        return width + 1, height + 1
    if kind == b"VP8L" and len(content) >= 5 and content[0] == 0x2F:
        bits = int.from_bytes(content[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and len(content) == 10 and content[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", content, 6)
        return width & 0x3FFF, height & 0x3FFF
    return None


def check_pixels(width: int, height: int, max_pixels: int, param: str) -> None:
    """Raise InvalidRequestError if an image of that size has more than `max_pixels`."""
    if width * height > max_pixels:
        raise InvalidRequestError(
            f"{param} is {width}x{height}, {width * height} pixels; the limit is {max_pixels}.",
            param=param,
        )


def _check_frames(frames: int, param: str) -> None:
    if frames > 1:
        raise InvalidRequestError(
            f"{param} has several frames ({frames} or more); send a still image, of 1.", param=param
        )
