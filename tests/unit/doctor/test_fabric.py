"""What the doctor says of InfiniBand, RoCE and EFA: from made-up kernel files, and nothing where there is no such hardware."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lora.doctor.fabric import examine_fabric
from dist_lora.doctor.findings import Answer


def host(root: Path, *adapters: str) -> Path:
    """Adapters, each as ``name kind state``."""
    for name, kind, state in map(str.split, adapters):
        port = root / "sys/class/infiniband" / name / "ports/1"
        port.mkdir(parents=True)
        layer = {"InfiniBand": "InfiniBand", "RoCE": "Ethernet", "EFA": "Unspecified"}[kind]
        (port / "link_layer").write_text(f"{layer}\n")
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
        driver = root / "drivers" / ("efa" if kind == "EFA" else "mlx5_core")
        driver.mkdir(parents=True, exist_ok=True)
        (port.parents[1] / "device").mkdir()
        (port.parents[1] / "device" / "driver").symlink_to(driver)
    (root / "dev/infiniband").mkdir(parents=True)
    (root / "dev/infiniband/uverbs0").touch()
    return root


def examine(root: Path, *, num_nodes: int = 2, locked_bytes: int = -1, **environment: str) -> Answer:
    return examine_fabric(environment, num_nodes=num_nodes, root=root, locked_bytes=locked_bytes)


def told(answer: Answer) -> list[tuple[str, str]]:
    """All but what is in order; each says what to do."""
    assert all(finding.todo or finding.severity in ("ok", "note") for finding in answer.findings)
    return [(finding.severity, finding.text) for finding in answer.findings if finding.severity != "ok"]


def test_without_such_hardware_nothing_is_said(tmp_path: Path) -> None:
    assert examine(tmp_path, locked_bytes=2**16, NCCL_IB_DISABLE="1", NCCL_NET="Socket").findings == []


def test_active_adapters_are_listed_with_their_rate(tmp_path: Path) -> None:
    answer = examine(
        host(tmp_path, "mlx5_0 InfiniBand 4:ACTIVE", "mlx5_1 InfiniBand 4:ACTIVE", "mlx5_2 InfiniBand 1:DOWN")
    )
    assert [finding.text for finding in answer.findings] == [
        "InfiniBand: mlx5_0:1, mlx5_1:1 (400 Gb/sec (4X NDR))",
        "not active: mlx5_2:1",
    ]
    assert [port["is_active"] for port in answer.facts["ports"]] == [True, True, False]


def test_adapters_without_an_active_port_are_reported(tmp_path: Path) -> None:
    assert told(examine(host(tmp_path, "mlx5_0 InfiniBand 1:DOWN"))) == [
        ("warning", "none of 1 port is active: mlx5_0:1")
    ]


@pytest.mark.parametrize(
    ("wanted", "is_there"),
    [
        ("mlx5", True),
        ("mlx5_0:1,mlx5_9", True),
        ("mlx5_0:2", False),
        ("=mlx5", False),
        ("=mlx5_1", True),
        ("^mlx5_0", True),
        ("^=mlx5", True),
        ("^mlx5", False),
        ("ibp", False),
    ],
)
def test_a_variable_that_names_no_adapter_here_is_a_fault(tmp_path: Path, wanted: str, is_there: bool) -> None:
    answer = examine(host(tmp_path, "mlx5_0 InfiniBand 4:ACTIVE", "mlx5_1 InfiniBand 4:ACTIVE"), NCCL_IB_HCA=wanted)
    expected = f"NCCL_IB_HCA is {wanted}, but the adapters here are mlx5_0, mlx5_1"
    assert told(answer) == ([] if is_there else [("fault", expected)])


def test_variables_that_name_adapters_where_there_are_none_are_faults(tmp_path: Path) -> None:
    texts = told(examine(tmp_path, NCCL_IB_HCA="mlx5", FI_PROVIDER="efa"))
    assert texts == [
        ("fault", "NCCL_IB_HCA is mlx5, but the adapters here are none"),
        ("fault", "FI_PROVIDER is efa, but there is no EFA adapter here"),
    ]


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"NCCL_IB_DISABLE": "1"}, "NCCL_IB_DISABLE is set: NCCL uses TCP, and not these adapters"),
        ({"NCCL_NET": "Socket"}, "NCCL_NET is Socket: NCCL uses TCP, and not these adapters"),
    ],
    ids=str,
)
def test_variables_that_turn_infiniband_off_are_reported(
    tmp_path: Path, environment: dict[str, str], text: str
) -> None:
    root = host(tmp_path, "mlx5_0 InfiniBand 4:ACTIVE")
    assert told(examine(root, **environment)) == [("warning", text)]
    assert told(examine(root, num_nodes=1, **environment)) == [("note", text)], "on one node nothing crosses them"


def test_what_a_container_and_a_job_must_be_given_is_reported(tmp_path: Path) -> None:
    root = host(tmp_path, "mlx5_0 InfiniBand 4:ACTIVE")
    (root / "dev/infiniband/uverbs0").unlink()
    closed, limited = told(examine(root, locked_bytes=8 * 2**20))
    assert closed[1].startswith("/dev/infiniband isn't here")
    assert limited[1].startswith("a process may lock 0.01 GiB of memory")


def test_ethernet_adapters_beside_infinibands_are_named_apart(tmp_path: Path) -> None:
    root = host(tmp_path, "mlx5_0 InfiniBand 4:ACTIVE", "mlx5_bond_0 RoCE 4:ACTIVE")
    (finding,) = [finding for finding in examine(root).findings if finding.severity == "warning"]
    assert finding.todo.endswith("NCCL_IB_HCA==mlx5_0")
    assert told(examine(root, NCCL_IB_HCA="=mlx5_0")) == []


def test_efa_needs_its_plugin_where_the_loader_looks(tmp_path: Path) -> None:
    root = host(tmp_path, "rdmap0s6 EFA 4:ACTIVE")
    ((_, missing),) = told(examine(root))
    assert missing.startswith("NCCL's plugin for EFA (libnccl-net.so of aws-ofi-nccl) isn't found")
    installed = root / "opt/amazon/ofi-nccl/lib"
    installed.mkdir(parents=True)
    (installed / "libnccl-net-ofi.so").touch()
    (finding,) = [finding for finding in examine(root).findings if finding.severity == "warning"]
    assert finding.todo == f"Add it: LD_LIBRARY_PATH={installed}:$LD_LIBRARY_PATH"
    assert told(examine(root, LD_LIBRARY_PATH=f"/x:{installed}")) == []
    (root / "etc/ld.so.conf.d").mkdir(parents=True)
    (root / "etc/ld.so.conf.d/ofi.conf").write_text("/opt/amazon/ofi-nccl/lib\n")
    assert told(examine(root)) == []
    assert told(examine(root, NCCL_NET_PLUGIN="none")) == [
        ("warning", "NCCL_NET_PLUGIN is none: without its plugin NCCL can't use EFA")
    ]
    assert told(examine(root, FI_PROVIDER="tcp", FI_EFA_USE_DEVICE_RDMA="0")) == [
        ("warning", "FI_PROVIDER is tcp: libfabric doesn't use EFA"),
        ("warning", "FI_EFA_USE_DEVICE_RDMA is 0: data goes through host memory"),
    ]
    assert told(examine(root, FI_PROVIDER="efa", FI_EFA_USE_DEVICE_RDMA="1", NCCL_IB_DISABLE="1")) == [], (
        "not InfiniBand"
    )
