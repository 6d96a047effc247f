"""Hosts made of network namespaces: each has one link, `eth0`, to a switch, which can be shaped and cut."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NETWORK = "10.231.7"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Host:
    def __init__(self, name: str, number: int):
        self.name, self.address = name, f"{NETWORK}.{number}"
        self.before = ("ip", "netns", "exec", name)  # runs a command on it

    def shape(self, rate: str) -> None:
        """Bounds what it sends and gets, as in "100mbit"."""
        for place, device in ((self.name, "eth0"), (SWITCH, self.name)):
            limit = ("tbf", "rate", rate, "burst", "256kb", "latency", "100ms")
            subprocess.run(["tc", "-n", place, "qdisc", "add", "dev", device, "root", *limit], check=True)

    def cut(self) -> None:
        ip("-n", SWITCH, "link", "set", self.name, "down")

    def mend(self) -> None:
        ip("-n", SWITCH, "link", "set", self.name, "up")


SWITCH = "leeway-switch"


@contextmanager
def hosts(*names: str) -> Iterator[list[Host]]:
    """Skips the test where this process may not make namespaces."""
    made = [SWITCH, *names]
    try:
        for name in made:
            try:
                ip("netns", "add", name)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', '') or error}")
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", SWITCH, "link", "add", "bridge", "type", "bridge")
        ip("-n", SWITCH, "link", "set", "bridge", "up")
        found = [Host(name, number) for number, name in enumerate(names, start=1)]
        for host in found:
            ip("-n", host.name, "link", "add", "eth0", "type", "veth", "peer", "name", host.name, "netns", SWITCH)
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
            ip("-n", SWITCH, "link", "set", host.name, "master", "bridge")
            host.mend()
        yield found
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
