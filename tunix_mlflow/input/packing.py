"""Which examples share a row: best fit, longest first (Johnson 1973)."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into rows of at most `capacity` tokens, each into the fullest that holds it.

    Args:
        lengths: tokens of each item, 1 to `capacity`.
        capacity: tokens in a row.

    Returns:
        Rows of item numbers, a function of the arguments alone.

    Raises:
        ValueError: if an item does not fit into a row.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the sorted keys of by_room
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        if not 1 <= length <= capacity:
            raise ValueError(f"item {item} has {length} tokens; a row holds 1 to {capacity}")
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room]
                del rooms[place]
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        left = room - length
        if left:
            if left not in by_room:
                by_room[left] = []
                bisect.insort(rooms, left)
            by_room[left].append(row)
    return rows
