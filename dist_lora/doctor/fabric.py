"""InfiniBand, RoCE and EFA adapters of a host, and whether the variables of NCCL and libfabric let NCCL use them.

No hint is given about hardware that isn't there. Sources: NCCL 2.28's and aws-ofi-nccl 1.17's lists of variables.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dist_lora.doctor.findings import Answer, Severity
from dist_lora.text import count, first_few, gib

ADAPTERS = Path("sys/class/infiniband")
ABOUT = "fabric"  # adapters alone are LoRA's
ENOUGH_LOCKED_BYTES = 2**34  # sites that limit it at all leave 64 KiB to 8 MiB
# Where AWS's installers put the plugin by which NCCL uses EFA, and where the loader looks anyway.
PLUGIN_FOLDERS = ("opt/amazon/ofi-nccl/lib", "opt/amazon/ofi-nccl/lib64", "opt/amazon/ofi-nccl/lib/x86_64-linux-gnu",
                  "opt/aws-ofi-nccl/lib", "opt/aws-ofi-nccl/install/lib")  # fmt: skip
LOADER_FOLDERS = (
    "lib64",
    "usr/lib",
    "usr/lib64",
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/local/lib",
)


@dataclass(frozen=True)
class Port:
    """A port of an adapter; ``kind`` is InfiniBand, RoCE or EFA."""

    adapter: str
    number: int
    kind: str
    is_active: bool
    rate: str

    def __str__(self) -> str:
        return f"{self.adapter}:{self.number}"


def read_ports(root: Path = Path("/")) -> list[Port]:
    """The ports of all adapters, from the kernel's files; empty without any."""
    ports = []
    for adapter in sorted((root / ADAPTERS).glob("*")):
        is_efa = (adapter / "device" / "driver").resolve().name == "efa"
        for port in sorted((adapter / "ports").glob("*")):
            layer = _text(port / "link_layer")
            kind = "EFA" if is_efa else "RoCE" if layer == "Ethernet" else "InfiniBand"
            is_active = "ACTIVE" in _text(port / "state")
            ports.append(Port(adapter.name, int(port.name), kind, is_active, _text(port / "rate")))
    return ports


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def examine_fabric(
    environment: Mapping[str, str], *, num_nodes: int, root: Path = Path("/"), locked_bytes: int | None = None
) -> Answer:
    """Whether NCCL can use this host's adapters, as its variables are set.

    Args:
        num_nodes: of this world; on one, nothing crosses the adapters, and what would be a warning is a note.
        locked_bytes: how much memory a process may lock, negative for any; None asks the kernel.
    """
    ports = read_ports(root)
    active = [port for port in ports if port.is_active]
    answer = Answer(facts={"ports": [asdict(port) for port in ports]})
    severity: Severity = "warning" if num_nodes > 1 else "note"
    for name, text, todo in _mismatches(environment, ports):
        answer.add("fault" if num_nodes > 1 else "warning", ABOUT, f"{name} {text}", todo)
    if not active:
        if ports:
            answer.add(severity, ABOUT, f"none of {count(len(ports), 'port')} is active: {first_few(list(map(str, ports)))}",
                       "Check cables, and the subnet manager of an InfiniBand network (ibstat): NCCL uses TCP otherwise.")  # fmt: skip
        return answer
    by_kind = {kind: [port for port in active if port.kind == kind] for kind in ("InfiniBand", "RoCE", "EFA")}
    for kind, same in by_kind.items():
        if same:
            rates = ", ".join(dict.fromkeys(port.rate for port in same if port.rate))
            answer.add("ok", ABOUT, f"{kind}: {first_few(list(map(str, same)))}{rates and f' ({rates})'}")
    down = [str(port) for port in ports if not port.is_active]
    if down:
        answer.add("note", ABOUT, f"not active: {first_few(down)}")
    hints = [*_of_any(environment, root, locked_bytes), *(_of_efa(environment, root) if by_kind["EFA"] else ())]
    if by_kind["InfiniBand"] or by_kind["RoCE"]:
        hints += _of_verbs(environment, by_kind)
    for text, todo in hints:
        answer.add(severity, ABOUT, text, todo)
    return answer


def _mismatches(environment: Mapping[str, str], ports: Sequence[Port]) -> Iterator[tuple[str, str, str]]:
    """Variables that name what isn't here: with them NCCL finds no network, or takes TCP."""
    wanted = environment.get("NCCL_IB_HCA", "")
    names = list(dict.fromkeys(port.adapter for port in ports))
    if wanted and not any(_is_meant(wanted, port) for port in ports):
        todo = "Set it to one of them, or unset it: NCCL then takes all."
        yield "NCCL_IB_HCA", f"is {wanted}, but the adapters here are {', '.join(names) or 'none'}", todo
    if environment.get("FI_PROVIDER") == "efa" and not any(port.kind == "EFA" for port in ports):
        yield "FI_PROVIDER", "is efa, but there is no EFA adapter here", "Unset it, or start on nodes with EFA."


def _is_meant(wanted: str, port: Port) -> bool:
    """Whether NCCL_IB_HCA allows a port: prefixes of adapters, perhaps with a port; ``=`` whole names, ``^`` all others."""
    excludes, is_exact = wanted.startswith("^"), wanted.removeprefix("^").startswith("=")
    is_named = False
    for entry in wanted.removeprefix("^").removeprefix("=").split(","):
        name, _, number = entry.partition(":")
        matches = port.adapter == name if is_exact else bool(name) and port.adapter.startswith(name)
        is_named |= matches and number in ("", str(port.number))
    return is_named is not excludes


def _of_any(environment: Mapping[str, str], root: Path, locked_bytes: int | None) -> Iterator[tuple[str, str]]:
    net = environment.get("NCCL_NET", "")
    if net.lower() == "socket":
        yield "NCCL_NET is Socket: NCCL uses TCP, and not these adapters", "Unset NCCL_NET."
    if not any((root / "dev/infiniband").glob("uverbs*")):
        yield (
            "/dev/infiniband isn't here, so no process can open these adapters",
            "Give the devices to the container: docker run --device=/dev/infiniband, in Kubernetes the RDMA or EFA device plugin.",
        )
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if locked_bytes is None else locked_bytes
    if 0 <= limit < ENOUGH_LOCKED_BYTES:  # no limit is -1
        yield (
            f"a process may lock {gib(limit)} of memory, and adapters need the buffers of NCCL locked",
            "Set ulimit -l unlimited (Slurm: LimitMEMLOCK=infinity for slurmd; docker run --ulimit memlock=-1).",
        )


def _of_verbs(environment: Mapping[str, str], by_kind: Mapping[str, Sequence[Port]]) -> Iterator[tuple[str, str]]:
    if environment.get("NCCL_IB_DISABLE", "0") not in ("", "0"):
        yield "NCCL_IB_DISABLE is set: NCCL uses TCP, and not these adapters", "Unset NCCL_IB_DISABLE."
    if by_kind["InfiniBand"] and by_kind["RoCE"] and not environment.get("NCCL_IB_HCA"):
        names = ",".join(dict.fromkeys(port.adapter for port in by_kind["InfiniBand"]))
        yield (
            "adapters of InfiniBand and of Ethernet are active, and NCCL may mix them",
            f"If the Ethernet ones aren't for NCCL, name the others: NCCL_IB_HCA=={names}",
        )


def _of_efa(environment: Mapping[str, str], root: Path) -> Iterator[tuple[str, str]]:
    provider = environment.get("FI_PROVIDER")
    if provider not in (None, "", "efa"):
        yield f"FI_PROVIDER is {provider}: libfabric doesn't use EFA", "Set FI_PROVIDER=efa, or unset it."
    if environment.get("FI_EFA_USE_DEVICE_RDMA") == "0":
        yield (
            "FI_EFA_USE_DEVICE_RDMA is 0: data goes through host memory",
            "Set FI_EFA_USE_DEVICE_RDMA=1 (libfabric from 1.18 on does it by itself where the adapter can).",
        )
    plugin = environment.get("NCCL_NET_PLUGIN", "")
    if plugin == "none":
        yield "NCCL_NET_PLUGIN is none: without its plugin NCCL can't use EFA", "Unset NCCL_NET_PLUGIN."
        return
    in_path = [Path(folder) for folder in environment.get("LD_LIBRARY_PATH", "").split(":") if folder]
    if any(map(_has_plugin, [*in_path, *_loader_folders(root)])) or Path(plugin).is_file():
        return
    installed = next((root / folder for folder in PLUGIN_FOLDERS if _has_plugin(root / folder)), None)
    if installed is not None:
        yield (
            f"NCCL's plugin for EFA is in {installed}, where the loader doesn't look: NCCL uses TCP",
            f"Add it: LD_LIBRARY_PATH={installed}:$LD_LIBRARY_PATH",
        )
    else:
        yield (
            "NCCL's plugin for EFA (libnccl-net.so of aws-ofi-nccl) isn't found: NCCL uses TCP",
            "Install it (it comes with the EFA installer and AWS's images), and name its folder in LD_LIBRARY_PATH.",
        )


def _loader_folders(root: Path) -> Iterable[Path]:
    configured = [
        root / line.strip().lstrip("/")
        for file in sorted((root / "etc/ld.so.conf.d").glob("*.conf"))
        for line in _text(file).splitlines()
        if line.strip().startswith("/")
    ]
    return [*configured, *(root / folder for folder in LOADER_FOLDERS)]


def _has_plugin(folder: Path) -> bool:
    return any(folder.glob("libnccl-net*.so*"))
