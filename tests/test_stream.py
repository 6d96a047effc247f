import os
import time

import numpy as np
import pytest
import zmq

from engine.schema import (
    SCHEMA_VERSION,
    Beat,
    Began,
    FromGenerator,
    Group,
    Hello,
    Request,
    Result,
    ToGenerator,
    Trained,
)
from engine.stream import HEAD, MAGIC, Hub, Link, Pump, Silence, Tap, read_tap
from engine.wire import decode, encode
from rewards.verdict import Verdict


def group(number: int = 7, tokens: int = 5) -> Group:
    return Group(
        kind="train",
        group_id=number,
        attempt=0,
        incarnation=1,
        generator="g",
        domain="sum",
        lease_version=3,
        temperature=1.0,
        prompt_ids=np.arange(4, dtype=np.int32),
        lengths=[2, tokens - 2],
        finish=["stop", "length"],
        verdicts=[Verdict.of(1.0), Verdict.failed("hung")],
        token_ids=np.arange(tokens, dtype=np.int32),
        logprobs=-np.arange(tokens, dtype=np.float32),
        versions=np.full(tokens, 3, np.int32),
        loss_mask=np.ones(tokens, np.uint8),
    )


def wait_for(hub: Hub, seconds: float = 5.0) -> list:
    heard: list = []
    until = time.monotonic() + seconds
    while not heard and time.monotonic() < until:
        Pump({hub.socket: lambda: heard.extend(hub.drain())}).wait(until)
    return heard


def test_arrays_travel_beside_the_header_and_come_back_equal():
    frames = encode(Result(group()))
    assert len(frames) == 1 + 5  # header, prompt, tokens, log-probabilities, versions, mask
    back = decode([bytes(frame) for frame in frames], FromGenerator).group
    assert back.token_ids.dtype == np.int32 and back.logprobs.tolist() == [0, -1, -2, -3, -4]
    assert back.verdicts[1].error == "hung" and back.first_version == 3 and not back.token_ids.flags.writeable


def test_what_cannot_travel_is_refused_by_name():
    with pytest.raises(TypeError, match="float16"):
        encode(np.zeros(2, np.float16))
    with pytest.raises(TypeError, match="a complex cannot travel"):
        encode([1j])


def test_hub_and_link_exchange_messages_both_ways():
    hub = Hub("127.0.0.1", 0, FromGenerator)
    link = Link(ToGenerator, connect=f"tcp://127.0.0.1:{hub.port}", identity="g0")
    link.send(Hello(SCHEMA_VERSION, "g0", "host", 1))
    [(peer, message, _)] = wait_for(hub)
    assert (peer, message.generator) == ("g0", "g0")
    hub.send("g0", Beat())
    assert link.receive(5.0, "test") == Beat()
    hub.close()
    link.close()


def test_a_malformed_message_is_counted_and_dropped():
    hub = Hub("127.0.0.1", 0, FromGenerator)
    link = Link(ToGenerator, connect=f"tcp://127.0.0.1:{hub.port}", identity="g0")
    link.socket.send_multipart([b"\xc1 nonsense"])
    bad = encode(Result(group()))
    link.socket.send_multipart(bad[:3])  # frames are missing
    link.send(Request(4))
    heard = wait_for(hub) or wait_for(hub)
    while hub.malformed < 2 or not heard:
        heard += wait_for(hub)
    assert [message for _, message, _ in heard] == [Request(4)] and hub.malformed == 2
    hub.close()
    link.close()


def test_a_taken_port_is_an_error_and_not_a_wait():
    hub = Hub("127.0.0.1", 0, FromGenerator)
    with pytest.raises(zmq.ZMQError):
        Hub("127.0.0.1", hub.port, FromGenerator)
    hub.close()


def test_silence_names_the_phase():
    link = Link(ToGenerator)
    with pytest.raises(Silence, match="take at version 3: no answer for 0.05 s"):
        link.receive(0.05, "take at version 3")
    link.close()


def test_sending_to_nobody_is_an_error_and_no_wait():
    link = Link(ToGenerator)
    with pytest.raises(Silence, match="nobody is connected"):
        link.send(Beat())
    link.close()


def test_a_watched_event_ends_the_wait_with_its_own_error():
    class Event:
        fd, _write = os.pipe()

        def error(self) -> Exception:
            return KeyError("it died")

    event = Event()
    os.write(event._write, b".")
    link = Link(ToGenerator)
    with pytest.raises(KeyError, match="it died"):
        link.receive(30.0, "test", [event])
    peer = Link(ToGenerator, connect=link.address)
    peer.send(Beat())
    assert link.receive(30.0, "test", [event]) == Beat(), "what it said before is not lost"
    with pytest.raises(KeyError, match="it died"):
        link.receive(30.0, "test", [event])
    peer.close()
    link.close()


def test_the_tap_gives_back_what_it_was_given_and_survives_a_torn_end(tmp_path):
    path = tmp_path / "0000.tap"
    tap = Tap(path)
    records = [Began(0, 0, "", ""), Result(group(1)), Trained(1, [1], "trained"), Result(group(2))]
    for record in records:
        tap.append(encode(record))
    tap.close()
    back = list(read_tap(path))
    assert [type(record).__name__ for record in back] == ["Began", "Result", "Trained", "Result"]
    assert isinstance(back[3], Result) and back[3].group.group_id == 2
    assert back[3].group.logprobs.tolist() == [0, -1, -2, -3, -4]
    whole = path.read_bytes()
    for torn in (len(whole) - 1, len(whole) - 20, len(whole) - 200):
        path.write_bytes(whole[:torn])
        assert len(list(read_tap(path))) == 3


def test_a_tap_of_another_schema_is_refused(tmp_path):
    path = tmp_path / "0000.tap"
    path.write_bytes(HEAD.pack(MAGIC | SCHEMA_VERSION + 1, 0))
    with pytest.raises(ValueError, match=f"schema version {SCHEMA_VERSION + 1}, this program has {SCHEMA_VERSION}"):
        list(read_tap(path))
