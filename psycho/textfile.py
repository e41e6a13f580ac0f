"""The bytes of text files as people have them, made into lines: packed (.gz), with a byte order mark, in UTF-16.

Excel's "Unicode Text" is UTF-16 with tabs; its mark says so, and it is read as UTF-8 from here on. Lines are decoded
one by one: UTF-8, and Windows' cp1252 where a line is not (counted, so that the run can say so). A line of 16 MiB or
more loses its middle, for no speech is that long and one such line must not cost the run its memory.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from psycho import storage
from psycho.errors import BadInput

CP1252 = "cp1252_lines"
MAX_LINE = 1 << 24
CUT = "a line of 16 MiB or more"
PACKED = ".gz"
_UTF16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_BINARY = (b"\x1f\x8b", b"PK\x03\x04", b"PAR1")


class Line(NamedTuple):
    """A decoded line with its end; `cut` where its middle was left out."""

    text: str
    cut: bool = False


def plain_path(uri: str) -> str:
    """A path or URI without the query that a remote one may end with (`?region=...`)."""
    return uri.partition("?")[0] if storage.is_remote(uri) else uri


@contextmanager
def open_utf8(uri: str) -> Iterator[BinaryIO]:
    """A local or remote file as bytes of UTF-8 without a byte order mark, unpacked where its name ends in .gz.

    Raises:
        BadInput: it cannot be unpacked, is cut short, or is not text.
    """
    with _open(uri) as raw:
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if plain_path(uri).lower().endswith(PACKED) else raw
        try:
            yield _text(io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20), uri)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise BadInput(f"{uri} is not a whole gzip file; pack it again") from None


def _open(uri: str) -> BinaryIO:
    if not storage.is_remote(uri):
        return Path(uri).open("rb")
    fs, path = storage.resolve(uri)
    return cast(BinaryIO, fs.open_input_stream(path))


def _text(stream: io.BufferedReader, name: str) -> BinaryIO:
    start = stream.peek(1 << 16)[: 1 << 16]
    for mark, encoding in _UTF16.items():
        if start.startswith(mark) and not start.startswith(codecs.BOM_UTF32_LE):
            stream.read(len(mark))
            return io.BufferedReader(_Utf8(stream, encoding), 1 << 20)
    if b"\0" in start or start.startswith(_BINARY):
        raise BadInput(f"{name} is not text in UTF-8 (binary, or UTF-16 without its mark?); save it as UTF-8")
    if start.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
    return stream


class _Utf8(io.RawIOBase):
    """Bytes of another encoding as UTF-8, a piece at a time."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream, self._waiting = stream, b""
        self._decoder = codecs.getincrementaldecoder(encoding)("replace")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._waiting:
            piece = self._stream.read(1 << 16)
            self._waiting = self._decoder.decode(piece, final=not piece).encode()
            if not piece:
                break
        taken, self._waiting = self._waiting[: len(buffer)], self._waiting[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)


def lines(file: BinaryIO, notes: Counter[str]) -> Iterator[Line]:
    """Decoded lines with their ends; `notes` counts those in cp1252."""
    while line := file.readline(MAX_LINE):
        cut = len(line) == MAX_LINE and not line.endswith(b"\n")
        if cut:
            line += _rest(file)
        try:
            text = line.decode()
        except UnicodeDecodeError:
            text = line.decode("cp1252", errors="replace")
            notes[CP1252] += not cut
        yield Line(text, cut)


def _rest(file: BinaryIO) -> bytes:
    """The end of a line too long; a quote stands for an odd number of them left out, so that CSV goes on."""
    quotes, end = 0, b""
    while piece := file.readline(MAX_LINE):
        quotes += end.count(b'"')
        end = piece
        if piece.endswith(b"\n"):
            break
    return (b'"' if quotes % 2 else b"") + end
