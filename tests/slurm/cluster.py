"""A real Slurm of several nodes on this one machine: munged, slurmctld and a slurmd for each node, all state in one folder.

Every slurmd lives in its own UTS and mount namespace, so that in a job's steps ``hostname`` is n1, n2, ... and /etc/hosts
names them, at loopback addresses of their own. Nothing of the machine is changed. Needs root, and the Debian packages
slurm-wlm, munge and iproute2 (Slurm 22.05 was seen to work).
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sinfo", "srun", "unshare")
FREEZER = Path("/sys/fs/cgroup/freezer/cgroup.procs")  # of cgroup v1: what proctrack/cgroup needs of this machine
ADDRESS = "127.0.77"

CONF = """
ClusterName=onebox
SlurmctldHost={control}({address}.254)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2
SlurmdParameters=config_overrides
MpiDefault=none
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=5
KillWait=10
InactiveLimit=0
MinJobAge=3600
GresTypes=gpu
PlugStackConfig={folder}/plugstack.conf
MailProg=/bin/true
"""


def lacking() -> str:
    """Why no such cluster can be started here; "" where it can."""
    missing = [name for name in NEEDED if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"no {', '.join(missing)} on this machine (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "needs root: a node is a namespace of its own"


_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Cluster:
    """Started by its making; ``close`` it. ``tracking``: cgroup, linuxproc or pgid, how Slurm finds a job's processes."""

    def __init__(self, num_nodes: int, *, cpus: int = 8, gpus: int = 4, tracking: str | None = None) -> None:
        self.nodes = [f"n{i + 1}" for i in range(num_nodes)]
        self.folder = Path(tempfile.mkdtemp(prefix="dist-lora-slurm-"))
        self.folder.chmod(0o755)  # munged refuses a socket below a folder that others may not enter
        for name in ("state", "spool", "log", "run", "munge", "gpu"):
            (self.folder / name).mkdir()
        self.tracking = tracking or ("cgroup" if os.access(FREEZER, os.W_OK) else "linuxproc")
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH}
        self._slurmds: dict[str, subprocess.Popen[bytes]] = {}
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._write_conf(cpus, gpus)
            self._start()
        except BaseException:
            self.close()
            raise

    def _write_conf(self, cpus: int, gpus: int) -> None:
        port, control = _free_ports(len(self.nodes) + 1), socket.gethostname().partition(".")[0]
        lines = CONF.format(
            control=control, address=ADDRESS, port=port, folder=self.folder, tracking=self.tracking
        ).splitlines()
        plugin = next(iter(Path("/usr/lib").rglob("auth_munge.so")), None)
        if plugin is not None:
            lines.append(f"PluginDir={plugin.parent}")
        hosts = ["127.0.0.1 localhost", f"{ADDRESS}.254 {control}"]
        gres = []
        for i, node in enumerate(self.nodes, 1):
            hosts.append(f"{ADDRESS}.{i} {node}")
            # A device by another name: slurmd wants one for each GPU that it is to hand out.
            gres.append(f"NodeName={node} Name=gpu File={self.folder}/gpu/gpu[0-{gpus - 1}]")
            lines.append(
                f"NodeName={node} NodeAddr={ADDRESS}.{i} NodeHostname={node} Port={port + i} CPUs={cpus} "
                f"RealMemory=100000 Gres=gpu:{gpus} State=UNKNOWN"
            )
        lines.append(
            f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP OverTimeLimit=0"
        )
        for i in range(gpus):
            os.mknod(self.folder / "gpu" / f"gpu{i}", 0o020666, os.makedev(1, 3))
        for name, text in (
            ("slurm.conf", lines), ("gres.conf", gres), ("hosts", hosts), ("plugstack.conf", []),
            ("cgroup.conf", ["CgroupMountpoint=/sys/fs/cgroup", "CgroupPlugin=autodetect"]),
        ):  # fmt: skip
            (self.folder / name).write_text("\n".join(text) + "\n")
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        (self.folder / "munge").chmod(0o700)

    def _start(self) -> None:
        run = self.folder / "run"
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={self.folder}/munge/key", f"--socket={run}/munge.sock",
            f"--pid-file={run}/munged.pid", f"--log-file={self.folder}/log/munged.log", f"--seed-file={self.folder}/munge/seed",
        )  # fmt: skip
        _until(lambda: (run / "munge.sock").exists(), "munged's socket", self.folder / "log")
        self._daemon("slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for_nodes(len(self.nodes))

    def _daemon(self, *command: str) -> None:
        with (self.folder / "log" / f"{command[0]}.out").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, or start it again."""
        inside = 'set -e; hostname "$2"; mount --bind "$1/hosts" /etc/hosts; exec slurmd -D -N "$2"'
        command = [
            "unshare",
            "--uts",
            "--mount",
            "--propagation",
            "private",
            "bash",
            "-c",
            inside,
            "-",
            str(self.folder),
            node,
        ]
        with (self.folder / "log" / f"{node}.out").open("ab") as log:
            self._slurmds[node] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def wait_for_nodes(self, num_idle: int) -> None:
        """Return when so many nodes wait for work."""
        _until(lambda: self._ask("sinfo", "-h", "-N", "-o", "%t").split().count("idle") >= num_idle, f"{num_idle} idle nodes",
               self.folder / "log")  # fmt: skip

    def pids_on(self, node: str) -> list[int]:
        """All processes in a node's namespace."""
        slurmd = self._slurmds[node]
        here = _namespace(slurmd.pid)
        return [pid for pid in _all_pids() if _namespace(pid) == here] if here else []

    def power_off(self, node: str) -> None:
        """End a node as a power cut does, as far as processes go: slurmd and all it started, at once."""
        for pid in self.pids_on(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._slurmds[node].wait()

    def submit(self, script: str, folder: Path) -> int:
        """``sbatch`` in a folder, after making the folder of the job's log; the job's number."""
        for log in re.findall(r'^#SBATCH --output="?([^"\n]+)', script, re.MULTILINE):
            (folder / log).parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["sbatch", "--parsable"],
            input=script,
            cwd=folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout.strip())

    def job(self, job: int | str) -> Mapping[str, str]:
        """What ``scontrol show job`` says, by name."""
        return dict(re.findall(r"(\w+)=(\S*)", self._ask("scontrol", "show", "job", str(job))))

    def wait(self, job: int | str, *, timeout_s: float) -> Mapping[str, str]:
        """What is said of a job when it has ended for good."""

        def ended() -> bool:
            return self.job(job).get("JobState") in (
                "COMPLETED",
                "FAILED",
                "CANCELLED",
                "TIMEOUT",
                "NODE_FAIL",
                "OUT_OF_MEMORY",
            )

        _until(ended, f"the end of job {job}", self.folder / "log", timeout_s=timeout_s)
        return self.job(job)

    def signal(self, job: int | str, *options: str) -> None:
        """``scancel`` with options."""
        self._ask("scancel", *options, str(job))

    def set_limit(self, job: int | str, minutes: str) -> None:
        """Give a job another time limit."""
        self._ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def ranks_on(self, node: str, folder: Path) -> list[int]:
        """The processes on a node that work in a folder."""
        found = []
        for pid in self.pids_on(node):
            with contextlib.suppress(OSError):
                if Path(os.readlink(f"/proc/{pid}/cwd")) == folder:
                    found.append(pid)
        return found

    def wait_for(self, is_so: Callable[[], bool], what: str, *, timeout_s: float) -> None:
        """Return as soon as something is so."""
        _until(is_so, what, self.folder / "log", timeout_s=timeout_s)

    def _ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout

    def close(self) -> None:
        """End all that was started, by its own number."""
        for node, slurmd in self._slurmds.items():
            if slurmd.poll() is None:
                self.power_off(node)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _until(is_so: Callable[[], bool], what: str, logs: Path, *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            tails = "\n".join(
                f"-- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in sorted(logs.iterdir())
            )
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s\n{tails}")
        time.sleep(0.1)


def _free_ports(number: int) -> int:
    """The first of so many neighbouring ports that nobody listens on."""
    while True:
        first = random.randrange(20000, 28000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + number):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def _namespace(pid: int) -> tuple[str, ...] | None:
    try:
        return tuple(os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("uts", "mnt"))
    except OSError:
        return None


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def script(*arguments: object, environment: Mapping[str, str] | None = None, folder: Path) -> str:
    """What ``dist-lora slurm ARGUMENTS`` prints, called in a folder."""
    command: Sequence[str] = [sys.executable, "-m", "dist_lora", "slurm", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
