"""What UEFI firmware boots from: an EFI program, and a FAT file system that holds it in one run of clusters."""

from __future__ import annotations

import struct
from functools import reduce
from operator import xor

SECTOR, CLUSTER = 512, 4096
#: What the program says, when it has found all of its data as it should be, and when not.
WHOLE, BROKEN = "the image is whole", "the image is broken"
_HEADERS, _TEXT, _DATA = 0x400, 0x1000, 0x2000


def program(size: int) -> bytes:
    """A PE32+ image of ``size`` bytes, most of them data: it looks at all of it, says a word, and shuts down."""
    length = size - _HEADERS - 0x200
    words = [(0x9E3779B97F4A7C15 * i) & (2**64 - 1) for i in range(1, 4097)]
    block = struct.pack("<4096Q", *words)
    # Each block begins with its number.
    blocks = [struct.pack("<Q", i) + block[8:] for i in range(length // len(block))]
    data = b"".join(blocks) + bytes(length - length // len(block) * len(block))
    total = reduce(xor, struct.unpack(f"<{length // 8}Q", data))
    # rcx: our handle, rdx: the system table.
    code = bytes.fromhex("4883ec28 4889d3".replace(" ", ""))  # sub rsp,40; mov rbx,rdx
    code += b"\x48\x8d\x35" + struct.pack("<i", _DATA - _TEXT - len(code) - 7)  # lea rsi,[data]
    code += b"\xb9" + struct.pack("<I", length // 8)  # mov ecx,words
    code += b"\x31\xc0"  # xor eax,eax
    code += b"\x48\x33\x06\x48\x83\xc6\x08\xff\xc9\x75\xf5"  # 1: xor rax,[rsi]; add rsi,8; dec ecx; jnz 1b
    code += b"\x48\xba" + struct.pack("<Q", total)  # mov rdx,total
    code += b"\x48\x39\xd0"  # cmp rax,rdx
    texts = [(t + "\r\n\0").encode("utf-16-le") for t in (WHOLE, BROKEN)]
    at = 0x100
    code += b"\x48\x8d\x15" + struct.pack("<i", at - len(code) - 7)  # lea rdx,[whole]
    code += b"\x74\x07"  # je +7
    code += b"\x48\x8d\x15" + struct.pack("<i", at + len(texts[0]) - len(code) - 7)  # lea rdx,[broken]
    code += b"\x48\x8b\x4b\x40\xff\x51\x08"  # mov rcx,[rbx+64] (ConOut); call [rcx+8] (OutputString)
    code += b"\x48\x8b\x43\x58"  # mov rax,[rbx+88] (runtime services)
    code += b"\xb9\x02\0\0\0\x31\xd2\x45\x31\xc0\x45\x31\xc9\xff\x50\x68"  # ResetSystem(shutdown, 0, 0, 0)
    text = (code.ljust(at, b"\xcc") + b"".join(texts)).ljust(0x200, b"\0")
    return _headers(length) + text + data


def _headers(length: int) -> bytes:
    """For a section of code and one of ``length`` bytes of data."""
    image_size = _DATA + (length + 0xFFF & ~0xFFF)
    coff = struct.pack("<HHIIIHH", 0x8664, 2, 0, 0, 0, 240, 0x22E)
    optional = struct.pack("<HBBIIIII", 0x20B, 0, 0, 0x200, length, 0, _TEXT, _TEXT)
    optional += struct.pack("<QII6HIIII", 0, 0x1000, 0x200, 0, 0, 0, 0, 0, 0, 0, image_size, _HEADERS, 0)
    optional += struct.pack("<HHQQQQII", 10, 0, 0, 0, 0, 0, 0, 16) + bytes(
        128
    )  # subsystem 10: an EFI application
    sections = struct.pack("<8sIIII12xI", b".text", 0x200, _TEXT, 0x200, _HEADERS, 0x60000020)
    sections += struct.pack("<8sIIII12xI", b".data", length, _DATA, length, _HEADERS + 0x200, 0xC0000040)
    dos = b"MZ".ljust(60, b"\0") + struct.pack("<I", 64)
    return (dos + b"PE\0\0" + coff + optional + sections).ljust(_HEADERS, b"\0")


def file_system(boot: bytes) -> bytes:
    """FAT16 with ``boot`` as EFI/BOOT/BOOTX64.EFI, of 64 MiB."""
    sectors, fat_sectors, root_entries = 64 << 11, 64, 512
    need = -(-len(boot) // CLUSTER)
    fat = [0xFFF8, 0xFFFF, 0xFFFF, 0xFFFF, *range(5, 5 + need - 1), 0xFFFF]  # the two folders, then the file
    table = struct.pack(f"<{len(fat)}H", *fat).ljust(fat_sectors * SECTOR, b"\0")
    head = struct.pack(
        "<3s8sHBHBHHBHHHIIBBBI11s8s", b"\xeb\x3c\x90", b"vhostpc", SECTOR, CLUSTER // SECTOR, 1, 2, root_entries,
        0, 0xF8, fat_sectors, 63, 16, 0, sectors, 0x80, 0, 0x29, 1, b"NO NAME", b"FAT16",
    )  # fmt: skip

    def entry(name: bytes, folder: bool, cluster: int, size: int = 0) -> bytes:
        return struct.pack("<11sB14xHI", name, 0x10 if folder else 0x20, cluster, size)

    def folder(own: int, parent: int, inside: bytes) -> bytes:
        dots = entry(b".".ljust(11), True, own) + entry(b"..".ljust(11), True, parent)
        return (dots + inside).ljust(CLUSTER, b"\0")

    found = head.ljust(510, b"\0") + b"\x55\xaa" + 2 * table
    found += entry(b"EFI".ljust(11), True, 2).ljust(32 * root_entries, b"\0")
    found += folder(2, 0, entry(b"BOOT".ljust(11), True, 3))
    found += folder(3, 2, entry(b"BOOTX64 EFI", False, 4, len(boot)))
    return (found + boot).ljust(sectors * SECTOR, b"\0")
