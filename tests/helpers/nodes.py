"""Two hosts: network namespaces joined by a cable, or this host twice where the user may not make them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Node(NamedTuple):
    """A host. What runs on it begins with `prefix`."""

    rank: int
    address: str
    interface: str
    prefix: tuple[str, ...] = ()

    def start(self, command: list[str], log: Path, **environment: str) -> subprocess.Popen:
        """Starts a program on this host."""
        with log.open("a") as file:
            return subprocess.Popen(
                [*self.prefix, *command],
                env={**os.environ, "GLOO_SOCKET_IFNAME": self.interface, **environment},
                stdout=file,
                stderr=file,
            )


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def two_nodes() -> Iterator[list[Node]]:
    """Two hosts for a while; processes that are still there at the end are those of the caller."""
    names = [f"imagen-{os.getpid()}-{rank}" for rank in range(2)]
    nodes = [
        Node(rank, f"10.201.0.{rank + 1}", f"cable{rank}", ("ip", "netns", "exec", name))
        for rank, name in enumerate(names)
    ]
    try:
        try:
            if shutil.which("ip") is None:
                raise OSError("there is no program `ip`")
            for name in names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ends = [("name", node.interface, "netns", name) for node, name in zip(nodes, names)]
            ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for node, name in zip(nodes, names):
                ip("-n", name, "address", "add", f"{node.address}/24", "dev", node.interface)
                ip("-n", name, "link", "set", node.interface, "up")
        except (OSError, subprocess.CalledProcessError):
            nodes = [Node(rank, "127.0.0.1", "lo") for rank in range(2)]
        yield nodes
    finally:
        for name in names:
            if Path("/var/run/netns", name).exists():
                subprocess.run(["ip", "netns", "delete", name], check=True)


def torchrun(node: Node, endpoint: str, restarts: int, *program: object) -> list[str]:
    """The command of a host's agent, with one worker; the first host keeps the rendezvous."""
    options = {
        "--nnodes": 2,
        "--nproc-per-node": 1,
        "--max-restarts": restarts,
        "--monitor-interval": 0.1,
        "--rdzv-backend": "c10d",
        "--rdzv-id": "two-nodes",
        "--rdzv-endpoint": endpoint,
        "--rdzv-conf": f"is_host={1 - node.rank}",
        "--local-addr": node.address,
    }
    flags = [str(part) for option in options.items() for part in option]
    return [sys.executable, "-m", "torch.distributed.run", *flags, *map(str, program)]
