"""Network namespaces as hosts on one machine: each with its own address, name, /etc/hosts and link, which can be slow or cut.

Hosts hang on one bridge; nothing else of the machine changes. Needs root and Debian's iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

NET = "10.77.0"
_INSIDE = 'set -e; hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


def lacking() -> str:
    """Why there can't be such hosts here; "" where there can."""
    missing = [name for name in ("ip", "tc", "unshare") if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"no {', '.join(missing)} on this machine (Debian: apt-get install iproute2)"
    if os.geteuid() != 0:
        return "needs root: a host is a network namespace"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], check=False, capture_output=True)
    return "" if tried.returncode == 0 else "this machine allows no network namespaces"


_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Hosts:
    """Hosts a0, a1, ... that are there from its making to ``close``."""

    _made = 0

    def __init__(self, number: int) -> None:
        self.number = number
        Hosts._made += 1
        self._name = f"dl{os.getpid() % 100000}{Hosts._made}"  # with more letters, of the 15 that Linux allows
        self._folder = Path(tempfile.mkdtemp(prefix="dist-lora-hosts-"))
        lines = ["127.0.0.1 localhost", *(f"{self.address(i)} a{i}" for i in range(number))]
        (self._folder / "hosts").write_text("\n".join(lines) + "\n")
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        bridge = f"{self._name}br"
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
        for i in range(self.number):
            space = self._space(i)
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", self._link(i), "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "set", self._link(i), "master", bridge, "up")
            _run("ip", "-n", space, "link", "set", "lo", "up")
            _run("ip", "-n", space, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "eth0", "up")

    def _space(self, host: int) -> str:
        return f"{self._name}h{host}"

    def _link(self, host: int) -> str:
        return f"{self._name}v{host}"

    def address(self, host: int) -> str:
        """Of a host, on the bridge."""
        return f"{NET}.{host + 1}"

    def start(
        self, host: int, command: Sequence[object], *, environment: Mapping[str, str], told: Path
    ) -> subprocess.Popen[bytes]:
        """A command on a host; what it prints is added to the file ``told``. It is the process itself: end it by its number."""
        inside = ["unshare", "--uts", "--mount", "--propagation", "private", "bash", "-c", _INSIDE, "-", f"a{host}"]
        whole = ["ip", "netns", "exec", self._space(host), *inside, str(self._folder / "hosts"), *map(str, command)]
        with told.open("ab") as file:
            return subprocess.Popen(
                whole, env={**os.environ, "PATH": _PATH, "GLOO_SOCKET_IFNAME": "eth0", **environment},
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            )  # fmt: skip

    def allow_ssh(self) -> tuple[list[subprocess.Popen[bytes]], dict[str, str]]:
        """An sshd on each host, and the environment in which ``ssh`` reaches them by their names with a key of this test.

        The daemons are the caller's to end, by ``kill``.
        """
        key = self._folder / "key"
        for name in ("key", "host-key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._folder / name))
        shutil.copy(key.with_suffix(".pub"), self._folder / "authorized")
        daemon = self._folder / "sshd_config"
        daemon.write_text(
            f"HostKey {self._folder}/host-key\nAuthorizedKeysFile {self._folder}/authorized\nPidFile none\n"
            "StrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\nUsePAM no\n"
        )
        client = self._folder / "ssh_config"
        client.write_text(
            f"Host *\n  IdentityFile {key}\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )
        (self._folder / "bin").mkdir()
        wrapper = self._folder / "bin" / "ssh"  # ssh asks the list of users for its settings, not HOME
        wrapper.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {client} "$@"\n')
        wrapper.chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)
        sshd = shutil.which("sshd", path=_PATH)
        daemons = [
            self.start(host, [sshd, "-D", "-e", "-f", daemon], environment={}, told=self._folder / f"sshd-{host}")
            for host in range(self.number)
        ]
        return daemons, {"PATH": os.pathsep.join([str(wrapper.parent), _PATH])}

    def power_off(self, host: int) -> None:
        """End all processes of a host at once, and cut its cable first: nobody hears of their end."""
        self.cut(host)
        told = subprocess.run(
            ["ip", "netns", "pids", self._space(host)], capture_output=True, text=True, check=True, env={"PATH": _PATH}
        )
        for pid in told.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def fast(self, host: int) -> None:
        """Free a host's link of its limit."""
        for of, device in self._ends(host):
            _run("tc", *of, "qdisc", "del", "dev", device, "root")

    def _ends(self, host: int) -> list[tuple[tuple[str, ...], str]]:
        return [(("-n", self._space(host)), "eth0"), ((), self._link(host))]

    def slow(self, host: int, rate: str) -> None:
        """Limit a host's link both ways, as ``100mbit``."""
        for of, device in self._ends(host):
            _run(
                "tc",
                *of,
                "qdisc",
                "replace",
                "dev",
                device,
                "root",
                "tbf",
                "rate",
                rate,
                "burst",
                "128k",
                "latency",
                "100ms",
            )

    def cut(self, host: int) -> None:
        """Pull a host's cable."""
        _run("ip", "link", "set", self._link(host), "down")

    def mend(self, host: int) -> None:
        """Put it back."""
        _run("ip", "link", "set", self._link(host), "up")

    def close(self) -> None:
        """Take all hosts and the bridge away."""
        for i in range(self.number):
            subprocess.run(
                ["ip", "netns", "del", self._space(i)], check=False, capture_output=True, env={"PATH": _PATH}
            )
        subprocess.run(["ip", "link", "del", f"{self._name}br"], check=False, capture_output=True, env={"PATH": _PATH})
        shutil.rmtree(self._folder, ignore_errors=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": _PATH})
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


class Ranks:
    """One command as the ranks of a run over hosts, so many on each; ``close`` ends what is left of them."""

    def __init__(
        self,
        hosts: Hosts,
        command: Sequence[object],
        *,
        on_each: int,
        port: int,
        folder: Path,
        environment: Mapping[str, str],
    ) -> None:
        self.files = []
        self.processes = []
        for rank in range(hosts.number * on_each):
            launcher = {
                "RANK": str(rank), "WORLD_SIZE": str(hosts.number * on_each), "LOCAL_RANK": str(rank % on_each),
                "LOCAL_WORLD_SIZE": str(on_each), "MASTER_ADDR": hosts.address(0), "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            self.files.append(folder / f"told-{port}-{rank}")
            self.processes.append(
                hosts.start(rank // on_each, command, environment={**environment, **launcher}, told=self.files[-1])
            )

    def wait(self, timeout_s: float) -> list[int | None]:
        """The exit codes, in order of rank; None of one that has not ended in time."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        return [process.poll() for process in self.processes]

    def told(self) -> list[str]:
        """What each rank printed."""
        return [file.read_text(errors="replace") for file in self.files]

    def close(self) -> None:
        """End what is left."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()
