"""Documents of different lengths packed into sequences of one capacity."""

from __future__ import annotations

import bisect

import numpy as np


def pack_best_fit(lengths: np.ndarray, *, capacity: int, order: np.ndarray) -> list[np.ndarray]:
    """The documents of each sequence, by best fit: the longest first, each where the least room is left.

    ``order`` decides among documents of equal length, so that epochs mix them differently. The number of
    sequences, and the lengths in them, depend on the lengths alone: every epoch has the same number. All
    documents of one length are placed together, one value of remaining room at a time, so a million
    documents take seconds, and about 40 bytes of memory each.

    Args:
        lengths: int ``(N,)``, each from 1 to ``capacity`` tokens.
        capacity: tokens of a sequence.
        order: int ``(N,)``, a permutation of the documents.

    Returns:
        For each sequence the indices of its documents, the longest first.
    """
    assert len(lengths) == 0 or 1 <= lengths.min() <= lengths.max() <= capacity, (
        f"lengths from {lengths.min()} to {lengths.max()}, capacity {capacity}"
    )
    if len(lengths) == 0:
        return []
    small = np.int32 if len(lengths) < 2**31 and capacity < 2**31 else np.int64
    documents = order[np.argsort(-lengths[order].astype(small), kind="stable")]
    counts = np.bincount(lengths)
    bins, placed, done = _Bins(capacity), np.empty(len(lengths), small), 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        end = done + int(counts[length])
        placed[done:end], done = bins.place(length, end - done), end
    by_bin = np.argsort(placed, kind="stable")
    bounds = np.cumsum(np.bincount(placed, minlength=bins.num_bins))[:-1]
    del placed
    return np.split(documents[by_bin], bounds)


def permutation(draws: np.random.Philox, size: int) -> np.ndarray:
    """A permutation by sorting raw draws: numpy keeps the bit stream between versions, but not ``shuffle``."""
    return np.argsort(np.asarray(draws.random_raw(size), np.uint64), kind="stable")


class _Bins:
    """Open sequences, by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._by_room: dict[int, list[int]] = {}
        self._rooms: list[int] = []  # the rooms that any sequence has left, ascending
        self.num_bins = 0

    def place(self, length: int, count: int) -> np.ndarray:
        """The sequence of each of ``count`` documents of one length.

        Best fit puts the first of them where the least sufficient room is left; that leaves even less room
        there, so the following ones go to the same sequence while they fit.
        """
        chosen: list[np.ndarray] = []
        while count:
            at = bisect.bisect_left(self._rooms, length)
            if at == len(self._rooms):
                self._open(-(-count // (self._capacity // length)))
                at = len(self._rooms) - 1
            room = self._rooms[at]
            num_per_bin = room // length
            bins = self._by_room[room]
            taken, rest = bins[: -(-count // num_per_bin)], bins[-(-count // num_per_bin) :]
            self._set(room, rest)
            last = min(num_per_bin, count - num_per_bin * (len(taken) - 1))
            chosen.append(np.repeat(taken, [num_per_bin] * (len(taken) - 1) + [last]))
            self._add(room - num_per_bin * length, taken[:-1])
            self._add(room - last * length, taken[-1:])
            count -= num_per_bin * (len(taken) - 1) + last
        return np.concatenate(chosen)

    def _open(self, num_new: int) -> None:
        self._add(self._capacity, list(range(self.num_bins, self.num_bins + num_new)))
        self.num_bins += num_new

    def _add(self, room: int, bins: list[int]) -> None:
        if not bins or room == 0:
            return
        if room in self._by_room:
            self._by_room[room].extend(bins)
        else:
            self._by_room[room] = list(bins)
            bisect.insort(self._rooms, room)

    def _set(self, room: int, bins: list[int]) -> None:
        if bins:
            self._by_room[room] = bins
        else:
            del self._by_room[room]
            self._rooms.remove(room)
