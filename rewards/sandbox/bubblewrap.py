"""The walls of a sandbox: bubblewrap's command line, and the user that programs run as."""

import os
import shutil
import socket
import sys
import sysconfig
from pathlib import Path

from rewards.sandbox.limits import TMP_BYTES

MISSING = (
    "bubblewrap is missing, and programs of a model are not run without it: apt install bubblewrap. "
    'To run them with your own rights all the same, name it: sandbox = "unsafe"'
)
HERE = Path(__file__).resolve().parent
INSIDE = "/runner"  # this folder, in the sandbox
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
FILES = ("/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
USERS = range(58_000, 59_000)  # within the 65,536 that a container has; taken by nobody's accounts
OWN_NAMESPACE = ["--unshare-user", "--uid", "1000", "--gid", "1000"]
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LC_ALL": "C.UTF-8",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}


class SandboxError(RuntimeError):
    """No sandbox can be made here; the message says why."""


def program() -> str:
    """The path of bwrap. Raises `SandboxError` where there is none."""
    beside = Path(sys.prefix) / "bin"
    found = shutil.which("bwrap") or shutil.which("bwrap", path=str(beside))
    if found is None:
        raise SandboxError(MISSING)
    return found


def python() -> list[str]:
    """The interpreter, without the environment's start-up files."""
    return [os.path.realpath(sys.executable), "-E", "-s", "-S", "-B"]


def packages() -> dict[str, str]:
    """What programs may import besides the standard library: folders of the sandbox, and which ones they are. They have
    places of their own, as ours may be below /tmp, which is not that of the sandbox."""
    folders = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    return {f"/packages/{number}": folder for number, folder in enumerate(folders)}


def command(filter_fd: int, info_fd: int, own_namespace: bool) -> list[str]:
    """bwrap up to the program to start: namespaces of its own, no network, nothing to write to but a bounded /tmp.

    `own_namespace` makes a namespace of users too, which is how it works for others than root.
    """
    words = [program(), "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    words += OWN_NAMESPACE if own_namespace else ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    words += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        words += ["--setenv", name, value]
    for path in SYSTEM:
        words += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind-try", path, path]
    shown = {path: path for path in (*FILES, sys.base_prefix)} | packages()
    parents = [str(parent) for path in (*shown, *DEVICES) for parent in reversed(Path(path).parents)]
    for path in dict.fromkeys(parents):
        words += ["--perms", "0755", "--dir", path]  # left to itself bwrap makes them for its own user alone
    for path, folder in shown.items():
        words += ["--ro-bind-try", folder, path]
    for path in DEVICES:
        words += ["--dev-bind", path, path]
    words += ["--ro-bind", str(HERE), INSIDE]
    words += ["--symlink", "/tmp/stdin", "/dev/stdin"]
    words += ["--perms", "1777", "--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    words += ["--remount-ro", "/", "--seccomp", str(filter_fd), "--info-fd", str(info_fd)]
    return [*words, "--", *python(), f"{INSIDE}/runner.py"]


def lease_user() -> tuple[int, socket.socket]:
    """A user id that no other sandbox of this machine has while the socket stays open: the kernel counts tasks by
    user. Raises `SandboxError` when all are taken."""
    start = os.getpid() % len(USERS)
    for number in (*USERS[start:], *USERS[:start]):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0leeway-sandbox-{number}")
        except OSError:
            claim.close()
            continue
        return number, claim
    raise SandboxError(f"all {len(USERS)} users of sandboxes are taken")
