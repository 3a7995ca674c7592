"""Physical memory: addresses, no copies, zero pages."""

from __future__ import annotations

import mmap
import os

import pytest

from kvmlaunch.sim.memory import PhysicalMemory


def test_map_region_first_starts_at_4g() -> None:
    assert PhysicalMemory().map_region(bytearray(4096)) == 0x1_0000_0000


def test_map_region_after_small_region_is_2m_aligned_and_apart() -> None:
    memory = PhysicalMemory()
    first = memory.map_region(bytearray(4096))
    second = memory.map_region(bytearray(4096))
    assert second == first + 0x20_0000


def test_map_region_after_unmap_does_not_reuse_the_address() -> None:
    memory = PhysicalMemory()
    first = memory.map_region(bytearray(4096))
    memory.unmap_region(first)
    assert memory.map_region(bytearray(4096)) > first


def test_map_region_of_64_gib_costs_nothing_and_reaches_the_last_page() -> None:
    fd = os.memfd_create("memory")
    os.ftruncate(fd, 64 << 30)
    memory = PhysicalMemory()
    base = memory.map_region(mmap.mmap(fd, 64 << 30))
    memory.page(base + (64 << 30) - 4096)[0] = 1
    blocks = os.fstat(fd).st_blocks
    os.close(fd)
    assert blocks * 512 <= 2 << 20


@pytest.mark.parametrize("size", [0, 1, 4095, 4097])
def test_map_region_of_no_whole_pages_raises(size: int) -> None:
    with pytest.raises(ValueError, match="whole pages"):
        PhysicalMemory().map_region(bytearray(size))


def test_map_region_read_only_raises() -> None:
    with pytest.raises(ValueError, match="writable"):
        PhysicalMemory().map_region(mmap.mmap(-1, 4096, access=mmap.ACCESS_READ))


def test_page_when_written_changes_the_buffer() -> None:
    buffer = bytearray(8192)
    memory = PhysicalMemory()
    page = memory.page(memory.map_region(buffer) + 4096)
    page[1] = 7
    assert len(page) == 4096
    assert buffer[4097] == 7


def test_page_of_the_right_region_when_several_are_mapped() -> None:
    memory = PhysicalMemory()
    bases = [memory.map_region(bytearray([n]) * 4096) for n in range(5)]
    memory.unmap_region(bases[2])
    assert [memory.page(base)[0] for n, base in enumerate(bases) if n != 2] == [0, 1, 3, 4]


@pytest.mark.parametrize("spa", [0, 0xFFFFFFFFF000, 0x1_0000_1000, 0x1_0020_0000])
def test_page_without_memory_raises(spa: int) -> None:
    memory = PhysicalMemory()
    memory.map_region(bytearray(4096))
    with pytest.raises(ValueError, match="no memory"):
        memory.page(spa)


def test_page_of_unmapped_region_raises() -> None:
    memory = PhysicalMemory()
    base = memory.map_region(bytearray(4096))
    memory.unmap_region(base)
    with pytest.raises(ValueError, match="no memory"):
        memory.page(base)


def test_page_unaligned_raises() -> None:
    memory = PhysicalMemory()
    base = memory.map_region(bytearray(4096))
    with pytest.raises(ValueError, match="aligned"):
        memory.page(base + 1)


def test_unmap_region_while_a_view_lives_keeps_the_view() -> None:
    memory = PhysicalMemory()
    base = memory.map_region(bytearray(4096))
    page = memory.page(base)
    memory.unmap_region(base)
    page[0] = 1
    assert page[0] == 1


def test_unmap_region_lets_the_mmap_be_closed() -> None:
    memory = PhysicalMemory()
    mapping = mmap.mmap(-1, 4096)
    memory.unmap_region(memory.map_region(mapping))
    mapping.close()
    assert mapping.closed


@pytest.mark.parametrize("offset", [4096, 0x20_0000])
def test_unmap_region_not_at_a_base_raises(offset: int) -> None:
    memory = PhysicalMemory()
    base = memory.map_region(bytearray(8192))
    with pytest.raises(ValueError, match="no region"):
        memory.unmap_region(base + offset)


def test_alloc_gives_zero_pages_that_do_not_overlap() -> None:
    memory = PhysicalMemory()
    spas = [memory.alloc() for _ in range(100)]
    assert len(set(spas)) == 100
    assert all(bytes(memory.page(spa)) == bytes(4096) for spa in spas)


def test_alloc_of_several_pages_is_contiguous() -> None:
    memory = PhysicalMemory()
    spa = memory.alloc(3)
    other = memory.alloc()
    for at in range(3):
        memory.page(spa + 4096 * at)[:] = bytes([at + 1]) * 4096
    assert bytes(memory.page(other)) == bytes(4096)


def test_alloc_after_free_is_zero_again() -> None:
    memory = PhysicalMemory()
    spa = memory.alloc(2)
    memory.page(spa + 4096)[:] = b"x" * 4096
    memory.free(spa, 2)
    again = memory.alloc(2)
    assert again == spa
    assert bytes(memory.page(again + 4096)) == bytes(4096)


def test_alloc_beyond_one_arena_works() -> None:
    memory = PhysicalMemory()
    memory.alloc()
    large = memory.alloc(20_000)
    memory.page(large + 19_999 * 4096)[0] = 1
    memory.alloc(16_384)
    assert bytes(memory.page(memory.alloc())) == bytes(4096)


def test_alloc_of_nothing_raises() -> None:
    with pytest.raises(ValueError, match="can't allocate 0"):
        PhysicalMemory().alloc(0)


@pytest.mark.parametrize(("offset", "npages"), [(0, 2), (4096, 1)])
def test_free_of_something_else_raises(offset: int, npages: int) -> None:
    memory = PhysicalMemory()
    spa = memory.alloc()
    with pytest.raises(ValueError, match="not an allocation"):
        memory.free(spa + offset, npages)


def test_free_twice_raises() -> None:
    memory = PhysicalMemory()
    spa = memory.alloc()
    memory.free(spa)
    with pytest.raises(ValueError, match="not an allocation"):
        memory.free(spa)


def test_repr_names_regions() -> None:
    memory = PhysicalMemory()
    assert repr(memory) == "<PhysicalMemory empty>"
    memory.map_region(bytearray(4096))
    assert repr(memory) == "<PhysicalMemory 0x100000000+0x1000>"
