"""Weights that are mapped from a file -> weights in memory of our own; what is freed -> back to the system.

Transformers maps weights that are read as they are stored. A file that is then written to would change the base that
runs, and one that is cut short would end the process with SIGBUS.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor, nn

_DONT_NEED = 4  # madvise(2) on Linux


@torch.no_grad()
def take_in(model: nn.Module) -> None:
    """Copy what is mapped, tensor by tensor, and give back each one's pages: the whole never lies in memory twice."""
    places = _mapped()
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.device.type == "cpu"}
    for tensor in tensors.values():
        first = tensor.data_ptr()
        if places is None or any(begin <= first < end for begin, end in places):
            old = tensor.data
            tensor.data = old.clone()
            if places is not None:
                _give_back(old)


def give_back_freed() -> None:
    """Give the system the pages that were freed but are kept by the C library, where that is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _mapped() -> list[tuple[int, int]] | None:
    """Return the addresses at which safetensors files are mapped; None where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and ".safetensors" in parts[5]:
            begin, end = parts[0].split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


def _give_back(tensor: Tensor) -> None:
    """Let the kernel drop the pages that lie wholly within a tensor; they are clean, and nobody reads them again."""
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONT_NEED)
