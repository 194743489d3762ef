"""The circuit breaker on several real ranks (gloo): all stop at the same step, none hangs, none leaves too early."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ckptstore.breaker import CircuitBreaker
from ckptstore.errors import UsageError
from tests import warm

LIMIT_S = 100  #: for all scenarios; each would hang for the group's 30 s


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What became of each scenario, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    words = ("-m", "tests.breaker_rank")
    processes = [warm.Python(*words, rank, request.param, folder, env=environment) for rank in range(request.param)]
    try:
        ended = [process.finish(LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(done.returncode == 0 for done in ended), "\n".join(done.stderr for done in ended)
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize(
    ("scenario", "step", "since"),
    [
        ("plain", 29, 20),
        ("same", 29, 20),
        ("any", 24, None),
        ("rank 0", 24, None),
        ("mean", 44, 40),
        ("nan", 24, 20),
        ("memory", 9, 2),
        ("full", 21, 20),
    ],
)
def test_all_ranks_stop_at_the_same_step(ranks: list[dict[str, Any]], scenario: str, step: int, since: int | None) -> None:
    for result in ranks:
        found = result[scenario]
        assert (found["halted"], found["trained"]) == (step, step - 1)
        assert since is None or found["since"] == since


def test_nobody_leaves_before_the_post_mortem_save_is_done(ranks: list[dict[str, Any]]) -> None:
    assert all(result["same"]["saved_when_it_left"] for result in ranks)


def test_the_record_says_what_the_rank_saw_that_knew(ranks: list[dict[str, Any]]) -> None:
    assert "was 0 for 5 steps in a row" in ranks[0]["record"]
    assert "another rank" not in ranks[0]["record"]
    assert "another rank's metrics went bad" in ranks[0]["any"]["text"]


def test_no_rank_starts_while_one_finds_the_run_halted(ranks: list[dict[str, Any]]) -> None:
    assert all("before this start" in result["restart"] for result in ranks)


def test_clocks_that_differ_agree_on_when_to_save(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["saved after"]
    assert all(result["saved after"] == ranks[0]["saved after"] for result in ranks)


def test_ranks_that_have_not_met_cannot_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="not initialised"):
        CircuitBreaker(reduce="any")
    monkeypatch.setenv("WORLD_SIZE", "1")
    CircuitBreaker(reduce="any").observe({}, 0)


def test_only_the_first_rank_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        CircuitBreaker(tmp_path / "c/u/e/t").observe({"grpo_actor/task_reward/avg": 0.5}, 0)
        assert (tmp_path / "c/u/e/.ckptstore/t/metrics.jsonl").exists() == (rank == 0)
