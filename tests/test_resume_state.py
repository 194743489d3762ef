"""What is put into a recover_info, field by field; and how the AReaL at hand and its number of ranks are told."""

from __future__ import annotations

import json
import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptstore.config import RunConfig
from ckptstore.errors import RefusedError, UsageError
from ckptstore.frameworks.areal import era, pickled, resume_state, target
from ckptstore.frameworks.areal.launch import Installation
from ckptstore.frameworks.areal.resume_state import StepNumbers
from ckptstore.model import Checkpoint, Part, Status
from tests import trees
from tests.areal_rules import CONTROL_KEYS, read_recover_info

NOW_S = 1_763_000_000.5
MIDDLE = StepNumbers(step=104, epoch=2, epoch_step=10, steps_per_epoch=47)
END = StepNumbers(step=140, epoch=2, epoch_step=46, steps_per_epoch=47)


def config(**blocks: Any) -> RunConfig:
    return RunConfig("run.yaml", blocks)


FULL = config(
    saver={"freq_epochs": 1, "freq_steps": None, "freq_secs": None},
    evaluator={"freq_epochs": 2},
    recover={"freq_epochs": None, "freq_steps": 20, "freq_secs": 3600},
    train_dataset={"batch_size": 8, "num_workers": 0},
    allocation_mode="sglang:d4p1t1+d4p1t1",
)


def synthesize(
    numbers: StepNumbers, yaml: RunConfig | None = FULL, **options: Any
) -> tuple[dict[str, Any], Any, tuple[str, ...]]:
    made = resume_state.synthesize(numbers, config=yaml, stored=options.pop("stored", {}), now_s=NOW_S, **options)
    documents = {name: json.loads(data) for name, data in made.files.items() if name.endswith(".json")}
    return documents, load_pickle(made.files["dataloader_info.pkl"]), made.notes


def load_pickle(data: bytes) -> Any:
    return pickle.loads(data)  # noqa: S301


# --- the six files ------------------------------------------------------------------------------------------------


def test_every_file_and_nothing_else() -> None:
    made = resume_state.synthesize(MIDDLE, config=FULL, stored={}, now_s=NOW_S)
    assert sorted(made.files) == sorted(trees.RECOVER_INFO_FILES)


def test_step_info_has_exactly_its_four_fields() -> None:
    documents, *_ = synthesize(MIDDLE)
    assert documents["step_info.json"] == {"epoch": 2, "epoch_step": 10, "global_step": 104, "steps_per_epoch": 47}


def test_the_stats_logger_goes_on_after_the_step() -> None:
    documents, *_ = synthesize(MIDDLE)
    assert documents["stats_logger_info.json"] == {"last_commit_step": 104}


@pytest.mark.parametrize(("numbers", "epochs_done"), [(MIDDLE, 2), (END, 3)])
def test_each_control_exactly(numbers: StepNumbers, epochs_done: int) -> None:
    documents, *_ = synthesize(numbers)

    def control(count: int, steps: int | None, seconds: int | None) -> dict[str, Any]:
        return {
            "frequence_seconds": seconds,
            "frequency_steps": steps,
            "start_time": NOW_S,
            "steps": count,
            "last_time": NOW_S,
            "last_steps": count,
            "interval_steps": 0,
            "interval_seconds": 0.0,
            "initial_value": False,
        }

    count = numbers.step + 1
    for name, (epochs, steps, seconds) in {
        "saver_info.json": (1, None, None),
        "evaluator_info.json": (2, None, None),
        "checkpoint_info.json": (None, 20, 3600),
    }.items():
        assert documents[name] == {
            "epoch": control(epochs_done, epochs, None),
            "step": control(count, steps, None),
            "time": control(count, None, seconds),
        }
        assert set(documents[name]["time"]) == set(CONTROL_KEYS)


def test_a_yaml_without_evaluation_never_evaluates() -> None:
    documents, *_ = synthesize(MIDDLE, config(saver={"freq_steps": 5}, recover={"freq_steps": 5}))
    assert documents["evaluator_info.json"]["epoch"]["frequency_steps"] is None


def stored(**frequencies: tuple[int | None, int | None, int | None]) -> dict[str, Any]:
    return {
        f"{name}_info.json": {
            "epoch": {"frequency_steps": epochs},
            "step": {"frequency_steps": steps},
            "time": {"frequence_seconds": seconds},
        }
        for name, (epochs, steps, seconds) in frequencies.items()
    }


OLD = stored(saver=(1, None, None), evaluator=(1, None, None), checkpoint=(None, 50, None))


def test_the_yaml_beats_an_older_recover_info_and_says_so() -> None:
    documents, _, notes = synthesize(MIDDLE, stored=OLD)
    assert documents["checkpoint_info.json"]["step"]["frequency_steps"] == 20
    assert any("every 20 steps or every 3600 seconds" in note and "every 50 steps" in note for note in notes)
    assert not any(note.startswith("saver") for note in notes), "they agree"


def test_without_a_yaml_the_older_frequencies_are_kept() -> None:
    documents, _, notes = synthesize(MIDDLE, None, stored=OLD)
    assert documents["saver_info.json"]["epoch"]["frequency_steps"] == 1
    assert documents["checkpoint_info.json"]["step"]["frequency_steps"] == 50
    assert len(notes) == 1


@pytest.mark.parametrize("yaml", [None, config(), config(saver={"freq_epochs": None})])
def test_frequencies_are_never_made_up(yaml: RunConfig | None) -> None:
    with pytest.raises(RefusedError, match="never save again"):
        synthesize(MIDDLE, yaml)


@pytest.mark.parametrize("value", [1800.0, "1800"])
def test_a_frequency_of_another_type_is_not_lost(value: Any) -> None:
    yaml = config(**{**FULL.values, "saver": {"freq_epochs": None, "freq_steps": None, "freq_secs": value}})
    try:
        documents, *_ = synthesize(MIDDLE, yaml)
    except RefusedError:
        return
    assert documents["saver_info.json"]["time"]["frequence_seconds"] == 1800


@pytest.mark.parametrize("document", [{}, {"epoch": 1}, {"epoch": {}, "step": {}, "time": {}}])
def test_an_older_control_that_is_not_one_does_not_count(document: Any) -> None:
    with pytest.raises(RefusedError):
        synthesize(MIDDLE, None, stored={**OLD, "saver_info.json": document})


def test_where_a_kept_one_differs_from_the_yaml() -> None:
    lines = resume_state.stored_difference(FULL, OLD)
    assert [line.partition(":")[0] for line in lines] == ["evaluator", "recover"]
    assert all("--write-frequencies" in line for line in lines)
    assert resume_state.stored_difference(None, OLD) == []


def test_blocking_passes_the_launcher_and_stops_the_trainer(tmp_path: Path) -> None:
    folder = tmp_path / "recover_info"
    folder.mkdir()
    for name, data in resume_state.blocking().items():
        (folder / name).write_bytes(data)
    step, controls, *_ = read_recover_info(tmp_path)
    assert step.epoch >= 0
    assert set(controls) == {"saver_info.json", "evaluator_info.json", "checkpoint_info.json"}
    for control in controls.values():
        assert not {"epoch", "step", "time"} & set(control)  # what the trainer reads unconditionally


# --- the order of the data ----------------------------------------------------------------------------------------


def test_an_epochs_end_needs_no_cursor() -> None:
    _, data, notes = synthesize(END)
    assert data == {}
    assert "data order: exact (the step ended its epoch)" in notes


def test_the_cursor_of_each_rank() -> None:
    _, data, notes = synthesize(MIDDLE)
    state = {
        "_index_sampler_state": None,
        "_sampler_iter_state": {"samples_yielded": 22},  # 11 batches of 2: a batch of 8 on 4 ranks
        "_sampler_iter_yielded": 11,
        "_num_yielded": 11,
        "_IterableDataset_len_called": None,
        "_shared_seed": None,
        "fetcher_state": None,
        "dataset_state": None,
        "_iterator_finished": False,
    }
    assert data == [state] * 4
    assert any("after batch 11" in note for note in notes)


def test_a_cursor_where_several_ranks_share_a_batch() -> None:
    yaml = config(**{**FULL.values, "allocation_mode": "sglang:d4+fsdp:d4t2"})
    _, data, _ = synthesize(MIDDLE, yaml, world_size=8)
    assert data == {} or (len(data) == 8 and data[0]["_sampler_iter_state"] == {"samples_yielded": 22})


@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        ({}, "no number as train_dataset.batch_size"),
        ({"batch_size": 8}, "does not say train_dataset.num_workers: 0"),
        ({"batch_size": 8, "num_workers": 2}, "does not say train_dataset.num_workers: 0"),
        ({"num_workers": 0}, "no number as train_dataset.batch_size"),
        ({"batch_size": 6, "num_workers": 0}, "6 samples a batch do not divide by the ranks"),
        (None, "no YAML"),
    ],
)
def test_no_cursor_is_made_up(dataset: dict[str, int] | None, why: str) -> None:
    """And what is missing is said: a word KEY=VALUE may add it."""
    yaml = None if dataset is None else config(**{**FULL.values, "train_dataset": dataset})
    _, data, notes = synthesize(MIDDLE, yaml, stored=OLD)
    assert data == {}
    assert any("starts again" in note and why in note for note in notes)


@pytest.mark.parametrize(("era", "shuffle", "known"), [
    ("A", None, False), ("A", True, False), ("A", False, True), ("B", True, True), ("C", None, True), ("", None, True),
])  # fmt: skip
def test_a_loader_that_shuffles_by_itself_gets_no_cursor(era: str, shuffle: bool | None, known: bool) -> None:
    """Up to v0.3 the loader's own sampler shuffles: three counters leave it at the epoch's begin, and it counts on."""
    dataset = FULL.values["train_dataset"] | ({} if shuffle is None else {"shuffle": shuffle})
    _, data, notes = synthesize(MIDDLE, config(**{**FULL.values, "train_dataset": dataset}), era=era)
    assert bool(data) == known
    assert any("starts again" in note for note in notes) != known


# --- pickles ------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 31), (1 << 31) - 1) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_a_pickle_loads_as_what_was_written(value: Any) -> None:
    loaded = load_pickle(pickled.dumps(value))
    assert loaded == value
    assert repr(loaded) == repr(value), "types and order as well"


def test_a_pickle_names_nothing_to_import_or_call() -> None:
    opcodes = {opcode.name for opcode, _, _ in pickletools.genops(pickled.dumps([{"a": None, "b": [True, False, -7, "ü"]}]))}
    assert opcodes <= {
        "PROTO", "EMPTY_LIST", "EMPTY_DICT", "MARK", "BINUNICODE", "BININT", "NONE", "NEWTRUE", "NEWFALSE", "APPENDS",
        "SETITEMS", "STOP",
    }  # fmt: skip


@pytest.mark.parametrize("value", [1.5, b"x", (1,), {1}, 1 << 31, object(), [{"a": 0.5}]])
def test_a_pickle_of_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(UsageError):
        pickled.dumps(value)


# --- steps of an epoch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "others", "known", "expected"),
    [
        ((104, 2, 10), [], 0, 47),
        ((104, 2, 10), [], 50, 50),  # who says so knows better
        ((46, 0, 46), [], 0, 0),  # an epoch's end looks like any other step of the first epoch
        ((9, 0, 9), [(47, 1, 0)], 0, 47),
        ((9, 0, 9), [(19, 0, 19), (140, 2, 46)], 0, 47),
        ((104, 2, 9), [], 0, 0),  # 95 is not twice anything
        ((104, 2, 9), [(140, 2, 46)], 0, 47),
        ((-1, -1, -1), [], 0, 0),
        ((934, 0, 934), [], 935, 935),
    ],
)
def test_steps_per_epoch(numbers: Any, others: Any, known: int, expected: int) -> None:
    assert resume_state.steps_per_epoch(numbers, others, known) == expected


# --- ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "ranks"),
    [
        ("sglang.d4p1t1+d4p1t1", 4),
        ("sglang:d1p1t1+d1p1t1", 1),
        ("sglang:d4+fsdp:d2", 2),
        ("vllm:d2t2+archon:d8", 8),
        ("d8p1t1", 8),
        ("fsdp:d4c1t1p1", 4),
        ("sglang:d4+megatron:d2t2", 0),
        ("sglang:d4+d2p2t1", 0),
        ("sglang:d4+fsdp:d2c2", 0),
        ("sglang:d4+megatron:(attn:d4|ffn:d2e2)", 0),
        ("sglang:d4p1t1+cpu", 0),
        ("sglang.d4p1t1+eval", 0),
        ("", 0),
        ("nonsense", 0),
        ("sglang:d4", 0),
    ],
)
def test_data_parallel_world(mode: str, ranks: int) -> None:
    assert resume_state.data_parallel_world(mode) == ranks


# --- eras ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("0.3.0", "A"),
        ("0.3.4.post1", "A"),
        ("0.4.0", "B"),
        ("0.5.3", "B"),
        ("1.0.0", "B"),
        ("1.0.2", "B"),
        ("1.0.3", "C"),
        ("1.0.4", "C"),
        ("1.1", "C"),
        ("2.0", "C"),
    ],
)
def test_an_era_by_version(version: str, name: str) -> None:
    found = era.of(Installation("", version, "areal.launcher", "--areal-version"))
    assert found.name == name
    assert found.known
    assert found.slot_format == ("hf+optim" if name == "A" else "dcp")
    assert found.can_skip_optimizer == (name == "C")


SOURCES = {
    "A": 'meta = SaveLoadMeta(path=path, weight_format="hf", with_optim=True)\n',
    "B": "if isinstance(engine, FSDPEngine):\n    weight_format = 'dcp'\n",
    "C": 'weight_format = "dcp"\nwith_optim = not self.config.no_load_optim\n',
}


@pytest.mark.parametrize("name", "ABC")
def test_an_era_by_the_source_beats_the_version(tmp_path: Path, name: str) -> None:
    file = tmp_path / "areal/utils/recover.py"
    file.parent.mkdir(parents=True)
    file.write_text(SOURCES[name])
    assert era.of(Installation(str(tmp_path), "9.9", "", "test")).name == name


@pytest.mark.parametrize(
    ("slot", "name", "known"), [("hf+optim", "A", True), ("dcp", "B", True), ("", "B", False), ("lora", "B", False)]
)
def test_an_era_by_the_slot(slot: str, name: str, known: bool) -> None:
    found = era.of(Installation("", "", "", "not found"), slot)
    assert (found.name, found.known) == (name, known)


# --- how a part gets into the slot --------------------------------------------------------------------------------


def part(format_name: str, *holds: str) -> Part:
    return Part("default", "/run/default/x", (), format_name, holds, Status.COMPLETE)


ERAS = {name: era.of(Installation("", version, "", "")) for name, version in {"A": "0.3", "B": "0.4", "C": "1.0.3"}.items()}


@pytest.mark.parametrize(
    ("source", "name", "ranks", "how", "optimizer"),
    [
        (part("dcp", "weights", "optimizer"), "B", 0, "copy", "kept"),
        (part("dcp", "weights"), "C", 0, "copy", "none"),
        (part("hf", "weights"), "B", 0, "dcp", "zero"),
        (part("hf-sharded", "weights"), "B", 0, "dcp", "zero"),
        (part("hf", "weights"), "C", 0, "dcp", "none"),
        (part("hf", "weights"), "A", 2, "era-a", "zero"),
        (part("hf+optim", "weights", "optimizer"), "A", 0, "copy", "kept"),
    ],
)
def test_a_transfer(source: Part, name: str, ranks: int, how: str, optimizer: str) -> None:
    told = config(actor={"optimizer": {"lr": 2e-6}})
    assert target.transfer(source, ERAS[name], ranks, told) == target.Transfer(how, optimizer)


@pytest.mark.parametrize(
    ("source", "name", "ranks", "why"),
    [
        (part("hf", "weights"), "A", 2, "nothing tells the learning rate"),
        (part("hf-sharded", "weights"), "B", 0, "nothing tells the learning rate"),
        (part("hf", "weights"), "A", 0, "--world-size"),
        (part("lora", "weights"), "B", 0, "LoRA"),
        (part("lora", "weights"), "A", 2, "LoRA"),
        (part("hf-bin", "weights"), "C", 0, "AReaL reads dcp"),
        (part("hf+optim", "weights"), "B", 0, "AReaL reads dcp"),
        (part("dcp", "weights"), "A", 2, "AReaL reads hf"),
        (part("mixed", "weights"), "B", 0, "AReaL reads dcp"),
    ],
)
def test_a_transfer_that_cannot_resume(source: Part, name: str, ranks: int, why: str) -> None:
    assert why in target.transfer(source, ERAS[name], ranks, None).refusal


def test_a_checkpoint_of_unknown_step_gets_no_recover_info(tmp_path: Path) -> None:
    from ckptstore.backends.local import LocalBackend

    checkpoint = Checkpoint(-1, -1, -1, "export", (part("hf"),))
    planned = target.plan_info(LocalBackend(str(tmp_path)), checkpoint, None, others=[], config=FULL, steps_per_epoch=47)
    assert planned.action == "leave"
    assert "step" in planned.refusal
