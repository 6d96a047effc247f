"""What runs inside a sandbox: `python runner.py CONTROL UID`. It and what it imports need the standard library alone.

It waits for runs on the socket CONTROL, forks a child for each, and answers with how the child ended. The child takes
its bounds upon itself, closes everything but its own files and becomes the program. Nothing that the runner knows is
secret, and the program can neither signal it, nor trace it, nor find its files.
"""

import array
import atexit
import bisect
import builtins
import collections
import copy
import ctypes
import datetime
import fcntl
import functools
import gc
import heapq
import itertools
import json
import linecache
import math
import operator
import os
import random
import re
import resource
import signal
import socket
import stat
import string
import struct
import sys
import threading
import traceback
import types
import typing
from typing import Any

import values
from candidate import CALLS, RESULTS, Candidate, Unspeakable, classes

TYPED_INPUT = "stdin"  # /dev/stdin is a link to it: there is no /proc for the usual one
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
PROGRAM = 3  # descriptor of a child, after its standard ones; CALLS and RESULTS follow
NUM_FILES = 6
ASIDE = 64  # descriptors from here on are free
MOST_TYPED = 32 << 20  # bytes of input that fit into /tmp
MOST_LEFT = 100  # files and folders
SHARED = 0o1777  # mode of /tmp
LOST = 3  # exit code of a check that could not ask its candidate
UNASKED = 4  # exit code of a check that never did
UNFINISHED = 120  # exit code of Python itself where its end fails
BROKEN = 5  # exit code of a check that is no Python

Job = dict[str, Any]
Namespace = dict[str, Any]

# What sites with functions instead of programs give to all solutions.
CUSTOMARY: Namespace = {
    **{module.__name__: module for module in (array, bisect, collections, copy, datetime, functools, heapq, itertools)},
    **{module.__name__: module for module in (math, operator, random, re, string, sys, typing)},
    **{name: vars(module)[name] for module in (typing, collections, functools) for name in module.__all__},
    **{name: vars(module)[name] for module in (bisect, heapq, itertools) for name in dir(module) if name[0] != "_"},
    **{name: vars(math)[name] for name in ("ceil", "comb", "floor", "gcd", "inf", "isqrt", "log2", "pi", "sqrt")},
}


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    become(int(sys.argv[2]))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    setup = json.loads(control.recv(1 << 20))
    sys.path[:1] = []  # this file's folder
    sys.path += setup["packages"]
    builtins.exit = builtins.quit = sys.exit  # type: ignore[attr-defined]  # as `site` has them
    gc.collect()
    gc.freeze()
    control.send(b"{}")
    while True:
        message, files, _, _ = socket.recv_fds(control, 1 << 16, NUM_FILES)
        if not message:
            return
        job = json.loads(message)
        if os.fstat(files[0]).st_size <= MOST_TYPED:
            copy_file(files[0], TYPED_INPUT)
        child = os.fork()
        if child == 0:
            begin(control, libc, setup, job, files)
        control.send(json.dumps(report(child, job, files)).encode())
        for file in files:
            os.close(file)


def become(user: int) -> None:
    """A real unprivileged user, whose number of tasks the kernel bounds, as it does not for root."""
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def report(child: int, job: Job, files: list[int]) -> dict[str, Any]:
    """How the child ended, and whether the sandbox is as before, so that it can serve another program."""
    _, status, usage = os.wait4(child, 0)
    try:
        if status == 0 and job["made"]:
            copy_file(job["made"], files[PROGRAM])
        clean = tidy()
    except OSError:
        clean = False
    cpu_s = usage.ru_utime + usage.ru_stime
    return {"code": os.waitstatus_to_exitcode(status), "cpu_s": cpu_s, "clean": clean}


def tidy() -> bool:
    """Removes what a program left. What is much or resists goes with the sandbox: OSError, or False."""
    if stat.S_IMODE(os.stat(".").st_mode) != SHARED:
        return False  # its owner made it a place where the next program could not write
    folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return empty(folder, MOST_LEFT) >= 0
    finally:
        os.close(folder)


def empty(folder: int, most: int) -> int:
    """Empties an open folder of at most `most` things and says how many more would have been removed; negative where
    there were more. Links are removed and never followed."""
    with os.scandir(folder) as entries:
        found = list(itertools.islice(entries, most + 1))
    most -= len(found)
    for entry in found if most >= 0 else ():
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.name, dir_fd=folder)
            continue
        os.chmod(entry.name, 0o700, dir_fd=folder)
        below = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            most = empty(below, most)
        finally:
            os.close(below)
        if most < 0:
            break
        os.rmdir(entry.name, dir_fd=folder)
    return most


def copy_file(source: int | str, target: int | str) -> None:
    """The whole of a file, whatever the position of its descriptor."""
    reading = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC) if isinstance(source, str) else source
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    writing = os.open(target, flags, 0o600) if isinstance(target, str) else target
    place = 0
    while sent := os.sendfile(writing, reading, place, 1 << 30):
        place += sent
    for given, opened in ((source, reading), (target, writing)):
        if given is not opened:
            os.close(opened)


def begin(control: socket.socket, libc: ctypes.CDLL, setup: Job, job: Job, files: list[int]) -> None:
    """The child's whole life; never returns."""
    leave = os._exit
    code = 1
    try:
        control.detach()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        take_files(files)
        bound(job["limits"])
        if job["strict"]:
            restrict(libc, bytes.fromhex(setup["filter"]), setup["own_pid"])
        code = KINDS[job["kind"]](job)
    except BaseException:
        traceback.print_exc()
    finally:
        code = finish(code)
        leave(code)


def take_files(files: list[int]) -> None:
    """`files` become the descriptors 0 to 5; all others are closed."""
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, ASIDE) for file in files]
    for number, file in enumerate(moved):
        os.dup2(file, number, inheritable=number < PROGRAM)
    os.closerange(len(files), 1 << 16)
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def bound(limits: dict[str, Any]) -> None:
    seconds = math.ceil(limits["cpu_s"])
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_STACK, limits["stack_bytes"], limits["stack_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"], limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"], limits["open_files"]),
        (resource.RLIMIT_NPROC, limits["tasks"], limits["tasks"]),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
    ):
        highest = resource.getrlimit(kind)[1]  # bounds of whoever judges are inherited, and cannot be raised
        if highest != resource.RLIM_INFINITY:
            soft, hard = min(soft, highest), min(hard, highest)
        resource.setrlimit(kind, (soft, hard))


def restrict(libc: ctypes.CDLL, code: bytes, own_pid: int) -> None:
    """Puts the strict filter on this process."""
    code = code.replace(struct.pack("=I", own_pid), struct.pack("=I", os.getpid()))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "the system-call filter was refused")


def finish(code: int) -> int:
    """What Python does at its end: waits for threads, runs exit handlers, flushes all files, lost ones too."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        vars(sys.modules[values.PROGRAM]).clear()
    except BaseException:
        return code if code else UNFINISHED
    return code


def run_script(job: Job) -> int:
    """A program from standard input to standard output."""
    return run(read_program(), module())


def run_binary(job: Job) -> int:
    """A compiled one."""
    os.execve(PROGRAM, ["main"], dict(os.environ))


def run_compiler(job: Job) -> int:
    """Source from standard input; the runner carries off what is made."""
    os.execvp(job["arguments"][0], job["arguments"])


def run_calls(job: Job) -> int:
    """A function, called once for every line of CALLS; RESULTS gets one line each."""
    namespace = module()
    namespace.update(CUSTOMARY)
    if code := run(read_program(), namespace):
        return code
    function = find(namespace, job["entry"])
    with open(CALLS, closefd=False) as calls, open(RESULTS, "w", closefd=False) as results:
        for line in calls:
            results.write(answer(function, line, namespace, job["changed"]) + "\n")
            results.flush()
    return 0


def answer(function: Any, line: str, namespace: Namespace, changed: bool) -> str:
    """What the function returns or raises, and the arguments as it left them where `changed` asks for them."""
    arguments, keywords = values.decode(line, classes(namespace))
    try:
        value = function(*arguments, **keywords)
        return values.encode(("return", value, arguments, keywords) if changed else ("return", value))
    except Exception as error:
        traceback.print_exc()
        return values.encode(("raise", type(error).__name__, str(error)))


def find(namespace: Namespace, entry: str) -> Any:
    """A function, or a method of `Solution`."""
    if entry in namespace or "Solution" not in namespace:
        return eval(entry, namespace)
    return eval(entry, namespace) if "." in entry else getattr(namespace["Solution"](), entry)


def run_check(job: Job) -> int:
    """Test code that calls `check(candidate)` or asserts about the entry's name; standard input holds its prelude."""
    namespace = module()
    namespace.update(CUSTOMARY)
    candidate = Candidate(namespace)
    try:
        exec(compiled(sys.stdin.read(), "prelude.py"), namespace)
        test = read_program("test.py")
    except BaseException:
        traceback.print_exc()
        return BROKEN
    namespace[job["entry"]] = candidate
    try:
        exec(test, namespace)
        if "check" in namespace:
            namespace["check"](candidate)
    except Unspeakable:
        traceback.print_exc()
        return BROKEN
    return LOST if candidate.lost else 0 if candidate.num_calls else UNASKED


KINDS = {
    "script": run_script,
    "binary": run_binary,
    "compiler": run_compiler,
    "calls": run_calls,
    "check": run_check,
}


def read_program(name: str = "main.py") -> types.CodeType:
    os.lseek(PROGRAM, 0, os.SEEK_SET)  # an earlier child has read it
    with open(PROGRAM, encoding="utf-8", closefd=False) as file:
        return compiled(file.read(), name)


def compiled(source: str, name: str) -> types.CodeType:
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for tracebacks
    return compile(source, name, "exec")


def module() -> Namespace:
    """The dictionary of a new __main__."""
    made = sys.modules[values.PROGRAM] = types.ModuleType(values.PROGRAM)
    made.__dict__.update(__builtins__=builtins, __file__="main.py")
    sys.argv = ["main.py"]
    return made.__dict__


def run(code: types.CodeType, namespace: Namespace) -> int:
    """The exit code that Python would give."""
    try:
        exec(code, namespace)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
