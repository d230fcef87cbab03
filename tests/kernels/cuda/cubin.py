"""What a kernel costs, read from its machine code: registers, stack, shared memory.

A cubin is an ELF file. The section `.nv.info` lists facts as (format, attribute, size, symbol, value); static shared
memory is the size of `.nv.shared.<kernel>`, on sm_90 with the 1 KiB that the system keeps in each block. The numbers of
the attributes are those that `cuobjdump -elf` prints by name.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

_SECTION: Final = struct.Struct("<IIQQQQIIQQ")  # name, type, flags, address, offset, size, link, ...
_SYMBOL: Final = struct.Struct("<IBBHQQ")  # name, ...
_WITH_VALUES: Final = 4  # EIFMT_SVAL: the fact is followed by `size` bytes
_FRAME_SIZE: Final = 0x11  # EIATTR_FRAME_SIZE
_REGCOUNT: Final = 0x2F  # EIATTR_REGCOUNT


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one kernel."""

    registers: int  # of a thread
    stack_bytes: int  # of a thread: what did not fit registers lies there
    shared_bytes: int  # static, of a block


def costs(cubin: bytes) -> dict[str, Cost]:
    """The kernels in `cubin`, by name."""
    sections = _sections(cubin)
    facts = list(_facts(sections[".nv.info"], _symbols(cubin, sections)))
    stacks = {symbol: value for attribute, symbol, value in facts if attribute == _FRAME_SIZE}
    return {
        symbol: Cost(value, stacks[symbol], len(sections.get(f".nv.shared.{symbol}", b"")))
        for attribute, symbol, value in facts
        if attribute == _REGCOUNT
    }


def _sections(elf: bytes) -> dict[str, bytes]:
    """Sections by name. Shared memory has a size and no bytes in the file: zeros stand for it."""
    (offset,) = struct.unpack_from("<Q", elf, 40)
    _, count, names_at = struct.unpack_from("<HHH", elf, 58)
    headers = [_SECTION.unpack_from(elf, offset + i * _SECTION.size) for i in range(count)]
    names = headers[names_at][4]
    return {_text(elf, names + header[0]): _content(elf, header) for header in headers}


def _content(elf: bytes, header: tuple[int, ...]) -> bytes:
    kind, offset, size = header[1], header[4], header[5]
    nobits = 8
    return bytes(size) if kind == nobits else elf[offset : offset + size]


def _symbols(elf: bytes, sections: dict[str, bytes]) -> list[str]:
    table, names = sections[".symtab"], sections[".strtab"]
    return [_text(names, _SYMBOL.unpack_from(table, at)[0]) for at in range(0, len(table), _SYMBOL.size)]


def _facts(section: bytes, symbols: list[str]) -> list[tuple[int, str, int]]:
    """(attribute, symbol, value) of every fact about a symbol."""
    facts, at = [], 0
    while at < len(section):
        form, attribute, size = struct.unpack_from("<BBH", section, at)
        at += 4
        if form != _WITH_VALUES:
            continue
        if size == 8:
            symbol, value = struct.unpack_from("<II", section, at)
            facts.append((attribute, symbols[symbol], value))
        at += size
    return facts


def _text(content: bytes, at: int) -> str:
    return content[at : content.index(b"\0", at)].decode()
