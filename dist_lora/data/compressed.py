"""Compressed text (.gz, .bz2, .xz, .zst) as a plain file: all streams, complete, and nothing after the last one."""

from __future__ import annotations

import bz2
import lzma
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dist_lora.errors import DataError

_CHUNK_BYTES = 2**20
_MAX_ZSTD_WINDOW_BYTES = 2**31
"""What ``zstd --long=31`` writes; zstandard 0.25 refuses more than 128 MiB otherwise."""

MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
"""How a compressed file begins, and the suffix that it should have."""


def open_plain(path: Path) -> BinaryIO:
    """The file's bytes, uncompressed, to be read from the start; records are read from it in any order.

    Compressed files are unpacked into a file without a name in ``$TMPDIR``, which is gone with the process.

    Raises:
        DataError: the file is cut, followed by something else, or can't be unpacked.
    """
    if path.suffix not in _DECODERS:
        return path.open("rb")
    unpacked: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 (kept open by what reads it)
    chunks = _unpacked(path)
    while chunk := next(chunks, b""):
        try:
            unpacked.write(chunk)
        except OSError as error:
            raise _no_room(path, error) from None
    try:
        unpacked.flush()
    except OSError as error:
        raise _no_room(path, error) from None
    unpacked.seek(0)
    return unpacked


def _no_room(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path} can't be unpacked into {tempfile.gettempdir()}: {error.strerror}. Set TMPDIR to a folder with room"
    )


def _zstd_decoder() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW_BYTES).decompressobj()


# A decoder ends with its stream and keeps what follows: Python's gzip, bz2 and lzma files pass over it (3.11 to 3.14).
_DECODERS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    ".zst": _zstd_decoder,
}
SUFFIXES = tuple(_DECODERS)
_MAY_BE_PADDED = (".gz", ".xz")  # with zeros: gzip(1), and the .xz file format, section 2.2


def _unpacked(path: Path) -> Iterator[bytes]:
    """The content of all streams of a file, in chunks that are not empty."""
    kind = path.suffix
    decoder, num_streams, at = None, 0, 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            at += len(chunk)
            while chunk:
                if decoder is None and num_streams and kind in _MAY_BE_PADDED:
                    chunk = chunk.lstrip(b"\0")
                    if not chunk:
                        break
                if decoder is None:
                    decoder, num_streams, begin = _DECODERS[kind](), num_streams + 1, at - len(chunk)
                try:
                    content = decoder.decompress(chunk)
                except Exception as error:  # zlib, bz2, lzma and zstandard have each their own
                    raise DataError(_damage(path, num_streams, begin, error)) from None
                if content:
                    yield content
                chunk = decoder.unused_data if decoder.eof else b""
                decoder = None if decoder.eof else decoder
    if decoder is not None:
        raise DataError(f"{path} ends within stream {num_streams} of its {kind} data: it is cut. Copy it again")


def _damage(path: Path, num_streams: int, begin: int, error: Exception) -> str:
    if num_streams == 1:
        return f"{path} is not {path.suffix} data, or damaged: {error}"
    return (
        f"{path}: what follows stream {num_streams - 1}, from byte {begin + 1:,}, is not {path.suffix} data, or damaged: "
        f"{error}. Streams may follow one another, and nothing else"
    )
