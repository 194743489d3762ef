"""The trainer's YAML: overrides and references as OmegaConf reads them, and nothing that could do harm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptstore.config import RunConfig, load
from ckptstore.errors import NotFoundError, RefusedError, UsageError
from ckptstore.frameworks.areal import adamw
from ckptstore.frameworks.areal.saving import describe, first_saved, settings

YAML = """\
experiment_name: gsm8k-grpo
trial_name: trial0
cluster:
  fileroot: /data/${experiment_name}
  n_nodes: 1
saver:
  fileroot: ${cluster.fileroot}
  freq_epochs: 1
  freq_steps: null
recover:
  mode: auto
  freq_steps: 20
nothing: null
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(YAML)
    return file


def test_dotted_keys_and_references(path: Path) -> None:
    config = load(str(path))
    assert config.text("cluster.fileroot") == "/data/gsm8k-grpo"
    assert config.text("saver.fileroot") == "/data/gsm8k-grpo"
    assert config.get("saver.freq_epochs") == 1
    assert config.path == str(path)


@pytest.mark.parametrize("key", ["missing", "cluster.missing", "cluster.fileroot.deeper", "nothing"])
def test_what_is_not_there_is_the_default(path: Path, key: str) -> None:
    assert load(str(path)).get(key, "default") == "default"
    assert load(str(path)).text(key) == ""


def test_overrides_win_and_are_typed(path: Path) -> None:
    config = load(str(path), ["trial_name=trial7", "+saver.freq_steps=50", "new.inner.key=true", "cluster.fileroot=/other"])
    assert config.text("trial_name") == "trial7"
    assert config.get("saver.freq_steps") == 50
    assert config.get("new.inner.key") is True
    assert config.text("saver.fileroot") == "/other"
    assert config.overrides[0] == "trial_name=trial7"


def test_an_override_replaces_a_scalar_by_a_block(path: Path) -> None:
    assert load(str(path), ["trial_name.inner=1"]).get("trial_name.inner") == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${oc.env:CKPT_TEST_ROOT}", "/from/env"),
        ("${oc.env:CKPT_TEST_UNSET,/fallback}", "/fallback"),
        ("${a}${b}", "xy"),
        ("${missing}", None),
        ("${self}", None),  # a reference to itself ends
        ("${now:%Y}", None),  # a resolver that we do not know
    ],
)
def test_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, value: str | None) -> None:
    monkeypatch.setenv("CKPT_TEST_ROOT", "/from/env")
    monkeypatch.delenv("CKPT_TEST_UNSET", raising=False)
    config = RunConfig("", {"self": text, "a": "x", "b": "y"})
    assert config.get("self") == value


def test_a_missing_file_is_said_with_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFoundError, match="no such file") as caught:
        load("run.yaml")
    assert str(tmp_path) in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "- a\n- list\n",
        "just text",
        "a: [unclosed",
        "!!python/object/apply:os.system ['touch harmed']",
        "key: \x00",
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"run\.yaml"):
        load("run.yaml")
    assert not Path("harmed").exists()


def test_an_empty_file_is_an_empty_configuration(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("")
    assert load(str(tmp_path / "run.yaml")).text("trial_name") == ""


def test_a_pipe_that_nobody_writes_into_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(UsageError, match="is no file"):
        load(str(tmp_path / "run.yaml"))


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"#" * (5 << 20))
    with pytest.raises(UsageError, match="no training configuration"):
        load(str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("override", ["novalue", "=x", "a=[unclosed"])
def test_bad_overrides(path: Path, override: str) -> None:
    with pytest.raises(UsageError):
        load(str(path), [override])


# --- what the two blocks say -------------------------------------------------------------------------------------


def test_saver_and_recover_are_described(path: Path) -> None:
    assert describe(load(str(path))) == [("saver", "every 1 epoch"), ("recover", "mode auto, every 20 steps")]


def test_recovery_that_is_off_is_said_with_what_it_costs(path: Path) -> None:
    described = dict(describe(load(str(path), ["recover.mode=disabled", "saver.freq_epochs=null"])))
    assert described["saver"] == "never (no frequency is set)"
    assert "nothing resumes by itself" in described["recover"]


def test_settings_for_programs(path: Path) -> None:
    found = settings(load(str(path)))
    assert found["saver"] == {"freq_epochs": 1, "freq_steps": None, "freq_secs": None}
    assert found["recover"] == {"mode": "auto", "freq_epochs": None, "freq_steps": 20, "freq_secs": None}


@pytest.mark.parametrize(
    ("overrides", "per_epoch", "expected"),
    [
        ([], 47, "first saved is step 46"),
        (["saver.freq_steps=20"], 47, "first saved is step 19"),
        (["saver.freq_epochs=null", "saver.freq_steps=100"], 0, "first saved is step 99"),
    ],
)
def test_first_saved_step(path: Path, overrides: list[str], per_epoch: int, expected: str) -> None:
    text = first_saved(load(str(path), overrides), per_epoch, 9)
    assert expected in text
    assert "saver.freq_steps=10 (or less)" in text  # saves after step 9: the last that still qualifies


def test_first_saved_step_without_anything_known(path: Path) -> None:
    assert first_saved(None, 0, 9) == "saver.freq_steps=10 (or less) in the trainer's YAML would have saved one by then."
    assert "first saved" not in first_saved(load(str(path)), 0, 9)  # an epoch's length is not known


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("5e-06", 5e-6), ("2E+3", 2e3), ("1.70e-5", 1.7e-5), ("-.5e1", -5.0), ("1_0e2", 1e3), ("7", 7),
        ("'1e-6'", "1e-6"), ("e5", "e5"), ("1e", "1e"), ("1e5x", "1e5x"), ("2025-11-12", "2025-11-12"),
        ("2025-11-12 10:00:00", "2025-11-12 10:00:00"), ("true", True), ("null", None),
    ],
)  # fmt: skip
def test_scalars_are_what_the_trainer_takes_them_for(tmp_path: Path, text: str, value: object) -> None:
    """PyYAML alone takes 1e-6 for text: a learning rate that was not seen."""
    (tmp_path / "run.yaml").write_text(f"actor:\n  optimizer:\n    lr: {text}\nalias: ${{actor.optimizer.lr}}\n")
    config = load(str(tmp_path / "run.yaml"), [f"other={text}"])
    for key in ("actor.optimizer.lr", "alias", "other"):
        found = config.get(key)
        assert (type(found), found) == (type(value), value), key


def test_the_learning_rate_is_the_runs_own(tmp_path: Path) -> None:
    """What the slot says beats the YAML: AReaL's default, 1e-3, in place of a run's 1e-6 would wreck the model in one step."""

    def made(text: str, era: str = "B", *overrides: str) -> adamw.AdamW:
        (tmp_path / "run.yaml").write_text(f"base: 3e-6\nactor:\n  optimizer: {text}\n")
        return adamw.from_config(load(str(tmp_path / "run.yaml"), overrides), "default", era)

    assert made("{lr: 2e-6, eps: 1e-5}") == adamw.AdamW(lr=2e-6, eps=1e-5)
    assert made("{lr: '2e-6'}").lr == 2e-6
    assert made("{lr: ${base}}".replace("${base}", '"${base}"')).lr == 3e-6
    assert made("{}", "B", "actor.optimizer.lr=4e-6").lr == 4e-6
    assert made("{lr: 2e-6}", "A") == adamw.AdamW(lr=2e-6, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.05)
    for text in (
        "{}",
        "{lr: null}",
        "{lr: fast}",
        "{lr: true}",
        "{lr: -1e-6}",
        "{lr: .nan}",
        "{lr: [1]}",
        "{lr: 2e-6, eps: x}",
    ):
        with pytest.raises(RefusedError, match=r"actor\.optimizer\."):
            made(text)
    with pytest.raises(RefusedError, match="nothing tells the learning rate"):
        adamw.from_config(None, "default", "B")


def test_what_hydra_takes_from_other_files_is_not_taken_for_a_default(tmp_path: Path) -> None:
    """What the slot says of the optimizer beats the YAML: our default would beat what the other file says."""
    path = tmp_path / "run.yaml"
    for text in ("[base, {optim: fast}, _self_]", "[_self_]", "base"):
        path.write_text(f"defaults: {text}\nactor:\n  optimizer: {{lr: 2e-6, beta1: 0.8, beta2: 0.9, eps: 1e-7}}\n")
        config = load(str(path))
        if text.startswith("[base"):
            assert config.unread == "base, {'optim': 'fast'}"
            with pytest.raises(RefusedError, match=r"actor.optimizer.weight_decay .*may be in base") as refused:
                adamw.from_config(config, "default", "B")
            assert "Say actor.optimizer.weight_decay=" in refused.value.hint
            config = load(str(path), ["actor.optimizer.weight_decay=0.1"])
            assert adamw.from_config(config, "default", "B") == adamw.AdamW(2e-6, (0.8, 0.9), 1e-7, 0.1)
        else:
            assert config.unread == ""
            assert adamw.from_config(config, "default", "B").weight_decay == 0.01
