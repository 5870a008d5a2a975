"""Where regions lie whose creators leave that to us.

These addresses are free in an ordinary process of Linux, on x86-64 with 47 bits and on arm64
with 48: programs that are not position independent, and the heaps of all, begin below 1 TiB or
at two thirds of the address space, moved by up to 1 TiB (ELF_ET_DYN_BASE,
arch/x86/include/asm/elf.h); libraries, stacks and what mmap(2) chooses are below its end, moved
down by up to 16 TiB (mmap_rnd_bits, arch/x86/mm/mmap.c).  AddressSanitizer's shadow ends below
17 TiB, and its heap is in the 4 TiB from 96 TiB on (compiler-rt/lib/asan/asan_mapping.h,
asan_allocator.h).  Whoever has something there nevertheless is given another range.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

TIB: Final = 1 << 40
AREAS: Final = ((32 * TIB, 80 * TIB), (88 * TIB, 96 * TIB), (100 * TIB, 110 * TIB))
"""Start and end of each, in bytes."""


def lowest_free(
    taken: Iterable[tuple[int, int]], size: int, above: int, alignment: int
) -> int | None:
    """The lowest multiple of `alignment` from `above` on where `size` bytes are free.

    `taken`: start and size of what is not.  None if there is no room.
    """
    spans = sorted(taken)
    for low, high in AREAS:
        start = -(-max(low, above) // alignment) * alignment
        for other, length in spans:
            if other + length <= start:
                continue
            if other >= start + size:
                break
            start = -(-(other + length) // alignment) * alignment
        if start + size <= high:
            return start
    return None
