"""Asynchronous saving: the trained state is copied to host memory at once and written by a background thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dist_lora.lora.state import Piece
from dist_lora.world.world import World

Write = Callable[[World, Mapping[Piece, Tensor]], Path]


class Saver:
    """One rank's part in saving: at most one save is in flight, and no failure goes unnoticed.

    All ranks make one and call ``start`` for the same saves. A failure may be visible on one rank first: the caller
    checks ``has_failed`` and has all ranks call ``wait``, which raises on each.
    """

    def __init__(self, world: World) -> None:
        self._world = world.channel(world.fresh_key("saver"))
        self._thread: threading.Thread | None = None
        self._buffer: Tensor | None = None  # fp32, all pieces of the share one after another
        self._error: BaseException | None = None
        self._stall_s = self._write_s = 0.0
        self.last: Path | None = None  # the newest published checkpoint
        self.longest_s = 0.0  # from the start of a save to its end

    @property
    def has_failed(self) -> bool:
        """Whether the last save ended with an error that hasn't been raised yet."""
        return self._error is not None

    def start(self, share: Mapping[Piece, Tensor], write: Write) -> None:
        """Copy a share and have it written, once the previous save has ended.

        Args:
            share: this rank's, 1-D fp32 tensors on any device; they may change after this returns.
            write: called in the background thread with that thread's ``World`` and the copies, on the CPU; returns the
                checkpoint.

        Raises:
            SaveError, RankError: see ``wait``.
        """
        self.wait()
        started_s = time.monotonic()
        copies = self._copy(share)
        self._stall_s += time.monotonic() - started_s
        self._thread = threading.Thread(target=self._write, args=(write, copies), name="saver", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save in flight, if there is one.

        Raises:
            SaveError: this rank couldn't write; nothing is published.
            RankError: another rank couldn't, or has failed otherwise.
        """
        started_s = time.monotonic()
        if self._thread is not None:
            with self._world.progress.waiting():
                self._thread.join()
            self._thread = None
        self._stall_s += time.monotonic() - started_s
        error, self._error = self._error, None
        if error is not None:
            raise error

    def take_times(self) -> dict[str, float]:
        """Seconds since the last call that training waited for saves, and that the last finished save took to write."""
        taken = {"save_stall_s": self._stall_s, "save_write_s": self._write_s}
        self._stall_s = self._write_s = 0.0
        return taken

    def _copy(self, share: Mapping[Piece, Tensor]) -> dict[Piece, Tensor]:
        """The share in host memory, which is allocated once and reused by every save; pinned when training on a GPU."""
        num_elements = sum(piece.num_elements for piece in share)
        if self._buffer is None or len(self._buffer) != num_elements:
            is_pinned = self._world.device.type == "cuda"
            self._buffer = torch.empty(num_elements, dtype=torch.float32, pin_memory=is_pinned)
        copies, end = {}, 0
        for piece, values in share.items():
            start, end = end, end + piece.num_elements
            copies[piece] = self._buffer[start:end]
            copies[piece].copy_(values, non_blocking=True)
        if self._world.device.type == "cuda":
            torch.cuda.current_stream(self._world.device).synchronize()
        return copies

    def _write(self, write: Write, copies: Mapping[Piece, Tensor]) -> None:
        started_s = time.monotonic()
        try:
            self.last = write(self._world, copies)
        except BaseException as error:  # raised in the training thread by wait()
            self._error = error
        self._write_s = time.monotonic() - started_s
        self.longest_s = max(self.longest_s, self._write_s)
