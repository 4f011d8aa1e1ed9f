"""Two nodes on one machine: network namespaces, each with an address of its own, joined by a pair of virtual devices.

    with two_nodes() as nodes:
        started = [node.start(["python", "train.py", node.address, nodes[0].address]) for node in nodes]
        finish(started, timeout_s=60)

Linux alone, and only where the process may make namespaces; :func:`missing` says what stands in the way. Everything
that crosses goes over :data:`DEVICE`, so it can be counted and its rate limited. The machine's name leads nowhere
inside: torchrun has to be told each node's address, and which one holds the rendezvous.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

DEVICE = "link0"
"""The network device of each node that leads to the other: what GLOO_SOCKET_IFNAME has to name there."""

PORT = 29400


class Node:
    """One network namespace: its own addresses, ports, routes and loopback, the machine's files and cores."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address

    def start(
        self, command: Sequence[str], *, environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """A process inside; ``options`` are those of subprocess.Popen. gloo is told which device to use."""
        variables = {**os.environ, "GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1", **(environment or {})}
        inside = ["ip", "netns", "exec", self.name, *command]
        return subprocess.Popen(inside, env=variables, text=True, **options)

    def limit(self, rate: str | None) -> None:
        """Send at most ``rate`` (in tc's words, "100mbit") by a token bucket; None takes the limit away."""
        if "tbf" in _run("tc", "-n", self.name, "qdisc", "show", "dev", DEVICE):
            _run("tc", "-n", self.name, "qdisc", "del", "dev", DEVICE, "root")
        if rate is not None:
            bucket = ["tbf", "rate", rate, "burst", "32kbit", "latency", "400ms"]
            _run("tc", "-n", self.name, "qdisc", "add", "dev", DEVICE, "root", *bucket)

    @property
    def sent(self) -> int:
        """Bytes that this node has put on the link, headers included."""
        (device,) = json.loads(_run("ip", "-n", self.name, "-s", "-j", "link", "show", DEVICE))
        return int(device["stats64"]["tx"]["bytes"])


def missing() -> str:
    """Why there can be no namespaces here; empty where there can."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"the command {tool!r} (iproute2) is not installed"
    try:
        with two_nodes() as nodes:
            nodes[0].limit("100mbit")
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"
    return ""


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes that reach each other and nothing else; raises CalledProcessError where that is not allowed.

    Names hold the process id and addresses are inside the namespaces alone, so several processes may do this at once.
    """
    nodes = tuple(Node(f"msamp{os.getpid()}n{i}", f"10.213.0.{i + 1}") for i in range(2))
    first, second = nodes
    try:
        for node in nodes:
            _run("ip", "netns", "add", node.name)
        ends = ("netns", first.name, "type", "veth", "peer", "name", DEVICE, "netns", second.name)
        _run("ip", "link", "add", DEVICE, *ends)
        for node in nodes:
            _run("ip", "-n", node.name, "addr", "add", f"{node.address}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _run("ip", "-n", node.name, "link", "set", device, "up")
        yield first, second
    finally:
        for node in nodes:  # the pair of devices goes with its namespaces
            subprocess.run(["ip", "netns", "del", node.name], capture_output=True, check=False)


def finish(processes: Sequence[subprocess.Popen[str]], timeout_s: float) -> None:
    """Wait for all, ends the rest if one fails (RuntimeError) or is late (TimeoutExpired)."""
    try:
        for process in processes:
            if process.wait(timeout_s):
                raise RuntimeError(f"{process.args!r} ended with {process.returncode}: {_tail(process.stderr)}")
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # torchrun ends its workers
                process.wait()


def _tail(stream: IO[str] | None) -> str:
    return stream.read()[-2000:] if stream is not None and not stream.closed else "its output tells why"


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
