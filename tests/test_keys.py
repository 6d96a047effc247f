"""Who may talk to a job: its key, strangers, and frames that are no messages."""

import os
import random
import stat
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import zmq
from test_stream import group, wait_for

from engine.config import ConfigError
from engine.keys import VARIABLE, JoinKey, Lock
from engine.schema import Beat, FromGenerator, Heartbeat, Request, Result, ToGenerator
from engine.stream import Hub, Link
from engine.weights import Manifest, Publisher, Server, WeightsError, subscribe
from engine.wire import decode, encode


@pytest.fixture
def lock() -> Iterator[Lock]:
    lock = Lock()
    yield lock
    lock.close()


@pytest.fixture
def hub(lock: Lock) -> Iterator[Hub]:
    hub = Hub("127.0.0.1", 0, FromGenerator, lock)
    yield hub
    lock.close()
    hub.close()


def link(hub: Hub, key: JoinKey | None) -> Link:
    return Link(ToGenerator, connect=f"tcp://127.0.0.1:{hub.port}", identity="g", key=key)


def until_refused(lock: Lock, num: int) -> None:
    limit = time.monotonic() + 5
    while lock.num_refused < num:
        assert time.monotonic() < limit
        time.sleep(0.01)


def strange(key: JoinKey) -> dict[str, JoinKey | None]:
    """Keys of others, each lacking one thing."""
    public, secret = (part.decode() for part in zmq.curve_keypair())
    other, _ = (part.decode() for part in zmq.curve_keypair())
    return {
        "no key": None,
        "a pair of its own": JoinKey(key.server, public, secret),
        "another's secret": JoinKey(key.server, key.public, secret),
        "another server": JoinKey(other, key.public, key.secret),
    }


def test_who_has_the_key_talks_and_is_answered(lock: Lock, hub: Hub) -> None:
    with closing(link(hub, lock.key)) as generator:
        generator.send(Request(3))
        [(peer, message, _)] = wait_for(hub)
        assert (peer, message) == ("g", Request(3))
        hub.send(peer, Beat())
        assert generator.receive(5.0, "answer") == Beat()
    assert lock.num_refused == 0


@pytest.mark.parametrize("lacking", ["no key", "a pair of its own", "another's secret", "another server"])
def test_strangers_are_refused_and_counted(lock: Lock, hub: Hub, lacking: str) -> None:
    with closing(link(hub, strange(lock.key)[lacking])) as stranger, closing(link(hub, lock.key)) as generator:
        stranger.send(Request(1))
        until_refused(lock, 1)
        generator.send(Request(2))
        assert [message for _, message, _ in wait_for(hub)] == [Request(2)]


def test_weights_are_served_to_who_has_the_key() -> None:
    tensors = [("w", torch.arange(3 << 18, dtype=torch.float32))]
    lock = Lock()
    with closing(Publisher(f"keys-{os.getpid()}", Manifest.of(tensors, torch.float32))) as publisher:
        server = Server(publisher.name, "127.0.0.1", lock)
        subscribed = partial(subscribe, "tcp", segment="", host="", address=f"tcp://127.0.0.1:{server.port}")
        publisher.publish(0, 0, tensors)
        with pytest.raises(WeightsError, match="no answer"):
            subscribed(timeout_s=0.3)
        with closing(subscribed(timeout_s=5.0, key=lock.key)) as subscriber:
            assert torch.equal(subscriber.stage(0, 0).tensors["w"], tensors[0][1])
        assert lock.num_refused >= 1
        lock.close()
        server.close()


def test_a_key_is_handed_over_by_a_private_file_or_the_environment(
    lock: Lock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "join.key"
    for _ in range(2):  # a resume writes a new one over it
        lock.key.write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and list(tmp_path.iterdir()) == [path]
    assert JoinKey.find(str(path)) == lock.key and JoinKey.find("") is None
    monkeypatch.setenv(VARIABLE, path.read_text())
    assert JoinKey.find("") == lock.key
    assert VARIABLE not in os.environ  # nobody inherits it
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="others may read it: chmod 600"):
        JoinKey.find(str(path))
    path.chmod(0o600)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="holds no key of a job"):
        JoinKey.find(str(path))
    with pytest.raises(ConfigError, match="No such file"):
        JoinKey.find(str(tmp_path / "none"))


# ---- frames that are no messages -------------------------------------------------------------------------------


def damaged(whole: list[bytes], draw: random.Random) -> list[bytes]:
    """`whole` frames after a few of the things that can go wrong with bytes."""
    frames = [bytearray(frame) for frame in whole]
    for _ in range(draw.randint(1, 3)):
        frame = draw.choice(frames) if frames else bytearray()
        place = draw.randrange(len(frame) + 1)
        match draw.randrange(6):
            case 0 if place < len(frame):
                frame[place] = draw.randrange(256)
            case 1:
                del frame[place:]
            case 2:
                frame[place:place] = draw.randbytes(draw.randint(1, 9))
            case 3 if frames:
                frames.pop(draw.randrange(len(frames)))
            case 4:
                draw.shuffle(frames)
            case 5:
                frame[:] = draw.choice(
                    [b"", b"\xdc\xff\xff", b"\x91" * 5000, b"\xc1", b"\xdf\xff\xff\xff\xff", frame * 2]
                )
    return [bytes(frame) for frame in frames]


def test_damaged_frames_are_refused_or_whole() -> None:
    messages = [Result(group()), Heartbeat([("train", 1, 0)], 5, 0.5, 0.1), Request(2)]
    whole = [[bytes(frame) for frame in encode(message)] for message in messages]
    draw, num_refused = random.Random(0), 0
    for _ in range(20_000):
        frames = damaged(draw.choice(whole), draw)
        try:
            message = decode(frames, FromGenerator)
        except msgspec.DecodeError:
            num_refused += 1
            continue
        if isinstance(message, Result):
            got = message.group
            assert len(got.token_ids) == len(got.logprobs) == len(got.versions) == sum(got.lengths)
    assert num_refused > 10_000


def test_a_hub_outlives_damaged_frames(lock: Lock, hub: Hub) -> None:
    draw = random.Random(1)
    whole = [bytes(frame) for frame in encode(Result(group()))]
    with closing(link(hub, lock.key)) as generator:
        for _ in range(300):
            generator.socket.send_multipart(damaged(whole, draw) or [b""])
        generator.send(Request(9))
        heard: list = []
        while not heard or heard[-1] != Request(9):
            heard += [message for _, message, _ in wait_for(hub)]
    assert hub.malformed > 100


def test_a_group_whose_columns_differ_is_no_group() -> None:
    for words, changes in {
        r"group 7: \[5, 5, 2, 5\] tokens, not \[2, 3\]": {"versions": np.zeros(2, np.int32)},
        r"group 7: \[5, 5, 5, 5\] tokens, not \[7, -2\]": {"lengths": [7, -2]},
        "2 completions, 1 verdicts": {"verdicts": group().verdicts[:1]},
    }.items():
        with pytest.raises(msgspec.DecodeError, match=words):
            decode(encode(Result(msgspec.structs.replace(group(), **changes))), FromGenerator)
