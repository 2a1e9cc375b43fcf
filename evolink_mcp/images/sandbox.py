"""Limit the decoder process: it gets no files, no network, no new programs, and bounded memory and CPU time.

`enter_sandbox()` runs inside the decoder process after all imports. It cannot be undone. docs/sandbox.md lists the
effect per platform.
"""

from __future__ import annotations

import platform
import struct
import sys
from contextlib import suppress
from enum import IntFlag
from typing import Any

MEMORY_MAX_BYTES = 300 << 20
# The address space also contains libraries and reserved memory, so it needs a higher limit.
ADDRESS_SPACE_MAX_BYTES = 1 << 30


class Protection(IntFlag):
    """One protection that is active in a decoder process."""

    RESOURCE_LIMITS = 1  #: setrlimit: memory, CPU time, file size, processes, descriptors
    NO_NEW_PRIVILEGES = 2  #: PR_SET_NO_NEW_PRIVS
    SYSCALL_FILTER = 4  #: seccomp: all system calls outside a short list fail
    JOB_OBJECT = 8  #: Windows job: memory, one process, ends with its last handle


def enter_sandbox(
    cpu_max_s: int, memory_max_bytes: int = MEMORY_MAX_BYTES, *, allows_threads: bool = False
) -> Protection:
    """Apply all limits that this platform has, and return those that are active.

    `cpu_max_s` is the CPU time of the whole process in seconds. `allows_threads`: this process may start threads.
    """
    import ctypes  # before the limits, which allow no open file

    if sys.platform == "win32":
        return _join_job(memory_max_bytes)
    active = _limit_resources(cpu_max_s, memory_max_bytes, allows_threads)
    if sys.platform == "linux":
        # The filter is after the limits, because it forbids setrlimit.
        active |= _filter_syscalls(ctypes.CDLL(None, use_errno=True), allows_threads)
        if allows_threads and not active & Protection.SYSCALL_FILTER:
            _forbid_processes()
    return active


def _limit_resources(cpu_max_s: int, memory_max_bytes: int, allows_threads: bool) -> Protection:
    if sys.platform == "win32":
        return Protection(0)
    import resource

    limits = {
        resource.RLIMIT_CORE: 0,
        # A compromised decoder could stop the timer of one image, but not this limit.
        resource.RLIMIT_CPU: cpu_max_s,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 0,  # the two open pipes stay open
        resource.RLIMIT_NPROC: 0,
        # Only Linux counts mapped memory here. macOS knows both limits and enforces neither.
        resource.RLIMIT_DATA: memory_max_bytes,
        resource.RLIMIT_AS: ADDRESS_SPACE_MAX_BYTES,
    }
    if allows_threads and sys.platform == "linux":
        del limits[resource.RLIMIT_NPROC]  # Linux counts threads as processes; the filter of system calls forbids those
    active = Protection.RESOURCE_LIMITS
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):
            if kind not in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
                active = Protection(0)
    return active


def _forbid_processes() -> None:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


# --- Linux: seccomp ---

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2
_ALLOW = 0x7FFF0000
_KILL_PROCESS = 0x80000000
_FAIL_WITH_EPERM = 0x00050000 | 1
_FAIL_WITH_ENOSYS = 0x00050000 | 38
_LOAD_WORD = 0x20
_JUMP_IF_EQUAL = 0x15
_JUMP_IF_BITS = 0x45
_RETURN = 0x06
_OFFSET_NUMBER = 0
_OFFSET_ARCHITECTURE = 4
_OFFSET_FIRST_ARGUMENT = 16
_OFFSET_THIRD_ARGUMENT = 32
_PROT_EXEC = 4
_CLONE_THREAD = 0x10000
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
# Architecture: its audit number, the system calls that computation on open pipes needs, and those that map memory.
# Numbers: Linux, arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
_SYSCALLS: dict[str, tuple[int, dict[str, int], dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "munmap": 11, "brk": 12,
            "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "readv": 19, "writev": 20,
            "sched_yield": 24, "mremap": 25, "madvise": 28, "setitimer": 38, "getpid": 39, "getcwd": 79, "exit": 60,
            "getrusage": 98, "sigaltstack": 131, "gettid": 186, "futex": 202, "restart_syscall": 219,
            "clock_gettime": 228, "clock_getres": 229, "exit_group": 231, "set_robust_list": 273, "getrandom": 318,
            "membarrier": 324, "rseq": 334,
        },
        {"mmap": 9, "mprotect": 10},
    ),
    "aarch64": (
        0xC00000B7,
        {
            "read": 63, "write": 64, "close": 57, "fstat": 80, "ppoll": 73, "lseek": 62, "munmap": 215, "brk": 214,
            "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "readv": 65, "writev": 66,
            "sched_yield": 124, "mremap": 216, "madvise": 233, "setitimer": 103, "getpid": 172, "getcwd": 17, "exit": 93,
            "getrusage": 165, "sigaltstack": 132, "gettid": 178, "futex": 98, "restart_syscall": 128,
            "clock_gettime": 113, "clock_getres": 114, "exit_group": 94, "set_robust_list": 99, "getrandom": 278,
            "membarrier": 283, "rseq": 293,
        },
        {"mmap": 222, "mprotect": 226},
    ),
}  # fmt: skip


def syscall_filter(architecture: int, allowed: list[int], mapping: list[int], clone: int | None = None) -> bytes:
    """Return a seccomp program: `allowed` calls run, `mapping` calls run unless they map executable memory.

    The call `clone` may start a thread and no process. Every other call fails with EPERM. A call of another architecture
    kills the process.
    """

    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    def test_bits(number: int, argument: int, bits: int, if_set: int, if_clear: int) -> list[bytes]:
        """Decide a system call by bits of the argument at this offset."""
        return [
            instruction(_JUMP_IF_EQUAL, number, if_false=4),
            instruction(_LOAD_WORD, argument),
            instruction(_JUMP_IF_BITS, bits, if_false=1),
            instruction(_RETURN, if_set),
            instruction(_RETURN, if_clear),
        ]

    program = [
        instruction(_LOAD_WORD, _OFFSET_ARCHITECTURE),
        instruction(_JUMP_IF_EQUAL, architecture, if_true=1),
        # In another architecture the numbers mean other system calls.
        instruction(_RETURN, _KILL_PROCESS),
        instruction(_LOAD_WORD, _OFFSET_NUMBER),
    ]
    for number in allowed:
        program += [instruction(_JUMP_IF_EQUAL, number, if_false=1), instruction(_RETURN, _ALLOW)]
    for number in mapping:
        program += test_bits(number, _OFFSET_THIRD_ARGUMENT, _PROT_EXEC, _FAIL_WITH_EPERM, _ALLOW)
    if clone is not None:
        program += test_bits(clone, _OFFSET_FIRST_ARGUMENT, _CLONE_THREAD, _ALLOW, _FAIL_WITH_EPERM)
        program += [
            # A filter cannot read the arguments of clone3, which are in memory. The C library uses clone instead.
            instruction(_JUMP_IF_EQUAL, _CLONE3, if_false=1),
            instruction(_RETURN, _FAIL_WITH_ENOSYS),
        ]
    program.append(instruction(_RETURN, _FAIL_WITH_EPERM))
    return b"".join(program)


def _filter_syscalls(libc: Any, allows_threads: bool) -> Protection:
    import ctypes

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    active = Protection(0)
    # Without this, the kernel accepts a filter only from a privileged process.
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        active |= Protection.NO_NEW_PRIVILEGES
    # A 32-bit Python on a 64-bit kernel uses other numbers.
    syscalls = _SYSCALLS.get(platform.machine()) if sys.maxsize > 2**32 else None
    if syscalls is None:
        return active
    architecture, allowed, mapping = syscalls
    clone = _CLONE[platform.machine()] if allows_threads else None
    code = syscall_filter(architecture, list(allowed.values()), list(mapping.values()), clone)
    program = Program(len(code) // 8, code)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0:
        active |= Protection.SYSCALL_FILTER
    return active


# --- Windows: job object ---

_LIMIT_INFORMATION = 9  # JobObjectExtendedLimitInformation
_JOB_ACTIVE_PROCESS = 0x8
_JOB_PROCESS_MEMORY = 0x100
_JOB_DIE_ON_EXCEPTION = 0x400


def _join_job(memory_max_bytes: int) -> Protection:
    """Put this process into a job of its own: one process, limited memory."""
    if sys.platform != "win32":
        return Protection(0)
    import ctypes
    from ctypes import wintypes

    class Basic(ctypes.Structure):
        _fields_ = (
            ("process_time", ctypes.c_int64),
            ("job_time", ctypes.c_int64),
            ("flags", wintypes.DWORD),
            ("working_set_min", ctypes.c_size_t),
            ("working_set_max", ctypes.c_size_t),
            ("active_processes", wintypes.DWORD),
            ("affinity", ctypes.c_size_t),
            ("priority", wintypes.DWORD),
            ("scheduling", wintypes.DWORD),
        )

    class Extended(ctypes.Structure):
        _fields_ = (
            ("basic", Basic),
            ("io_counters", ctypes.c_uint64 * 6),
            ("process_memory", ctypes.c_size_t),
            ("job_memory", ctypes.c_size_t),
            ("peak_process_memory", ctypes.c_size_t),
            ("peak_job_memory", ctypes.c_size_t),
        )

    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel.CreateJobObjectW.restype = wintypes.HANDLE
    kernel.GetCurrentProcess.restype = wintypes.HANDLE
    kernel.SetInformationJobObject.argtypes = (wintypes.HANDLE, ctypes.c_int, ctypes.c_void_p, wintypes.DWORD)
    kernel.AssignProcessToJobObject.argtypes = (wintypes.HANDLE, wintypes.HANDLE)
    limits = Extended()
    # Without _JOB_DIE_ON_EXCEPTION, a crash could open a dialog and keep the process.
    limits.basic.flags = _JOB_ACTIVE_PROCESS | _JOB_PROCESS_MEMORY | _JOB_DIE_ON_EXCEPTION
    limits.basic.active_processes = 1
    limits.process_memory = memory_max_bytes
    with suppress(OSError):
        job = kernel.CreateJobObjectW(None, None)
        is_limited = job and kernel.SetInformationJobObject(
            job, _LIMIT_INFORMATION, ctypes.byref(limits), ctypes.sizeof(limits)
        )
        if is_limited and kernel.AssignProcessToJobObject(job, kernel.GetCurrentProcess()):
            return Protection.JOB_OBJECT
    return Protection(0)
