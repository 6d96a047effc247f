"""How many rollouts does the coordinator's socket take in? python bench/stream.py [--quick]

stream    groups of eight completions from 1, 8 and 64 generators, each a connection, through `Link` and `Hub`,
          encrypted and in plain: rollouts and bytes a second, decoded into arrays and acknowledged
peers     the same groups pickled over ZeroMQ, and as JSON over HTTP (aiohttp, one connection a generator)
turn      99th percentile of the milliseconds that one turn of the receiving loop takes, that is how long a message may
          wait for it, while 512 rollouts are under way

The senders are one process that never waits for more than its window of acknowledgements, the receiver is another, so
on two cores neither takes the other's time.
"""

import argparse
import asyncio
import json
import logging
import multiprocessing
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import results  # noqa: E402
from engine.keys import JoinKey, Lock  # noqa: E402
from engine.schema import Ack, FromGenerator, Group, Result, ToGenerator  # noqa: E402
from engine.stream import Hub, Link  # noqa: E402
from rewards.verdict import Verdict  # noqa: E402

SAMPLES, LENGTH, PROMPT = 8, 1024, 256
UNDER_WAY = 512 // SAMPLES  # groups sent and not acknowledged, of all generators together
SECONDS, QUICK_SECONDS = 3.0, 1.0
ROUNDS, QUICK_ROUNDS = 3, 1
_spawn = multiprocessing.get_context("spawn")


def group() -> Group:
    draw, num = np.random.default_rng(0), SAMPLES * LENGTH
    return Group(
        kind="train",
        group_id=0,
        attempt=0,
        incarnation=0,
        generator="g",
        domain="bench",
        lease_version=0,
        temperature=1.0,
        prompt_ids=draw.integers(0, 150_000, PROMPT).astype(np.int32),
        lengths=[LENGTH] * SAMPLES,
        finish=["stop"] * SAMPLES,
        verdicts=[Verdict.of(1.0)] * SAMPLES,
        token_ids=draw.integers(0, 150_000, num).astype(np.int32),
        logprobs=-draw.random(num).astype(np.float32),
        versions=np.zeros(num, np.int32),
        loss_mask=np.ones(num, np.uint8),
    )


def plain(given: Group) -> dict[str, Any]:
    """As lists and numbers, for JSON."""
    fields = msgspec.structs.asdict(given)
    fields["verdicts"] = [msgspec.structs.asdict(verdict) for verdict in given.verdicts]
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()}


# ---- the senders' process --------------------------------------------------------------------------------------


def send_stream(port: int, num: int, key: JoinKey | None) -> None:
    """`num` generators, together with at most `UNDER_WAY` groups that are not acknowledged."""
    links = [Link(ToGenerator, connect=f"tcp://127.0.0.1:{port}", identity=f"g{i}", key=key) for i in range(num)]
    result, poller = Result(group()), zmq.Poller()
    for link in links:
        poller.register(link.socket, zmq.POLLIN)
    by_socket = {link.socket: link for link in links}
    for number in range(UNDER_WAY):
        links[number % num].send(result)
    while True:
        for socket, _ in poller.poll():
            for _ in by_socket[socket].drain():
                by_socket[socket].send(result)


def send_pickled(port: int, num: int, key: None) -> None:
    context = zmq.Context()
    sockets, poller, given = [], zmq.Poller(), group()
    for _ in range(num):
        socket = context.socket(zmq.DEALER)
        socket.connect(f"tcp://127.0.0.1:{port}")
        poller.register(socket, zmq.POLLIN)
        sockets.append(socket)
    for number in range(UNDER_WAY):
        sockets[number % num].send(pickle.dumps(given))
    while True:
        for socket, _ in poller.poll():
            socket.recv()
            socket.send(pickle.dumps(given))


def send_json(port: int, num: int, key: None) -> None:
    import aiohttp

    async def generator(session: aiohttp.ClientSession, given: Group) -> None:
        while True:
            body = json.dumps(plain(given))
            async with session.post(f"http://127.0.0.1:{port}/", data=body) as answer:
                await answer.read()

    async def main() -> None:
        given = group()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(generator(session, given) for _ in range(max(num, min(UNDER_WAY, 8 * num)))))

    asyncio.run(main())


# ---- the receivers ---------------------------------------------------------------------------------------------

Counted = tuple[int, float, list[float]]  # groups, seconds, seconds of each turn


def receive_stream(num: int, seconds: float, encrypted: bool) -> Counted:
    lock = Lock() if encrypted else None
    hub = Hub("127.0.0.1", 0, FromGenerator, lock)
    with sender(send_stream, hub.port, num, lock.key if lock else None):

        def turn() -> int:
            taken = 0
            for peer, message, _ in hub.drain():
                hub.send(peer, Ack(message.group.kind, message.group.group_id, message.group.attempt))
                taken += 1
            return taken

        counted = count(hub.socket, turn, seconds)
    if lock is not None:
        lock.close()
    hub.close()
    return counted


def receive_pickled(num: int, seconds: float) -> Counted:
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    with sender(send_pickled, port, num, None):

        def turn() -> int:
            peer, data = socket.recv_multipart()
            assert pickle.loads(data).group_id == 0
            socket.send_multipart([peer, b""])
            return 1

        counted = count(socket, turn, seconds)
    socket.close(0)
    return counted


def receive_json(num: int, seconds: float) -> Counted:
    from aiohttp import web

    arrived: list[float] = []

    async def take(request: web.Request) -> web.Response:
        fields = json.loads(await request.read())
        np.array(fields["token_ids"], np.int32)
        np.array(fields["logprobs"], np.float32)
        arrived.append(time.perf_counter())
        return web.Response()

    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # of senders that are killed

    async def main() -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/", take)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        with sender(send_json, port, num, None):
            while not arrived:
                await asyncio.sleep(0.01)
            await asyncio.sleep(seconds)
        await runner.cleanup()

    asyncio.run(main())
    return len(arrived) - 1, arrived[-1] - arrived[0], []


class sender:
    """The senders' process, while the block lasts."""

    def __init__(self, target: Callable[..., None], *arguments: Any):
        self._process = _spawn.Process(target=target, args=arguments, daemon=True)

    def __enter__(self) -> None:
        self._process.start()

    def __exit__(self, *failure: object) -> None:
        self._process.kill()
        self._process.join()


def count(socket: zmq.Socket, turn: Callable[[], int], seconds: float) -> Counted:
    """Turns from the first message on, for `seconds`; to wait for a message is part of none."""
    socket.poll()
    groups, turns, begin = 0, [], time.perf_counter()
    now = begin
    while now - begin < seconds:
        socket.poll()
        woken = time.perf_counter()
        groups += turn()
        now = time.perf_counter()
        turns.append(now - woken)
    return groups, now - begin, turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    seconds, rounds = (QUICK_SECONDS, QUICK_ROUNDS) if quick else (SECONDS, ROUNDS)
    size = sum(value.nbytes for value in msgspec.structs.asdict(group()).values() if isinstance(value, np.ndarray))
    rows = []
    for num in (1, 8, 64):
        ways: dict[str, Callable[[], Counted]] = {
            "encrypted": lambda num=num: receive_stream(num, seconds, True),
            "plain": lambda num=num: receive_stream(num, seconds, False),
            "pickle over ZeroMQ": lambda num=num: receive_pickled(num, seconds),
            "JSON over HTTP": lambda num=num: receive_json(num, seconds),
        }
        rates: dict[str, list[float]] = {way: [] for way in ways}
        slow: list[float] = []
        for _ in range(rounds):
            for way, run in ways.items():
                groups, took, turns = run()
                rates[way].append(groups * SAMPLES / took)
                if way == "encrypted":
                    slow.append(float(np.percentile(turns, 99)))
        case = f"{num} generators"
        for ours in ("plain", "encrypted"):
            for way in ("pickle over ZeroMQ", "JSON over HTTP"):
                rows.append(results.row(f"{case}, {ours}", "rollouts/s", rates[ours], rates[way], way, None))
        megabytes = {way: [rate / SAMPLES * size / 1e6 for rate in rates[way]] for way in ("encrypted", "plain")}
        rows.append(results.row(case, "MB/s", megabytes["encrypted"], megabytes["plain"], "plain", None))
        bound = [1 / 0.020] * rounds
        rows.append(results.row(case, "1/p99 turn", [1 / p99 for p99 in slow], bound, "1 / 20 ms", 1.0))
    results.keep("stream", "cpu", rows, quick=quick, group_bytes=size)


if __name__ == "__main__":
    main()
