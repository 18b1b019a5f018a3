"""What this machine is and has: free memory, the highest mark of memory, the settings that arithmetic runs under.

Sources: proc(5) (MemAvailable, VmHWM, statm); the kernel's cgroup-v2 (memory.max, memory.current); torch.backends.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

_M_MMAP_THRESHOLD = -3  # malloc.h
_EVERY = 0.002  # seconds between two looks at the process
_TRIM = 0.02  # seconds between two times that freed memory is given back, at least
_SHARE = 20  # and at least so many times as long as giving it back takes


def available_memory() -> int | None:
    """Bytes that this process may still take: what the system calls available, and no more than its cgroup leaves. None
    where the system does not say (it is no Linux)."""
    free = _field("/proc/meminfo", "MemAvailable")
    if free is None:
        return None
    try:
        most = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if most == "max" else min(free, max(0, int(most) - used))


def fits(*modules: nn.Module) -> bool:
    """Is there memory for all parameters of these modules in float64? True where the system does not say."""
    free = available_memory()
    return free is None or 8 * sum(t.numel() for m in modules for t in m.parameters()) <= free


def _field(file: str, name: str) -> int | None:
    """A field in KiB of a file of /proc, in bytes."""
    try:
        for line in Path(file).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _resident() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


@contextlib.contextmanager
def giving_back(wanted: bool) -> Iterator[None]:
    """Inside, where it is wanted, memory of tensors that are let go of is soon the system's again. glibc would keep
    pieces of up to 32 MiB (see surgery.twin), and cannot use one again for an aligned tensor of the same size; and what
    was freed before (a model that was built and filled from a file) it hands out a piece at a time and never gives back
    but from its end. So a thread asks for that (malloc(3), mallopt(3), malloc_trim(3)). Elsewhere than on glibc only
    what is held in circles is let go of."""
    if wanted:
        gc.collect()
    libc = ctypes.CDLL(None) if wanted and sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 18)
    libc.malloc_trim(0)
    done = threading.Event()
    trimmer = threading.Thread(target=_trim, args=(libc.malloc_trim, done), name="freed memory", daemon=True)
    trimmer.start()
    try:
        yield
    finally:
        done.set()
        trimmer.join()
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)


def _trim(trim: Callable[[int], int], done: threading.Event) -> None:
    took = 0.0
    while not done.wait(max(_TRIM, _SHARE * took)):
        started = time.perf_counter()
        trim(0)
        took = time.perf_counter() - started


class Peak:
    """The most memory held while it is entered, beyond what was held before.

    On CUDA: what torch's allocator held at most on that device. On the CPU: the resident set of the process, of which
    the kernel keeps the highest mark; where something before stood higher than all that happened inside, it is looked
    at every 2 ms. `bytes` is None where neither is known; `how` says which it was.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self.how = ""

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before: int | None = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            self._before, self._mark, self._seen = _resident(), _field("/proc/self/status", "VmHWM"), 0
            self._done = threading.Event()
            self._watcher = threading.Thread(target=self._watch, name="peak memory", daemon=True)
            self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(_EVERY):
            self._seen = max(self._seen, _resident() or 0)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            assert self._before is not None
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            self.how = "torch.cuda.max_memory_allocated"
        elif self.device.type == "cpu":
            self._done.set()
            self._watcher.join()
            mark = _field("/proc/self/status", "VmHWM")
            if self._before is None or mark is None or self._mark is None:
                return
            if mark > self._mark:
                top, self.how = mark, "resident set of the process, VmHWM"
            else:
                top, self.how = max(self._seen, _resident() or 0), "resident set of the process, every 2 ms"
            self.bytes = max(0, top - self._before)


def named(device: torch.device) -> str:
    """The device, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {torch.backends.cpu.get_cpu_capability()}"
    except OSError:
        pass
    return torch.backends.cpu.get_cpu_capability()


def settings(device: torch.device) -> dict[str, Any]:
    """What arithmetic on the device depends on beside the program: read, and left as it is."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "device": named(device),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32": False,
    }
    if device.type == "cuda":
        matmul = torch.backends.cuda.matmul
        found["tf32"] = matmul.allow_tf32
        found["tf32_convolution"] = torch.backends.cudnn.allow_tf32
        found["reduced_precision_reduction"] = {
            "float16": matmul.allow_fp16_reduced_precision_reduction,
            "bfloat16": matmul.allow_bf16_reduced_precision_reduction,
        }
        found["cudnn_deterministic"] = torch.backends.cudnn.deterministic
        found["cudnn_benchmark"] = torch.backends.cudnn.benchmark
    elif device.type == "cpu":
        found["threads"] = torch.get_num_threads()
        found["mkldnn"] = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    enabled = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    found["sdpa_enabled"] = [name for name, on in enabled.items() if on]
    return found
