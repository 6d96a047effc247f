"""Programs that attack their judge. Each prints PRIZE, which its test expects, where its attack succeeds; those that
look for the answer print what they find.

`PORT`, `PID` and `CANARY` stand for a port, a process and a file of the host.
"""

PRIZE = "pwned"
ANSWER = "kumquat-8317"  # stands in the expected outputs, in the host's environment and in a file of the host

CALL = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def won(result):
    if result >= 0:
        print("pwned")
        sys.stdout.flush()
        os._exit(0)
"""

ATTACKS = {
    "fork bomb": """
import os
while True:
    if os.fork() >= 0:
        os.write(1, b"pwned")
        os._exit(0)
""",
    "fork bomb, patiently": """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
    "other ways to fork": CALL + """
for number, arguments in ((57, ()), (58, ()), (56, (17, 0, 0, 0, 0)), (435, (ctypes.create_string_buffer(88), 88))):
    won(libc.syscall(number, *arguments))
""",
    "a daemon": """
import subprocess
subprocess.Popen(["/bin/sh", "-c", "while :; do :; done &"], start_new_session=True)
print("pwned")
""",
    "posix_spawn": """
import os
os.posix_spawn("/bin/sleep", ["sleep", "1000"], {})
print("pwned")
""",
    "thread bomb": """
import threading, time
threading.stack_size(32768)
for _ in range(1000):
    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
print("pwned")
""",
    "memory bomb": """
held = []
while len(held) < 3000:
    held.append(bytearray(b"x") * (1 << 20))
print("pwned")
""",
    "memory of threads": """
import threading
held = []
def grow():
    for _ in range(300):
        held.append(bytearray(b"x") * (1 << 20))
threads = [threading.Thread(target=grow) for _ in range(10)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
if len(held) == 3000:
    print("pwned")
""",
    "memory that is no address space": CALL + """
import os
won(libc.syscall(319, b"x", 0))
won(libc.shmget(0, 1 << 30, 0o1777))
won(libc.mq_open(b"/x", os.O_CREAT | os.O_RDWR, 0o600, None))
""",
    "a full /tmp": """
with_all = 0
for number in range(100):
    with open(f"/tmp/{number}", "wb") as file:
        for _ in range(16):
            with_all += file.write(bytes(1 << 20))
if with_all > 128 << 20:
    print("pwned")
""",
    "a file too large": """
import os
os.ftruncate(os.open("/tmp/large", os.O_RDWR | os.O_CREAT), 1 << 40)
print("pwned")
""",
    "endless output": """
while True:
    print("pwned" * 1000)
""",
    "endless output, patiently": """
import signal, os
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
while True:
    try:
        os.write(1, b"pwned" * 100000)
    except OSError:
        pass
""",
    "endless complaints": """
import sys
print("pwned", flush=True)
while True:
    print("x" * 10000, file=sys.stderr)
""",
    "endless output to the input": """
import os
os.write(0, b"x")
print("pwned")
""",
    "writing everywhere": """
import os
for folder, _, names in os.walk("/"):
    if folder.startswith("/tmp"):
        continue
    for name in ["x", *names[:3]]:
        try:
            os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT)
        except OSError:
            continue
        if not folder.startswith("/dev"):
            print("pwned")
    if folder.count("/") > 4:
        break
for path in ("CANARY", "/etc/passwd", "/runner/runner.py", "/usr/x", "/dev/x", "/root/x"):
    try:
        open(path, "w")
        print("pwned")
    except OSError:
        pass
""",
    "deleting everywhere": """
import os, shutil
for path in ("/runner/runner.py", "/usr/bin/env", "CANARY", "/dev/null"):
    try:
        os.unlink(path)
        print("pwned")
    except OSError:
        pass
shutil.rmtree("/runner", ignore_errors=True)
if not os.path.exists("/runner/runner.py"):
    print("pwned")
""",
    "network": """
import socket
for family, address in ((socket.AF_INET, ("127.0.0.1", PORT)), (socket.AF_INET6, ("::1", PORT))):
    try:
        socket.socket(family).connect(address)
        print("pwned")
    except OSError:
        pass
""",
    "sockets of all kinds": CALL + """
for family in range(46):
    for kind in (1, 2, 3, 5):
        won(libc.socket(family, kind, 0))
""",
    "pairs of sockets to others": CALL + """
pair = (ctypes.c_int * 2)()
won(libc.socketpair(2, 1, 0, pair))
won(libc.syscall(425, 8, ctypes.create_string_buffer(120)))
""",
    "ptrace": CALL + """
for process in range(1, 50):
    if process != os.getpid():
        won(libc.ptrace(16, process, 0, 0))
        won(libc.ptrace(0x4206, process, 0, 0))
""",
    "memory of others": CALL + """
class Piece(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
buffer = ctypes.create_string_buffer(8)
mine, theirs = Piece(ctypes.addressof(buffer), 8), Piece(id(os), 8)
for process in range(1, 50):
    if process != os.getpid():
        won(libc.process_vm_readv(process, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0) - 1)
        won(libc.process_vm_writev(process, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0) - 1)
        for name in ("mem", "environ", "maps", "fd/0"):
            try:
                open(f"/proc/{process}/{name}", "rb").read(1)
                print("pwned")
            except OSError:
                pass
""",
    "descriptors of others": CALL + """
for process in range(1, 50):
    handle = libc.syscall(434, process, 0)
    won(handle)
    for descriptor in range(20):
        won(libc.syscall(438, handle, descriptor, 0))
""",
    "signals to all": """
import os, signal
for process in (-1, 0, 1, 2, os.getppid(), PID, -os.getpgid(0)):
    for number in (0, signal.SIGSTOP, signal.SIGKILL):
        try:
            os.kill(process, number)
            print("pwned", flush=True)
        except OSError:
            pass
""",
    "signals by other calls": CALL + """
for process in (1, 2, os.getppid()):
    won(libc.syscall(200, process, 9))
    won(libc.syscall(234, process, process, 9))
    won(libc.syscall(129, process, 9, ctypes.create_string_buffer(128)))
    won(libc.prlimit(process, 0, ctypes.create_string_buffer(16), None))
    won(libc.sched_setaffinity(process, 8, ctypes.create_string_buffer(8)))
    won(libc.setpriority(0, process, 19))
    won(libc.setpgid(process, 0))
""",
    "privileges": CALL + """
won(libc.setuid(0))
won(libc.setresuid(0, 0, 0))
won(libc.unshare(0x10000000))
won(libc.unshare(0x00020000))
won(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))
won(libc.umount2(b"/tmp", 2))
won(libc.chroot(b"/tmp"))
won(libc.pivot_root(b"/tmp", b"/tmp") if hasattr(libc, "pivot_root") else -1)
won(libc.setns(0, 0))
won(libc.syscall(321, 0, ctypes.create_string_buffer(120), 120))
won(libc.syscall(323, 0))
won(libc.syscall(425, 8, ctypes.create_string_buffer(120)))
won(libc.syscall(250, 0, 0, 0))
won(libc.syscall(298, ctypes.create_string_buffer(120), 0, -1, -1, 0))
won(libc.syscall(304, -100, ctypes.create_string_buffer(120), 0))
won(libc.prctl(4, 1, 0, 0, 0))
if os.getuid() == 0 or os.geteuid() == 0 or 0 in os.getgroups():
    print("pwned")
""",
    "higher limits": """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
    try:
        resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print("pwned")
    except (OSError, ValueError):
        pass
""",
    "running su": """
import os
os.execv("/bin/su", ["su", "-c", "echo pwned"])
""",
    "calls of 32 bits": """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex("b802000000cd80c3"))  # fork by int 0x80
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
if ctypes.CFUNCTYPE(ctypes.c_int)(address)() >= 0:
    print("pwned")
""",
    "sleeping past the deadline": """
import time
print("pwned", flush=True)
time.sleep(1000)
""",
    "a thread that never ends": """
import threading, time
print("pwned", flush=True)
threading.Thread(target=time.sleep, args=(1000,)).start()
""",
    "stopping itself": """
import os, signal
print("pwned", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
""",
    "computing past the deadline": """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
print("pwned", flush=True)
while True:
    pass
""",
    "exit before the tests": "import os\nos._exit(0)",
    "exit at once": "import sys\nsys.exit(0)",
    "death": "import os\nprint('pwned', flush=True)\nos.kill(os.getpid(), 9)",
    "crash": "import ctypes\nprint('pwned', flush=True)\nctypes.string_at(0)",
    "failure at the end": "print('pwned', flush=True)\nraise SystemExit(3)",
    "a symbolic link for the input": """
import os
for name in ("/tmp/stdin", "/tmp/main", "/tmp/x"):
    if os.path.lexists(name):
        os.unlink(name)
    os.symlink("CANARY", name)
""",
    "things left behind": """
import os
os.makedirs("/tmp/a/b")
os.chmod("/tmp/a", 0)
os.chmod("/tmp", 0o777)
""",
    "hard links": """
import os
os.link("/runner/runner.py", "/tmp/x")
print("pwned")
""",
    "all descriptors": """
import os
message = b'{"code": 0, "cpu_s": 0.0, "clean": true, "stopped": ""}\\n'
for descriptor in [*range(3, 1024), 2, 0]:
    try:
        os.write(descriptor, message)
    except OSError:
        pass
""",
    "the runner's frames": """
import gc, os, sys
frame = sys._getframe()
while frame:
    for name, value in list(frame.f_locals.items()):
        if name == "control":
            try:
                value.send(b'{"code": 0, "clean": true}')
                print("pwned")
            except OSError:
                pass
    frame = frame.f_back
for thing in gc.get_objects():
    if type(thing).__name__ == "socket":
        try:
            thing.send(b'{"code": 0, "clean": true}')
            print("pwned")
        except OSError:
            pass
""",
    "a program that cannot be compiled": "x = " + "(" * 100_000,
    "a program of null bytes": "\0\0\0",
    "deep recursion": """
import sys
sys.setrecursionlimit(10**9)
def f(x):
    return repr(x)
x = []
for _ in range(10**6):
    x = [x]
print(f(x))
""",
}

SEARCHES = {
    "the answer in files": """
import os
for folder in ("/proc", "/tmp", "/runner", "/dev", "/etc", os.path.dirname("CANARY"), "/root", "/home", "/var", "/run"):
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                text = open(f"{where}/{name}", errors="replace").read(1 << 20) if where != "/dev" else ""
            except (OSError, ValueError):
                continue
            at = text.find("kumquat")
            if at >= 0:
                print(text[at : at + 12])
                raise SystemExit
""",
    "the answer in the environment": """
import ctypes, os
print(os.environ.get("LEEWAY_TEST_SECRET"))
for process in (1, 2, 3, os.getppid(), "self"):
    try:
        print(open(f"/proc/{process}/environ").read())
    except OSError:
        pass
""",
    "the answer in memory": """
import gc, sys
needle = "kum" + "quat"
frame = sys._getframe()
seen = []
while frame:
    seen += [*map(str, frame.f_locals.values()), *map(str, frame.f_globals.values())]
    frame = frame.f_back
for thing in [*gc.get_objects(), *seen]:
    if isinstance(thing, str | dict | list | tuple):
        text = str(thing)
        at = text.find(needle)
        if at >= 0 and len(text[at : at + 12].split("-")) == 2:
            print(text[at : at + 12])
            raise SystemExit
""",
    "the answer in descriptors": """
import os
for descriptor in range(1024):
    try:
        os.lseek(descriptor, 0, 0)
        text = os.read(descriptor, 1 << 20).decode(errors="replace")
    except OSError:
        continue
    at = text.find("kumquat-")
    if at >= 0 and text[at + 8].isdigit():
        print(text[at : at + 12])
        raise SystemExit
""",
}

# Solutions of a function `answer(x)`, which a test calls; none computes anything.
FAKES = {
    "equal to everything": """
class Everything(int):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = int.__hash__
    __repr__ = __str__ = lambda self: "0"
def answer(x):
    return Everything(0)
""",
    "an object equal to everything": """
class Everything:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 1
def answer(x):
    return Everything()
""",
    "text equal to everything": """
class Text(str):
    __eq__ = lambda self, other: True
    __hash__ = str.__hash__
def answer(x):
    return Text("no")
""",
    "any of unittest.mock": """
from unittest.mock import ANY
def answer(x):
    return ANY
""",
    "patched builtins": """
import builtins, json, operator, sys
builtins.all = builtins.any = builtins.isinstance = lambda *_: True
builtins.len = lambda *_: 1
operator.eq = lambda *_: True
sys.exit = lambda *_: None
def answer(x):
    return None
""",
    "a patched codec": """
import json, sys
values = sys.modules["values"]
values.encode = lambda value: '[[0], [["tuple", "return", [1]], ["object", "Everything"]]]'
json.dumps = lambda value: '[[0], [["tuple", "return", true]]]'
class Everything:
    __eq__ = lambda self, other: True
def answer(x):
    return Everything()
""",
    "exit in the function": """
import os
def answer(x):
    os._exit(0)
""",
    "exit when loaded": "import os\nos._exit(0)",
    "exit politely": """
import sys
def answer(x):
    sys.exit(0)
""",
    "no more": """
def answer(x):
    raise StopIteration
""",
    "assertions": """
def answer(x):
    raise AssertionError("passed")
""",
    "the end": """
def answer(x):
    raise SystemExit(0)
""",
    "results of its own": """
import os
for descriptor in range(3, 64):
    for line in (b'[[0], [["tuple", "return", true]]]', b'{"code": 0, "clean": true}', b"0"):
        try:
            os.write(descriptor, line + b"\\n")
        except OSError:
            pass
os._exit(0)
""",
    "results that are none": """
import os
os.write(5, b"[" * 1000000 + b"\\n")
os._exit(0)
""",
    "results of a class of the check": """
import os
for _ in range(100):
    os.write(5, b'[[0], [["tuple", "return", [1]], ["object", "Grader"]]]\\n')
def answer(x):
    return 0
""",
    "no results at all": """
import os
os.close(5)
def answer(x):
    return 0
""",
    "itself the check": """
def check(candidate):
    return True
def answer(x):
    return 0
import sys, __main__
__main__.check = check
""",
    "closed pipes, held open": """
import time
def answer(x):
    time.sleep(1000)
""",
    "not a number": """
def answer(x):
    return float("nan")
""",
    "a function": """
def answer(x):
    return answer
""",
    "endless": """
def answer(x):
    return "x" * (1 << 29)
""",
}

# Checks of `answer`: what the functions above must not pass.
CHECKS = {
    "assertions": """
def check(candidate):
    assert candidate(2) == 8
    assert candidate(3) == 27
""",
    "a loop": """
def check(candidate):
    assert all(value == wanted for value, wanted in zip(map(candidate, [2, 3]), [8, 27]))
    assert list(map(candidate, [2, 3])) == [8, 27]
""",
    "zip alone": """
def check(candidate):
    for value, wanted in zip(map(candidate, [2, 3]), [8, 27]):
        assert value == wanted
""",
    "forgiving": """
class Grader:
    pass
def check(candidate):
    try:
        first = candidate(2)
    except Exception:
        first = None
    assert first == 8
""",
    "on the way": "assert answer(2) == 8\nassert answer(3) == 27",
}
