"""The sandbox itself: its walls one by one, its deaths, and what there is instead of it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from hostile import ATTACKS

from bench.descendants import descendants
from rewards.code.trial import close_sandboxes
from rewards.code.trial import sandbox as kept
from rewards.sandbox import launch
from rewards.sandbox.files import content, opened, sealed, sink
from rewards.sandbox.limits import MIB, Limits
from rewards.sandbox.sandbox import Job, Sandbox
from rewards.table import resolve

QUICK = Limits(cpu_s=1.0, wall_s=2.0, memory_bytes=256 * MIB)
FORKS = """
import os, time
num_forks = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(0.3)
            os._exit(0)
        num_forks += 1
except OSError:
    print(num_forks)
"""
SUMS = {"input_output": {"inputs": ["1 2"], "outputs": ["3"]}}
SUM = "```python\nprint(sum(map(int, input().split())))\n```"


@pytest.fixture
def sandbox():
    made = Sandbox()
    yield made
    made.close()


def run(box, source, limits=QUICK, strict=True):
    files = sealed(b""), sink(), sink(), sealed(source.encode())
    end = box.run(Job(kind="script", limits=limits, strict=strict), files)
    said, errors = (content(file, 1 << 26).decode(errors="replace") for file in files[1:3])
    for file in files:
        os.close(file)
    return end, said.strip(), errors.strip()


def processes_of(sandbox):
    """Names by process id of what starting it starts; other tests' sandboxes may still run."""
    others = descendants()
    sandbox.start()
    return {process: name for process, name in descendants().items() if process not in others}


def wait_until_gone(processes):
    deadline = time.monotonic() + 5
    while left := [process for process in processes if Path(f"/proc/{process}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def test_a_program_sees_little(sandbox):
    seen = (
        "import os\nprint(sorted(os.environ), sorted(os.listdir('/dev')), os.listdir('/tmp'), os.path.exists('/proc'))"
    )
    end, said, _ = run(sandbox, seen)
    environment = ["HOME", "LC_ALL", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH", "PWD"]
    assert end.code == 0
    assert said == f"{environment} ['full', 'null', 'random', 'stdin', 'urandom', 'zero'] ['stdin'] False"


@pytest.mark.parametrize("kind", ["net", "pid", "ipc", "uts", "mnt"])
def test_a_sandbox_has_namespaces_of_its_own(sandbox, kind):
    """Where the system-call filter leaks, this is the next wall."""
    runner = max(processes_of(sandbox))
    assert os.readlink(f"/proc/{runner}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")


def test_programs_run_as_an_unprivileged_user_of_their_own(sandbox):
    identity = "import os\nprint(*os.getresuid(), *os.getresgid(), *os.getgroups())"
    with closing(Sandbox()) as another:
        mine, theirs = (run(box, identity)[1] for box in (sandbox, another))
    assert "0" not in mine.split()
    assert os.geteuid() != 0 or mine != theirs


def test_a_process_that_may_fork_still_meets_a_bound(sandbox):
    """Root has no bound on its processes; so this is about the user that programs run as."""
    _, said, errors = run(sandbox, FORKS, strict=False)
    assert 10 < int(said) < QUICK.tasks, errors


def test_a_file_that_is_written_has_a_bound(sandbox):
    end, said, _ = run(sandbox, "import os\nwhile True:\n    os.write(1, b'x' * 65536)", Limits(file_bytes=1 * MIB))
    assert end.code == 1 and len(said) == 1 * MIB


def test_abort_and_signals_to_oneself_work(sandbox):
    assert run(sandbox, "import os\nos.abort()")[0].code == -signal.SIGABRT
    assert run(sandbox, "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)")[0].code == -signal.SIGTERM
    assert run(sandbox, "import signal\nsignal.pthread_kill(1, 0)")[0].code != 0


def test_the_deadline_ends_the_whole_tree(sandbox):
    inside = processes_of(sandbox)
    end, _, _ = run(sandbox, "import time\ntime.sleep(60)", Limits(wall_s=0.2))
    assert len(inside) >= 3 and end.stopped == "time" and end.code is None
    wait_until_gone(inside)
    assert run(sandbox, "print(1)")[1] == "1" and sandbox.num_starts == 2


# Programs that leave things behind, and whether that costs the sandbox.
LEAVING = {
    "a file": ("open('/tmp/x', 'w')", False),
    "folders that nobody may enter": ("os.makedirs('/tmp/x/y')\nos.chmod('x/y', 0)\nos.chmod('x', 0)", False),
    "links to folders": ("os.symlink('/usr', 'x')\nos.mkdir('y')\nos.symlink('/tmp', 'y/z')", False),
    "a deep folder": ("for _ in range(90):\n    os.mkdir('x')\n    os.chdir('x')", False),
    "a folder too deep": ("for _ in range(150):\n    os.mkdir('x')\n    os.chdir('x')", True),
    "many files": ("for number in range(150):\n    open(f'/tmp/{number}', 'w').close()", True),
    "many files in a folder": ("os.mkdir('x')\nfor number in range(150):\n    os.mkdir(f'x/{number}')", True),
}


@pytest.mark.parametrize("left", LEAVING)
def test_what_a_program_leaves_is_not_there_for_the_next(sandbox, left):
    source, restarts = LEAVING[left]
    assert run(sandbox, f"import os\n{source}")[0].code == 0
    end, said, _ = run(sandbox, "import os\nprint(os.listdir('/tmp'))")
    assert said == "['stdin']" and sandbox.num_starts == 1 + restarts


def test_a_sandbox_that_died_in_its_sleep_is_replaced(sandbox):
    inside = [process for process, name in processes_of(sandbox).items() if name == "bwrap"]
    os.kill(inside[-1], signal.SIGKILL)
    wait_until_gone(inside[-1:])
    assert run(sandbox, "print(1)")[1] == "1"


def test_the_sandboxes_that_a_reward_keeps_can_be_closed():
    others = descendants()
    kept("bubblewrap", "program").start()
    inside = [process for process in descendants() if process not in others]
    assert len(inside) >= 3
    close_sandboxes()
    wait_until_gone(inside)


def test_a_report_that_nobody_awaited_is_not_taken_for_the_next(sandbox):
    with opened(sealed(b""), sink(), sink(), sealed(b"")) as files:
        sandbox.begin(Job(kind="script"), files)
    assert run(sandbox, "raise SystemExit(3)")[0].code == 3


def test_nothing_outlives_the_process_that_started_it(tmp_path):
    script = tmp_path / "judge.py"
    script.write_text(f"from rewards.table import resolve\nresolve('code', {{}})('', 'while 1: pass', '', **{SUMS!r})")
    judge = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    deadline = time.monotonic() + 20
    while len(found := descendants(judge.pid)) < 4:  # bubblewrap, its init, the runner, the program
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    judge.kill()
    judge.wait()
    wait_until_gone(found)


def test_without_bubblewrap_programs_are_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(ValueError, match="bubblewrap is missing, and programs of a model are not run without it"):
        resolve("code", {})
    assert resolve("code", {"sandbox": "unsafe"})("", SUM, "", **SUMS).solved, "unless that is what is asked for"


def test_without_namespaces_programs_are_refused(monkeypatch):
    monkeypatch.setattr("rewards.sandbox.bubblewrap.program", lambda: "/bin/false")
    with pytest.raises(ValueError, match="bubblewrap cannot make a sandbox here"):
        resolve("code", {})


def test_a_runner_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(launch, "START_S", 0.2)
    monkeypatch.setattr("rewards.sandbox.bubblewrap.python", lambda: ["/bin/sh", "-c", "sleep 5"])
    with pytest.raises(ValueError, match="the runner did not start within 0.2 s"):
        resolve("code", {})


INSIDE_NAMESPACE = [
    "fork bomb",
    "other ways to fork",
    "a daemon",
    "memory bomb",
    "memory that is no address space",
    "a full /tmp",
    "writing everywhere",
    "sockets of all kinds",
    "ptrace",
    "memory of others",
    "signals to all",
    "signals by other calls",
    "privileges",
    "higher limits",
    "the runner's frames",
]


@pytest.fixture(scope="module")
def ordinary():
    """A sandbox as anybody but root has it, in a namespace of users. (That the kernel bounds the number of threads
    there is not to be seen here, where it is root who is in that namespace.)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1234)
        made = Sandbox()
        yield made
        made.close()


@pytest.mark.parametrize("attack", INSIDE_NAMESPACE)
def test_an_ordinary_users_sandbox_contains_attacks_too(ordinary, attack, tmp_path):
    program = ATTACKS[attack].replace("PID", "1").replace("CANARY", str(tmp_path / "x"))
    end, said, errors = run(ordinary, program)
    assert "pwned" not in said, (end, errors)
    assert run(ordinary, "import os\nprint(*os.getresuid())")[1] == "1000 1000 1000"


def test_a_program_cannot_close_the_folder_of_the_next(ordinary):
    """There /tmp is the programs' own."""
    assert run(ordinary, "import os\nos.unlink('/tmp/stdin')\nos.chmod('/tmp', 0o555)")[0].code == 0
    assert run(ordinary, "open('/tmp/x', 'w')\nprint(1)")[1] == "1"
