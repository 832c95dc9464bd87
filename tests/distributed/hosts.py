"""Two "hosts" on this machine: network namespaces with an address, a name and a process list of launchers each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.launch import ROOT, environment

_PORT = 29400
_ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
# of its own: the host's name and the file that resolves it (torchrun looks its own name up)
_ENTER = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'


@dataclass(frozen=True)
class Host:
    """A namespace with one interface; host a is where the ranks meet."""

    letter: str
    namespace: str
    interface: str
    names: Path

    def start_training(self, folder: Path, max_restarts: int, **options: object) -> subprocess.Popen[str]:
        """One rank of tests/distributed/trainer_worker.py here, of two; what it prints goes to `folder`/log-a or -b."""
        folder.mkdir(parents=True, exist_ok=True)
        launcher = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
            "--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint", f"{_ADDRESSES['a']}:{_PORT}",
            "--local-addr", _ADDRESSES[self.letter], "--max-restarts", str(max_restarts),
            "-m", "tests.distributed.trainer_worker", str(folder), json.dumps(options),
        ]  # fmt: skip
        inside = ["unshare", "--uts", "--mount", "sh", "-c", _ENTER, f"host-{self.letter}", str(self.names), *launcher]
        with (folder / f"log-{self.letter}").open("a") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *inside],
                cwd=ROOT, env=environment(GLOO_SOCKET_IFNAME=self.interface, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
                stdout=log, stderr=log, text=True,
            )  # fmt: skip

    def cut_off(self) -> None:
        """Packets are lost without a word, as with a pulled cable."""
        ip("-n", self.namespace, "link", "set", self.interface, "down")

    def bring_back(self) -> None:
        ip("-n", self.namespace, "link", "set", self.interface, "up")

    def remove(self) -> None:
        subprocess.run(["ip", "netns", "del", self.namespace], capture_output=True, check=False)


def ip(*words: str) -> None:
    """Run `ip`; raises with its message."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def make_hosts(folder: Path) -> dict[str, Host]:
    """Hosts a and b, joined by a cable. Raises OSError where this process may not make network namespaces."""
    names = folder / "hosts"
    lines = ["127.0.0.1 localhost", *(f"{address} host-{letter}" for letter, address in _ADDRESSES.items())]
    names.write_text("\n".join(lines) + "\n")
    hosts = {
        letter: Host(letter, f"qwen2vl-{os.getpid()}-{letter}", f"qv{os.getpid()}{letter}", names) for letter in "ab"
    }
    try:
        for host in hosts.values():
            ip("netns", "add", host.namespace)
            ip("-n", host.namespace, "link", "set", "lo", "up")
        a, b = hosts["a"], hosts["b"]
        cable = ("link", "add", a.interface, "netns", a.namespace, "type", "veth", "peer", "name", b.interface)
        ip(*cable, "netns", b.namespace)
        for letter, host in hosts.items():
            ip("-n", host.namespace, "addr", "add", f"{_ADDRESSES[letter]}/24", "dev", host.interface)
            ip("-n", host.namespace, "link", "set", host.interface, "up")
    except OSError:
        for host in hosts.values():
            host.remove()
        raise
    return hosts
