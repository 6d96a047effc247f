"""Hostile programs: each one is contained, none gets a reward, the host stays as it was. Nothing here is ever skipped:
where there is no bubblewrap, all of it fails."""

import json
import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest
from hostile import ANSWER, ATTACKS, CHECKS, FAKES, PRIZE, SEARCHES

from bench.descendants import descendants
from rewards.code.trial import sandbox
from rewards.sandbox.files import content
from rewards.sandbox.sandbox import Sandbox
from rewards.table import resolve

OPTIONS = {"time_s": 0.25, "total_s": 1.5, "memory_mib": 256}
CUBES = {"inputs": [[2], [3]], "outputs": [8, 27], "fn_name": "answer"}
RIGHT = "def answer(x):\n    return x ** 3"


class Host:
    """What programs must not touch."""

    def __init__(self, folder: Path):
        self.canary = folder / "canary"
        self.canary.write_text(ANSWER)
        self.process = subprocess.Popen(["sleep", "600"])
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(0)
        self.others = descendants()  # that other tests have left running
        self.before = self.state()

    def state(self):
        runner = Path(__file__).parent.parent / "rewards/sandbox/runner.py"
        null = os.stat("/dev/null")
        return self.canary.read_text(), self.process.poll(), runner.read_bytes(), null.st_rdev, null.st_mode

    def check(self):
        assert self.state() == self.before
        with pytest.raises(BlockingIOError):
            self.listener.accept()
        ours = [name for pid, name in descendants().items() if pid not in self.others and name != "sleep"]
        assert len(ours) <= 2 * 3, "bubblewrap, its init and the runner, of two sandboxes at most"

    def close(self):
        self.process.kill()
        self.process.wait()
        self.listener.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    host = Host(tmp_path_factory.mktemp("host"))
    yield host
    host.close()


@pytest.fixture(scope="module")
def code():
    return resolve("code", OPTIONS)


def judge(code, host, program, **tests):
    for name, value in (("PORT", host.listener.getsockname()[1]), ("PID", host.process.pid), ("CANARY", host.canary)):
        program = program.replace(name, str(value))
    return code("", f"```python\n{program}\n```", "", **tests)


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_contained(code, host, attack):
    tests = {"input_output": json.dumps({"inputs": ["1"], "outputs": [PRIZE]})}
    verdict = judge(code, host, ATTACKS[attack], **tests)
    assert verdict.score == 0.0 and not verdict.solved and not verdict.error, verdict
    assert PRIZE not in verdict.evidence.get("given", ""), "it succeeded, and said so more than once"
    assert judge(code, host, f"print({PRIZE!r})", **tests).solved, "the next program"
    host.check()


@pytest.mark.parametrize("search", SEARCHES)
def test_the_answer_is_nowhere_to_be_found(code, host, search, monkeypatch):
    monkeypatch.setenv("LEEWAY_TEST_SECRET", ANSWER)
    sandbox("bubblewrap", "program").close()  # so that a new one is started from this environment
    tests = {"input_output": json.dumps({"inputs": ["1"], "outputs": [ANSWER]})}
    verdict = judge(code, host, SEARCHES[search], **tests)
    assert verdict.score == 0.0 and ANSWER not in verdict.evidence.get("given", ""), verdict
    assert judge(code, host, f"print({ANSWER!r})", **tests).solved
    host.check()


@pytest.mark.parametrize("fake", FAKES)
def test_a_fake_does_not_pass_as_a_function(code, host, fake):
    tests = {"input_output": json.dumps(CUBES)}
    verdict = judge(code, host, FAKES[fake], **tests)
    assert verdict.score == 0.0 and not verdict.solved, verdict
    assert judge(code, host, RIGHT, **tests).solved
    host.check()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("fake", FAKES)
def test_a_fake_does_not_pass_a_check(code, host, fake, check):
    tests = {"test": CHECKS[check], "entry_point": "answer"}
    verdict = judge(code, host, FAKES[fake], **tests)
    assert verdict.score == 0.0 and not verdict.solved, verdict
    host.check()


def everything_sent(monkeypatch):
    """The jobs and files that go into any sandbox from now on, with what they hold."""
    sent = []
    begin = Sandbox.begin

    def spy(box, job, files):
        held = [content(file, 1 << 20) for file in files if stat.S_ISREG(os.fstat(file).st_mode)]
        sent.append((box, repr(job).encode() + b"".join(held)))
        begin(box, job, files)

    monkeypatch.setattr(Sandbox, "begin", spy)
    return sent


EXPECTED = {
    "text": {"input_output": {"inputs": ["1"], "outputs": [ANSWER]}},
    "value": {"input_output": {"inputs": [[1]], "outputs": [ANSWER], "fn_name": "answer"}},
    "check": {"test": f"assert answer(1) == {ANSWER!r}", "entry_point": "answer"},
    "checker": {
        "input_output": {"inputs": ["1"], "outputs": [ANSWER]},
        "checker_code": "def check(given, output, expected):\n    return output == expected",
    },
}


@pytest.mark.parametrize("form", EXPECTED)
def test_the_expected_output_never_enters_the_programs_sandbox(code, form, monkeypatch):
    sent = everything_sent(monkeypatch)
    verdict = code("", "```python\ndef answer(x): pass\nprint(1)\n```", "", **EXPECTED[form])
    assert verdict.score == 0.0 and not verdict.error
    ours = [held for box, held in sent if box is sandbox("bubblewrap", "program")]
    assert len(ours) == 1 and b"def answer" in ours[0] and ANSWER.encode() not in ours[0]


COMPILED = {
    "fork": '#include <unistd.h>\n#include <cstdio>\nint main() { if (fork() >= 0) puts("pwned"); }',
    "network": '#include <sys/socket.h>\n#include <cstdio>\nint main() { if (socket(2, 1, 0) >= 0) puts("pwned"); }',
    "memory": '#include <cstdlib>\n#include <cstdio>\nint main() { if (malloc(1L << 30)) puts("pwned"); }',
    "trace": "#include <sys/ptrace.h>\n#include <cstdio>\n"
    'int main() { if (ptrace(PTRACE_TRACEME, 0, 0, 0) == 0) puts("pwned"); }',
    "execution": '#include <unistd.h>\nint main() { execl("/bin/echo", "echo", "pwned", nullptr); }',
    "a file of the host, included": '#include "CANARY"\nint main() {}',
    "a file of the host, assembled": 'asm(".incbin \\"/proc/self/environ\\"");\nint main() {}',
    "an endless compilation": "template <int n> struct F { F<n + 1> f; F<n + 2> g; };\nF<0> f;\nint main() {}",
}


@pytest.mark.parametrize("attack", COMPILED)
def test_a_compiled_attack_is_contained(host, attack):
    cpp = resolve("code", {**OPTIONS, "language": "cpp", "total_s": 20.0})
    tests = {"input_output": {"inputs": ["1"], "outputs": [PRIZE]}}
    program = COMPILED[attack].replace("CANARY", str(host.canary))
    verdict = cpp("", f"```cpp\n{program}\n```", "", **tests)
    assert verdict.score == 0.0 and ANSWER not in str(verdict.evidence), verdict
    assert PRIZE not in verdict.evidence.get("given", "")
    host.check()
