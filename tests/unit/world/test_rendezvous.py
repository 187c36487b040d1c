"""All processes of a run join in time and match, or an error says which are missing or differ; ranks are threads here."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dist_lora.errors import ConfigError, JoinError, RankError
from dist_lora.world.launcher import LaunchedRank
from dist_lora.world.rendezvous import (
    RankInfo,
    differences_of,
    missing_text,
    open_store,
    rendezvous,
    shared_gpus,
    versions_of_this_process,
)

VERSIONS = {"torch": "2.13.0", "code": "12ab"}
SETTINGS = {"run": "a", "lora.rank": 16, "data.train": "a.jsonl"}
PATIENCE_S = 30.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "store"


def info_of(rank: int, **changes: Any) -> RankInfo:
    """The info of a rank of two nodes of two; with ``changes``."""
    return replace(RankInfo(f"n{rank // 2 + 1}", 4, 2, VERSIONS, SETTINGS), **changes)


def outcomes(
    file: Path, ranks: Sequence[int], *, infos: Mapping[int, RankInfo] | None = None, timeout_s: float = PATIENCE_S
) -> list[Any]:
    """What ``rendezvous`` returned or raised on each of these ranks of four, which join in one store at once."""

    def outcome(rank: int) -> Any:
        store = dist.FileStore(str(file), -1)
        launched = LaunchedRank(rank, 4, rank % 2, 2)
        try:
            return rendezvous(store, launched, (infos or {}).get(rank, info_of(rank)), timeout_s=timeout_s)
        except (ConfigError, JoinError, RankError) as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(outcome, ranks))


def test_all_that_join_get_one_name_and_another_at_each_rendezvous(file) -> None:
    first, second = outcomes(file, range(4)), outcomes(file, range(4))
    assert len({*first}) == len({*second}) == 1 and isinstance(first[0], str)
    assert first[0] != second[0]


MISSING = "1 of 2 nodes joined within 0.5 s: missing ranks 2, 3 (node 1). Joined: ranks 0, 1 on n1. Is every node"


def test_a_missing_node_is_named_once(file) -> None:
    found = outcomes(file, [0, 1], timeout_s=0.5)
    assert isinstance(found[0], JoinError) and str(found[0]).startswith(MISSING)
    assert found[0].exit_code == 1 and "raise parallel.join_timeout" in str(found[0])
    assert isinstance(found[1], RankError) and found[1].exit_code == 1


def test_a_node_that_joined_an_earlier_attempt_in_the_same_store_is_missing_now(file) -> None:
    outcomes(file, range(4))
    found = outcomes(file, [0, 1], timeout_s=0.5)
    assert isinstance(found[0], JoinError) and str(found[0]).startswith(MISSING)
    assert isinstance(found[1], RankError)


def test_without_rank_0_the_lowest_that_has_joined_reports(file) -> None:
    found = outcomes(file, [2, 3], timeout_s=0.5)
    assert str(found[0]).startswith(
        "1 of 2 nodes joined within 0.5 s: missing ranks 0, 1 (node 0). Joined: ranks 2, 3 on n2."
    )
    assert isinstance(found[0], JoinError) and isinstance(found[1], RankError)


@pytest.mark.parametrize(
    ("hosts", "launched", "text"),
    [
        ({0: "a"}, LaunchedRank(0, 2, 0, 2), "1 of 2 processes joined within 9 s: missing rank 1. Joined: rank 0 on a."),
        (
            {0: "a", 1: "a", 3: "b"},
            LaunchedRank(0, 4, 0, 2),
            "3 of 4 processes joined within 9 s: missing rank 2. Joined: ranks 0, 1 on a; rank 3 on b.",
        ),
        (
            dict.fromkeys(range(8), "a") | dict.fromkeys(range(24, 32), "d"),
            LaunchedRank(0, 32, 0, 8),
            "2 of 4 nodes joined within 9 s: missing ranks 8-23 (nodes 1, 2). Joined: ranks 0-7 on a; ranks 24-31 on d.",
        ),
        (
            {0: "a", 1: "a", 2: "b"},
            LaunchedRank(0, 6, 0, 2),
            "2 of 3 nodes joined within 9 s: missing ranks 3-5. Joined: ranks 0, 1 on a; rank 2 on b.",
        ),
    ],
)  # fmt: skip
def test_missing_ranks_are_named_by_node_where_whole_nodes_are(hosts, launched, text) -> None:
    assert missing_text(hosts, launched, 9.0).startswith(text)


def test_two_nodes_that_claim_the_same_rank_are_named(file) -> None:
    def come(host: str) -> Any:
        try:
            return rendezvous(
                dist.FileStore(str(file), -1), LaunchedRank(0, 2, 0, 1), RankInfo(host, 2, 1, {}), timeout_s=2.0
            )
        except (JoinError, RankError) as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        texts = [str(outcome) for outcome in pool.map(come, ["a", "b"])]
    assert sum(text.startswith("two processes claim to be rank 0 of 2: one on ") for text in texts) == 1, texts
    assert sum(text.startswith("1 of 2 nodes joined") for text in texts) == 1, texts


DIFFERENT = [
    ({"versions": {"torch": "2.12.0", "code": "12ab"}}, "torch is 2.12.0, not 2.13.0"),
    ({"versions": {"torch": "2.13.0", "code": "34cd"}}, "dist_lora's own source files differ"),
    (
        {"settings": SETTINGS | {"lora.rank": 8, "data.train": None}},
        "data.train is None, not 'a.jsonl'; lora.rank is 8, not 16",
    ),
    ({"local_size": 4}, "4 processes on this node, not 2"),
    ({"world_size": 6}, "expects 6 processes, not 4"),
]


@pytest.mark.parametrize(("changes", "difference"), DIFFERENT)
def test_a_node_that_differs_is_named_with_both_values(changes: dict[str, Any], difference: str) -> None:
    everyone = [info_of(0), info_of(1), info_of(2, **changes), info_of(3, **changes)]
    assert differences_of(everyone) == (
        f"the processes of this run don't match. Different from n1 (rank 0):\n  n2 (ranks 2, 3): {difference}\n"
        "Give every node the same installation, config and arguments, and the same number of processes."
    )


def test_several_nodes_that_differ_are_all_named() -> None:
    others = [info_of(2, settings={"run": "b"}), info_of(3, versions={"torch": "1", "code": "12ab"})]
    lines = differences_of([info_of(0), info_of(1), *others]).splitlines()
    assert [line.partition(":")[0] for line in lines[1:-1]] == ["  n2 (rank 2)", "  n2 (rank 3)"]
    assert differences_of([info_of(rank) for rank in range(4)]) == ""


def test_ranks_that_differ_begin_nothing(file) -> None:
    other = {rank: info_of(rank, settings=SETTINGS | {"lora.rank": 8}) for rank in (2, 3)}
    found = outcomes(file, range(4), infos=other)
    assert isinstance(found[0], ConfigError) and "n2 (ranks 2, 3): lora.rank is 8, not 16" in str(found[0])
    assert all(isinstance(error, RankError) and error.exit_code == 2 for error in found[1:])


def test_ranks_with_one_gpu_begin_nothing_and_are_named(file) -> None:
    gpus = ["GPU-1 (cuda:0)", "GPU-2 (cuda:1)", "GPU-1 (cuda:0)", "GPU-1 (cuda:0 of MIG-7)"]
    found = outcomes(file, range(4), infos={rank: info_of(rank, gpu=gpu) for rank, gpu in enumerate(gpus)})
    assert isinstance(found[0], ConfigError)
    assert (
        "several ranks have the same GPU, and each needs one of its own:\n  ranks 0, 2 on n1: GPU-1 (cuda:0)\nStart"
        in str(found[0])
    )
    assert all(isinstance(error, RankError) and error.exit_code == 2 for error in found[1:])
    assert shared_gpus([info_of(0), info_of(1)]) == ""  # on CPUs


def test_what_is_installed_here_is_compared_by_version_and_source() -> None:
    versions = versions_of_this_process()
    assert versions["torch"].startswith("2.") and len(versions["code"]) == 16
    assert {"python", "dist_lora", "transformers", "deepspeed"} <= versions.keys()


# The store


@pytest.fixture
def port() -> Iterator[int]:
    """A port on which nothing answers while the test lasts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_a_rank_0_that_does_not_answer_is_reported_by_one_rank_per_node(port) -> None:
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.raises(JoinError, match=f"rank 0 doesn't answer at 127.0.0.1:{port} within 0.5 s: "):
        open_store(LaunchedRank(2, 4, 0, 2), environment, timeout_s=0.5)
    with pytest.raises(RankError, match=f"rank 3 got no answer from 127.0.0.1:{port}"):
        open_store(LaunchedRank(3, 4, 1, 2), environment, timeout_s=0.5)


def test_a_port_that_is_in_use_is_reported(port) -> None:
    text = (
        rf"rank 0 can't open the store at 127.0.0.1:{port}: .*Does another run use that port "
        r"\(then set MASTER_PORT to another\)"
    )
    with pytest.raises(JoinError, match=text):
        open_store(LaunchedRank(0, 2, 0, 2, rendezvous=("127.0.0.1", port)), {}, timeout_s=0.5)


def test_a_launcher_that_does_not_set_the_address_is_refused() -> None:
    text = "MASTER_ADDR is not set and MASTER_PORT is 12, expected the first node's name and a port: RANK says that"
    with pytest.raises(ConfigError, match=text):
        open_store(LaunchedRank(0, 2, 0, 2), {"MASTER_PORT": "12"}, timeout_s=0.5)
