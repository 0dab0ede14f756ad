"""glibc's malloc, told what to do with large blocks; other allocators stay as they are."""

from __future__ import annotations

import ctypes


def give_back_freed_blocks() -> None:
    """From here on, a block of a mebibyte or more is mapped by itself and goes back to the system when it is freed.

    glibc otherwise learns to keep blocks of up to 32 MiB, between which memory is lost: a third of what a conversion holds.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        m_mmap_threshold, m_mmap_max = -3, -4
        mallopt(m_mmap_threshold, 1 << 20)
        mallopt(m_mmap_max, 1 << 20)
