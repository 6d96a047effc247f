import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from engine.process import PARENT, Child, StopSignal, Supervisor, child_environment


def module(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(text)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        select.select([], [], [], 0.02)
    return condition()


def test_torchrun_variables_do_not_reach_a_child(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "GROUP_RANK", "KEPT"):
        monkeypatch.setenv(name, "1")
    kept = child_environment(threads=3, gpus=[])
    assert kept["KEPT"] == "1" and kept["OMP_NUM_THREADS"] == "3" and kept[PARENT] == str(os.getpid())
    assert not {"RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "GROUP_RANK"} & kept.keys()


def test_a_child_sees_the_gpus_it_is_given(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert child_environment(threads=1, gpus=["2"])["CUDA_VISIBLE_DEVICES"] == "2"
    assert child_environment(threads=1, gpus=[])["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_a_dead_child_is_an_event_that_tells_its_last_words(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    module(tmp_path, "failing", "import sys; print('the reason'); sys.exit(7)")
    child = Child("worker", "failing", [], tmp_path / "log")
    assert select.select([child.fd], [], [], 15.0)[0]
    assert "worker (pid" in str(child.error()) and "code 7: the reason" in str(child.error())
    child.stop(1.0)


def test_a_child_dies_with_a_parent_that_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path) + os.pathsep + os.getcwd())
    module(tmp_path, "grandchild", "import time; from engine.process import die_with_parent\n"
           "die_with_parent(); print('up', flush=True); time.sleep(60)")
    module(tmp_path, "parent", "import time; from pathlib import Path; from engine.process import Child\n"
           "c = Child('c', 'grandchild', [], Path('log')); print(c.pid, flush=True); time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-m", "parent"], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert until(lambda: "up" in (tmp_path / "log").read_text())
    parent.kill()
    parent.wait()
    assert until(lambda: not alive(pid))


TWICE = """
import pathlib, sys
runs = pathlib.Path("runs")
number = len(runs.read_text()) if runs.exists() else 0
runs.write_text("x" * (number + 1))
sys.exit(0 if number == 1 else 9)
"""


def test_a_supervisor_restarts_the_dead_and_lets_the_finished_rest(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    module(tmp_path, "twice", TWICE)
    monkeypatch.chdir(tmp_path)
    supervisor = Supervisor("worker", "twice", [], tmp_path / "log", threads=1)
    supervisor.start()
    supervisor.join(20.0)
    assert not supervisor.is_alive() and not supervisor.gave_up and (tmp_path / "runs").read_text() == "xx"
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and "worker (pid" in told and "code 9" in told and "starting it again" in told


def test_a_supervisor_gives_up_a_child_that_never_works(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("engine.process.LONGEST_BACK_OFF_S", 0.01)
    module(tmp_path, "hopeless", "import sys; print('no such library'); sys.exit(1)")
    supervisor = Supervisor("worker", "hopeless", [], tmp_path / "log", threads=1)
    supervisor.start()
    assert select.select([supervisor.fd], [], [], 30.0)[0] and supervisor.gave_up
    assert "code 1: no such library" in str(supervisor.error()) and "5 times in a row" in str(supervisor.error())
    assert (tmp_path / "log").read_text().count("no such library") == 5


def test_stopping_a_supervisor_ends_a_child_that_ignores_sigterm(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    module(tmp_path, "stubborn", "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
           "print('up', flush=True); time.sleep(60)")
    supervisor = Supervisor("worker", "stubborn", [], tmp_path / "log", threads=1)
    supervisor.start()
    assert until(lambda: (tmp_path / "log").exists() and "up" in (tmp_path / "log").read_text())
    assert supervisor.child is not None
    pid = supervisor.child.pid
    supervisor.stop(0.3)
    assert not alive(pid) and not supervisor.is_alive()


def test_a_signal_becomes_an_event_and_late_processes_are_ended(tmp_path):
    script = (
        "import os, select, signal, time\nfrom engine.process import StopSignal\n"
        "stop = StopSignal(0.3); os.kill(os.getpid(), signal.SIGTERM)\n"
        "assert select.select([stop.fd], [], [], 5)[0] and stop.asked; print('asked', flush=True); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=30)
    assert done.stdout == "asked\n" and done.returncode == 1


def test_stop_signal_is_an_error_for_waits():
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert "asked to stop" in str(StopSignal(1.0).error())
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
