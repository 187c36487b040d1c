"""The processes of a run meet within a time and are alike, or it is said who is missing or differs; ranks are threads here."""

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
from dist_lora.world.launcher import Place
from dist_lora.world.rendezvous import Told, differences_of, meet, missing_text, open_store, versions_of_this_process

VERSIONS = {"torch": "2.13.0", "code": "12ab"}
SETTINGS = {"run": "a", "lora.rank": 16, "data.train": "a.jsonl"}
PATIENCE_S = 30.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "store"


def told_by(rank: int, **changes: Any) -> Told:
    """What a rank of two nodes of two says; with ``changes``."""
    return replace(Told(f"n{rank // 2 + 1}", 4, 2, VERSIONS, SETTINGS), **changes)


def outcomes(
    file: Path, ranks: Sequence[int], *, told: Mapping[int, Told] | None = None, timeout_s: float = PATIENCE_S
) -> list[Any]:
    """What ``meet`` returned or raised on each of these ranks of four, which come to one store at once."""

    def outcome(rank: int) -> Any:
        store = dist.FileStore(str(file), -1)
        place = Place(rank, 4, rank % 2, 2)
        try:
            return meet(store, place, (told or {}).get(rank, told_by(rank)), timeout_s=timeout_s)
        except (ConfigError, JoinError, RankError) as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(outcome, ranks))


def test_all_who_come_get_one_name_and_another_at_each_meeting(file) -> None:
    first, second = outcomes(file, range(4)), outcomes(file, range(4))
    assert len({*first}) == len({*second}) == 1 and isinstance(first[0], str)
    assert first[0] != second[0]


MISSING = (
    "1 of 2 nodes joined within 0.5 s: missing ranks 2, 3 (those of node 1). Here are ranks 0, 1 on n1. Is every node"
)


def test_a_node_that_does_not_come_is_named_once(file) -> None:
    found = outcomes(file, [0, 1], timeout_s=0.5)
    assert isinstance(found[0], JoinError) and str(found[0]).startswith(MISSING)
    assert found[0].exit_code == 1 and "raise parallel.join_timeout" in str(found[0])
    assert isinstance(found[1], RankError) and found[1].exit_code == 1


def test_a_node_that_came_to_an_earlier_attempt_in_the_same_store_is_missing_now(file) -> None:
    outcomes(file, range(4))
    found = outcomes(file, [0, 1], timeout_s=0.5)
    assert isinstance(found[0], JoinError) and str(found[0]).startswith(MISSING)
    assert isinstance(found[1], RankError)


def test_without_the_first_rank_the_lowest_that_is_there_tells(file) -> None:
    found = outcomes(file, [2, 3], timeout_s=0.5)
    assert str(found[0]).startswith(
        "1 of 2 nodes joined within 0.5 s: missing ranks 0, 1 (those of node 0). Here are ranks 2, 3 on n2."
    )
    assert isinstance(found[0], JoinError) and isinstance(found[1], RankError)


@pytest.mark.parametrize(
    ("hosts", "place", "told"),
    [
        ({0: "a"}, Place(0, 2, 0, 2), "1 of 2 processes joined within 9 s: missing rank 1. Here are rank 0 on a."),
        (
            {0: "a", 1: "a", 3: "b"},
            Place(0, 4, 0, 2),
            "3 of 4 processes joined within 9 s: missing rank 2. Here are ranks 0, 1 on a; rank 3 on b.",
        ),
        (
            dict.fromkeys(range(8), "a") | dict.fromkeys(range(24, 32), "d"),
            Place(0, 32, 0, 8),
            "2 of 4 nodes joined within 9 s: missing ranks 8-23 (those of node 1, 2). Here are ranks 0-7 on a; ranks 24-31 on d.",
        ),
        (
            {0: "a", 1: "a", 2: "b"},
            Place(0, 6, 0, 2),
            "2 of 3 nodes joined within 9 s: missing ranks 3-5. Here are ranks 0, 1 on a; rank 2 on b.",
        ),
    ],
)  # fmt: skip
def test_who_is_missing_is_told_by_node_where_whole_ones_are(hosts, place, told) -> None:
    assert missing_text(hosts, place, 9.0).startswith(told)


def test_two_nodes_that_say_they_are_the_same_are_told_so(file) -> None:
    def come(host: str) -> Any:
        try:
            return meet(dist.FileStore(str(file), -1), Place(0, 2, 0, 1), Told(host, 2, 1, {}), timeout_s=2.0)
        except (JoinError, RankError) as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        texts = [str(outcome) for outcome in pool.map(come, ["a", "b"])]
    assert sum(text.startswith("two processes say that they are rank 0 of 2: one on ") for text in texts) == 1, texts
    assert sum(text.startswith("1 of 2 nodes joined") for text in texts) == 1, texts


DIFFERENT = [
    ({"versions": {"torch": "2.12.0", "code": "12ab"}}, "torch is 2.12.0, not 2.13.0"),
    ({"versions": {"torch": "2.13.0", "code": "34cd"}}, "dist_lora's own files are others"),
    (
        {"settings": SETTINGS | {"lora.rank": 8, "data.train": None}},
        "data.train is None, not 'a.jsonl'; lora.rank is 8, not 16",
    ),
    ({"local_size": 4}, "4 processes on this node, not 2"),
    ({"world_size": 6}, "counts on 6 processes, not 4"),
]


@pytest.mark.parametrize(("changes", "told"), DIFFERENT)
def test_a_node_that_differs_is_named_with_both_values(changes: dict[str, Any], told: str) -> None:
    everyone = [told_by(0), told_by(1), told_by(2, **changes), told_by(3, **changes)]
    assert differences_of(everyone) == (
        f"not all processes of this run are alike. Other than on n1 (rank 0):\n  n2 (ranks 2, 3): {told}\n"
        "Give every node the same installation, config and arguments, and the same number of processes."
    )


def test_several_nodes_that_differ_are_all_named() -> None:
    others = [told_by(2, settings={"run": "b"}), told_by(3, versions={"torch": "1", "code": "12ab"})]
    lines = differences_of([told_by(0), told_by(1), *others]).splitlines()
    assert [line.partition(":")[0] for line in lines[1:-1]] == ["  n2 (rank 2)", "  n2 (rank 3)"]
    assert differences_of([told_by(rank) for rank in range(4)]) == ""


def test_ranks_that_differ_begin_nothing(file) -> None:
    other = {rank: told_by(rank, settings=SETTINGS | {"lora.rank": 8}) for rank in (2, 3)}
    found = outcomes(file, range(4), told=other)
    assert isinstance(found[0], ConfigError) and "n2 (ranks 2, 3): lora.rank is 8, not 16" in str(found[0])
    assert all(isinstance(error, RankError) and error.exit_code == 2 for error in found[1:])


def test_what_is_installed_here_is_compared_by_version_and_source() -> None:
    versions = versions_of_this_process()
    assert versions["torch"].startswith("2.") and len(versions["code"]) == 16
    assert {"python", "dist_lora", "transformers", "deepspeed"} <= versions.keys()


# Where they meet


@pytest.fixture
def port() -> Iterator[int]:
    """A port at which nobody is found while the test lasts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_a_first_rank_that_is_not_found_is_told_by_a_rank_of_each_node(port) -> None:
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.raises(
        JoinError, match=f"nobody answers at 127.0.0.1:{port}, where rank 0 is to be met, within 0.5 s: "
    ):
        open_store(Place(2, 4, 0, 2), environment, timeout_s=0.5)
    with pytest.raises(RankError, match=f"rank 3 found nobody at 127.0.0.1:{port}"):
        open_store(Place(3, 4, 1, 2), environment, timeout_s=0.5)


def test_a_port_that_is_taken_is_told(port) -> None:
    told = (
        rf"rank 0 can't be met at 127.0.0.1:{port}: .*Is another run at that port \(then set MASTER_PORT to another\)"
    )
    with pytest.raises(JoinError, match=told):
        open_store(Place(0, 2, 0, 2, rendezvous=("127.0.0.1", port)), {}, timeout_s=0.5)


def test_a_launcher_that_does_not_say_where_they_meet_is_refused() -> None:
    told = "MASTER_ADDR is not set and MASTER_PORT is 12, expected the first node's name and a port: RANK says that"
    with pytest.raises(ConfigError, match=told):
        open_store(Place(0, 2, 0, 2), {"MASTER_PORT": "12"}, timeout_s=0.5)
