"""The system calls that a sandbox allows, as BPF made by libseccomp (part of every Debian, since apt needs it).

Both filters are lists of what is allowed; all else fails with EPERM. So neither has sockets beyond pairs, ptrace,
/proc-like access to other processes, namespaces, mounts, keys, BPF, io_uring, shared memory segments.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

OWN_PID = 0x5E1F_91D0  # stands in the strict filter for the process that it is put on, which alone may be signalled

# Files below descriptors and paths, memory, time, its own identity, threads, signals to itself.
PLAIN = """
read write readv writev pread64 pwrite64 preadv preadv2 pwritev pwritev2 lseek close close_range dup dup2 dup3 fcntl
flock fsync fdatasync sync_file_range ftruncate truncate fallocate fadvise64 open openat creat stat fstat lstat
newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat getdents getdents64 getcwd chdir fchdir
mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat chmod fchmod fchmodat umask
utime utimes utimensat futimesat sendfile copy_file_range
mmap munmap mremap mprotect madvise brk msync mincore membarrier
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack pause alarm
restart_syscall getitimer setitimer timer_create timer_settime timer_gettime timer_getoverrun timer_delete
timerfd_create timerfd_settime timerfd_gettime nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time
times getrusage sysinfo uname getcpu getpid getppid gettid getuid geteuid getgid getegid getgroups getresuid getresgid
getpgrp getpgid getsid getpriority getrlimit setrlimit sched_yield sched_getaffinity sched_getparam sched_getscheduler
sched_get_priority_max sched_get_priority_min futex futex_waitv set_robust_list set_tid_address rseq arch_prctl
exit exit_group wait4 waitid pipe pipe2 poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait
epoll_pwait epoll_pwait2 eventfd eventfd2 getrandom recvfrom sendto recvmsg sendmsg shutdown getsockname getpeername
getsockopt setsockopt execveat
""".split()

# What the runner needs to take its place, and compilers to call each other.
RUNNER = """
fork vfork execve kill tgkill prctl seccomp prlimit64 setresuid setresgid setgroups setsid setpgid capget capset ioctl
socketpair sched_setaffinity mknod
""".split()


class Test(ctypes.Structure):
    """libseccomp's `scmp_arg_cmp`: argument `index` compared with `a`, or masked by `a` and compared with `b`."""

    _fields_ = [("index", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


EQUAL, MASKED = 4, 7  # SCMP_CMP_EQ, SCMP_CMP_MASKED_EQ
CLONE_THREAD = 0x0001_0000
CLONE_NAMESPACES = 0x7E02_0080
AF_UNIX = 1
TERMINAL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX
NAMES = (15, 16)  # PR_SET_NAME, PR_GET_NAME


class Rule(NamedTuple):
    name: str
    test: tuple[int, int, int, int]


STRICT_RULES = [
    Rule("clone", (0, MASKED, CLONE_THREAD, CLONE_THREAD)),  # threads, no processes
    Rule("kill", (0, EQUAL, OWN_PID, 0)),
    Rule("tgkill", (0, EQUAL, OWN_PID, 0)),
    Rule("prlimit64", (0, EQUAL, 0, 0)),  # itself
    Rule("sched_setaffinity", (0, EQUAL, 0, 0)),
    Rule("socketpair", (0, EQUAL, AF_UNIX, 0)),
    *(Rule("ioctl", (1, EQUAL, request, 0)) for request in TERMINAL),
    *(Rule("prctl", (0, EQUAL, option, 0)) for option in NAMES),
]
RUNNER_RULES = [Rule("clone", (0, MASKED, CLONE_NAMESPACES, 0))]

ALLOW = 0x7FFF_0000
ERRNO = 0x0005_0000
EPERM, ENOSYS = 1, 38
UNKNOWN = -1  # __NR_SCMP_ERROR: a call that this libseccomp has never heard of
OPTIMIZE = 8  # SCMP_FLTATR_CTL_OPTIMIZE
BINARY_TREE = 2


class FilterError(OSError):
    """The system-call filter cannot be made here."""


@cache
def runner_filter() -> bytes:
    """For the runner and compilers: what programs may, and processes."""
    return _export([*PLAIN, *RUNNER], RUNNER_RULES)


@cache
def program_filter() -> bytes:
    """For programs: one process, which signals nobody but itself. OWN_PID is to be replaced, 4 bytes, native order."""
    code = _export(PLAIN, STRICT_RULES)
    assert OWN_PID.to_bytes(4, sys.byteorder) in code
    return code


def _export(names: Sequence[str], rules: list[Rule]) -> bytes:
    library = _library()
    context = library.seccomp_init(ERRNO | EPERM)
    if not context:
        raise FilterError("libseccomp cannot make a filter")
    try:
        library.seccomp_attr_set(context, OPTIMIZE, BINARY_TREE)  # quicker; older ones cannot
        for name, tests in _known(library, names, rules):
            _check(library.seccomp_rule_add_array(context, ALLOW, *name, len(tests), tests), "rule")
        clone3 = library.seccomp_syscall_resolve_name(b"clone3")  # its flags cannot be seen: libc then calls clone
        if clone3 != UNKNOWN:
            _check(library.seccomp_rule_add_array(context, ERRNO | ENOSYS, clone3, 0, None), "clone3")
        descriptor = os.memfd_create("filter", os.MFD_CLOEXEC)
        with open(descriptor, "rb") as file:
            _check(library.seccomp_export_bpf(context, descriptor), "export")
            file.seek(0)
            return file.read()
    finally:
        library.seccomp_release(context)


def _known(library: ctypes.CDLL, names: Sequence[str], rules: list[Rule]) -> Iterator[tuple[list[int], ctypes.Array]]:
    """Numbers and tests; names that this libseccomp does not know stay forbidden."""
    everything = [(name, []) for name in names] + [(rule.name, [Test(*rule.test)]) for rule in rules]
    for name, tests in everything:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number != UNKNOWN:
            yield [number], (Test * len(tests))(*tests)


def _check(code: int, what: str) -> None:
    if code < 0:
        raise FilterError(-code, f"libseccomp: {what}: {os.strerror(-code)}")


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise FilterError(f"libseccomp is missing (apt install libseccomp2): {error}") from error
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    arguments = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
    library.seccomp_rule_add_array.argtypes = arguments
    return library
