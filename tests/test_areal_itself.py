"""AReaL itself resumes from what `setup` makes: its own source on CPUs, from PyPI or from the checkout at $AREAL_SOURCE.

It trains a small Qwen2 and saves; ckptstore brings an older step back; AReaL starts again and tells what it found. The other
tests of resuming judge by a model of AReaL (areal_rules.py), which this one holds to account. `./run soak` installs it.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptstore.backends import LocalBackend
from ckptstore.formats import archives
from ckptstore.frameworks.areal.launch import find_installation
from ckptstore.listing import scan
from ckptstore.parts import reader
from tests import trees

ROOT = Path(__file__).parent.parent
SOURCE = os.environ.get("AREAL_SOURCE")
MISSING = [name for name in ("areal", "transformers", "torchdata") if not importlib.util.find_spec(name)]
if SOURCE and "areal" in MISSING:
    MISSING.remove("areal")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (./run soak makes .venv-areal with them)"),
]
AREAL = None if MISSING else find_installation(SOURCE or str(Path(importlib.util.find_spec("areal").origin).parent))
RECOVERY = Path(AREAL.path, "areal/utils/recover.py").read_text() if AREAL else ""
SKIPS_OPTIMIZER = "no_load_optim" in RECOVERY  #: from v1.0.3 on, if told; its YAML names backends, too
IN_HF_FILES = 'weight_format = "hf"' in RECOVERY  #: up to v0.3, whose loader shuffles by a generator that no export holds
FRESH = "none" if SKIPS_OPTIMIZER or IN_HF_FILES else "zero"  #: moments after a start from an export: B demands their keys

EVERY = {"saver": 2, "recover": 3}  # steps
#: name → embeddings tied, ranks, data shuffled
TRIALS = {
    "untied-1": (False, 1, True),
    "tied-1": (True, 1, False),
    "untied-2": (False, 2, False),
    "tied-2": (True, 2, True),
}
ADOPTED = 2  #: the slot of this step is kept; later ones overwrite it
UNTIL = 12  #: the run ends before this step, seven make an epoch
YAML = """
experiment_name: itself
trial_name: trial0
total_train_epochs: 3
tokenizer_path: {root}/model
allocation_mode: sglang:d1+d{world_size}
cluster: {{fileroot: {root}/run, n_nodes: 1, name_resolve: {{type: nfs, nfs_record_root: {root}/names}}}}
train_dataset: {{path: none, type: sft, batch_size: 4, shuffle: {shuffle}, num_workers: 0, drop_last: true}}
saver: &timer
  experiment_name: ${{experiment_name}}
  trial_name: ${{trial_name}}
  fileroot: ${{cluster.fileroot}}
  freq_steps: 2
recover: {{<<: *timer, freq_steps: 3}}
evaluator: {{<<: *timer, freq_steps: null}}
stats_logger: {{experiment_name: "${{experiment_name}}", trial_name: "${{trial_name}}", fileroot: "${{cluster.fileroot}}"}}
actor:
  experiment_name: ${{experiment_name}}
  trial_name: ${{trial_name}}
  path: {root}/model
  attn_impl: sdpa
  gradient_checkpointing: false
  optimizer: {{type: adam, lr: 2e-6, weight_decay: 0.01, beta1: 0.9, beta2: 0.98, eps: 1e-7, lr_scheduler_type: constant}}
"""
SETTINGS = {"lr": 2e-6, "initial_lr": 2e-6, "weight_decay": 0.01, "betas": (0.9, 0.98), "eps": 1e-7}
YAML_SINCE_1_0_3 = """  backend: fsdp:d{world_size}
rollout: {{backend: "sglang:d1"}}
"""
YAML_BEFORE = """
ref: {{experiment_name: "${{experiment_name}}", trial_name: "${{trial_name}}"}}
"""


@dataclass(frozen=True)
class Trial:
    """A run of AReaL: the trainer's YAML and where its files are."""

    yaml: Path
    fileroot: Path
    world_size: int

    @property
    def folder(self) -> Path:
        (trial,) = (self.fileroot / "checkpoints").glob("*/itself/trial0")
        return trial

    def copied(self, to: Path) -> Trial:
        shutil.copytree(self.fileroot, to, symlinks=True)
        return replace(self, fileroot=to)

    def train(self, until: int, *words: str, kill_at: int = 0) -> list[dict[str, Any]]:
        """AReaL from where it resumes up to step `until`; what each rank found and did. Nothing where it was killed."""
        answer = self.fileroot.with_suffix(".answer")
        common = [self.world_size, until, answer, self.yaml, f"cluster.fileroot={self.fileroot}", "++recover.mode=auto", *words]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo", "KILL_AT": str(kill_at)}
        ranks = []
        for rank in range(self.world_size):
            command = [sys.executable, ROOT / "tests/areal_itself.py", *map(str, (rank, *common))]
            with answer.with_suffix(f".log{rank}").open("wb") as log:
                ranks.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        try:
            ended = ranks[0].wait(timeout=240)
            if kill_at:
                assert ended == -9, answer.with_suffix(".log0").read_text()[-3000:]
                return []
            for number, rank in enumerate(ranks):
                assert rank.wait(timeout=60) == 0, answer.with_suffix(f".log{number}").read_text()[-3000:]
            return [torch.load(f"{answer}.{number}") for number in range(self.world_size)]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
            Path(f"{answer}.rendezvous").unlink(missing_ok=True)

    def ckptstore(self, verb: str, *words: str, code: int = 0) -> Any:
        """The command line's JSON."""
        command = [sys.executable, "-m", "ckptstore.recover", verb, "--config", str(self.yaml), "--json", *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([*command, f"cluster.fileroot={self.fileroot}"], capture_output=True, text=True, env=environment)
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout)

    def setup(self, *words: str, code: int = 0) -> Any:
        """For this AReaL, unless the words name another. AReaL has saved a moment ago: that is no sign that it runs."""
        areal = () if "--areal-version" in words else ("--areal-dir", AREAL.path)
        return self.ckptstore("setup", "--yes", "--force", *areal, *words, code=code)


@dataclass(frozen=True)
class Trained:
    """A trial that has saved, and what was true of it: after each step the weights and moments, before each the batch."""

    trial: Trial
    truth: list[dict[str, Any]]  #: of each rank
    export: int  #: the step that is brought back from an export


def make(root: Path, *, tied: bool, world_size: int, shuffle: bool) -> Trial:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=48, num_key_value_heads=1, tie_word_embeddings=tied, **sizes)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "model")
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(48)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(root / "model")
    text = YAML + (YAML_SINCE_1_0_3 if SKIPS_OPTIMIZER else YAML_BEFORE)
    (root / "run.yaml").write_text(text.format(root=root, world_size=world_size, shuffle=str(shuffle).lower()))
    return Trial(root / "run.yaml", root / "run", world_size)


def merged(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What two processes after each other have seen, by steps."""
    return [{key: a[key] | b[key] for key in ("batches", "after", "saves")} for a, b in zip(first, second, strict=True)]


@pytest.fixture(scope="module", params=[*TRIALS])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    tied, world_size, shuffle = TRIALS[request.param]
    trial = make(tmp_path_factory.mktemp("areal"), tied=tied, world_size=world_size, shuffle=shuffle)
    first = trial.train(ADOPTED + 2)
    assert first[0]["start"] is None
    trial.ckptstore("adopt")
    second = trial.train(UNTIL)
    assert second[0]["start"] == ADOPTED + 1
    assert same(second[0]["after"][ADOPTED + 1], first[0]["after"][ADOPTED + 1]), "this AReaL does not train the same twice"
    weights = [rounded(second[0]["after"][step]["weights"]) for step in range(ADOPTED + 1, UNTIL)]
    assert not any(same(a, b) for a, b in itertools.pairwise(weights)), "steps that no export tells apart"
    # From v1.0 on a resumed AReaL shuffles as in epoch 0: what follows then is what it would have had only there.
    return Trained(trial, merged(first, second), 3 if shuffle else 7)


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def rounded(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What an export holds of them: bfloat16."""
    return {name: weight.bfloat16().to(weight.dtype) for name, weight in weights.items()}


def judge(found: list[dict[str, Any]], truth: list[dict[str, Any]], said: Any, *, moments: str) -> None:
    """Whether AReaL has gone on with all of the step that setup `said`; `moments`: kept, zero, none."""
    step, first, after = said["checkpoint"]["step"], found[0], truth[0]["after"]
    in_order = not any("data order" in text for text in said["lost"])
    assert in_order or IN_HF_FILES, said
    for rank, one in enumerate(found):
        assert one["start"] == step + 1
        assert one["frequencies"] == EVERY
        for at, batch in one["batches"].items() if in_order else ():
            assert batch == truth[rank]["batches"][at], f"rank {rank} trained step {at} on other data"
    weights = after[step]["weights"] if moments == "kept" else rounded(after[step]["weights"])
    assert same(first["loaded"]["weights"], weights), f"other weights than step {step}'s"
    for group in first["settings"]:
        assert {key: group[key] for key in SETTINGS} == SETTINGS
    held = first["loaded"]["moments"]
    if moments == "kept":
        assert same(held, after[step]["moments"]), f"other moments than step {step}'s"
        for at, then in first["after"].items():
            assert same(then, after[at]), f"step {at} came out otherwise than without a break"
    elif moments == "zero":
        assert held.keys() == after[step]["moments"].keys()
        assert not any(value.any() for state in held.values() for value in state.values())
    else:
        assert held == {}
    names = [name for at in sorted(first["saves"]) if at <= step + 3 for name in first["saves"][at]]
    assert "recover_checkpoint" in names, "it makes no recover checkpoint any more"
    assert any(name.startswith("epoch") for name in names), "it exports no more"


def overrides(said: Any) -> list[str]:
    """The words that setup wants in the command that resumes."""
    return [need.partition(" ")[0] for need in said["needs"] if "in the command that resumes" in need]


def brought_back(trained: Trained, folder: Path, step: int, *words: str) -> tuple[Trial, Any]:
    """A copy of the trial after `setup --step`, and what that said."""
    trial = trained.trial.copied(folder / "run")
    said = trial.setup("--step", str(step), *words)
    assert said["checkpoint"]["step"] == step
    return trial, said


def test_from_an_export(trained: Trained, tmp_path: Path) -> None:
    trial, said = brought_back(trained, tmp_path, trained.export)
    words = overrides(said)
    assert bool(words) == SKIPS_OPTIMIZER
    judge(trial.train(trained.export + 4, *words), trained.truth, said, moments=FRESH)


@pytest.mark.skipif(not SKIPS_OPTIMIZER, reason="what setup makes for this AReaL anyway")
def test_from_an_export_with_a_fresh_optimizer(trained: Trained, tmp_path: Path) -> None:
    """As setup makes it where it does not find the AReaL that will train."""
    trial, said = brought_back(trained, tmp_path, trained.export, "--areal-version", "1.0.2")
    assert overrides(said) == []
    judge(trial.train(trained.export + 4), trained.truth, said, moments="zero")


def test_from_an_adopted_slot(trained: Trained, tmp_path: Path) -> None:
    trial, said = brought_back(trained, tmp_path, ADOPTED)
    assert overrides(said) == []
    judge(trial.train(ADOPTED + 4), trained.truth, said, moments="kept")


@pytest.mark.parametrize("trained", ["tied-1", "untied-2"], indirect=True)
def test_a_kill_in_the_middle_of_its_dump(trained: Trained, tmp_path: Path) -> None:
    """Over the slot that was whole: setup goes back to a step that still is, or on to the new one, never to some of each."""
    trial = trained.trial
    whole = trial.copied(tmp_path / "whole")
    went_on = whole.train(UNTIL + 6)
    truth = merged(trained.truth, went_on)
    for kill_at in range(2, went_on[0]["changes"] + 1, 3 * trial.world_size):  # of 14
        killed = trial.copied(tmp_path / f"killed-{kill_at}")
        trees.set_age(killed.folder, 3600)  # trainers dump minutes apart
        killed.train(UNTIL + 6, kill_at=kill_at)
        said = killed.setup()
        step = said["checkpoint"]["step"]
        found = killed.train(step + 4, *overrides(said))
        print(f"killed before change {kill_at}: {said['checkpoint']['kind']} of step {step}")
        judge(found, truth, said, moments="kept" if said["checkpoint"]["kind"] != "export" else FRESH)


@pytest.mark.parametrize("trained", ["tied-1"], indirect=True)
def test_a_flipped_bit_is_never_resumed_from(trained: Trained, tmp_path: Path) -> None:
    """In what ckptstore keeps: the step is refused where it is named, and passed over where it is not."""
    trial = trained.trial.copied(tmp_path / "run")
    files = (trial.folder.parent / ".ckptstore/trial0/adopted").glob("*/default/*")
    kept = max(files, key=lambda path: path.stat().st_size)
    trees.bitflip(kept, kept.stat().st_size // 2)
    slot = trial.folder / "default/recover_checkpoint"
    before = {path.name: path.read_bytes() for path in slot.iterdir()}
    assert "not those that the digest was made of" in trial.setup("--step", str(ADOPTED), code=3)["error"]
    assert {path.name: path.read_bytes() for path in slot.iterdir()} == before
    said = trial.setup("--max-step", str(ADOPTED))
    assert (said["checkpoint"]["step"], bool(said["skipped"])) == (1, True)
    judge(trial.train(ADOPTED + 3, *overrides(said)), trained.truth, said, moments=FRESH)


@pytest.mark.skipif(IN_HF_FILES, reason="safetensors hold no sums")
@pytest.mark.parametrize("trained", ["tied-1"], indirect=True)
def test_a_flipped_bit_in_its_own_slot(trained: Trained, tmp_path: Path) -> None:
    """Which AReaL loads without an error: torch's own CRC-32s tell, and the newest with optimizer state is taken."""
    trial = trained.trial.copied(tmp_path / "run")
    backend = LocalBackend(str(trial.folder))
    (part,) = scan(backend).slot.parts
    records = archives.checked(reader(backend, part), {file.name: file for file in part.files})
    largest = max((record for record in records if record.name.startswith("data/")), key=lambda record: record.length)
    file = Path(part.path, largest.file)
    times = file.stat()
    trees.bitflip(file, largest.offset + largest.length // 2)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert trial.train(UNTIL)[0]["start"] == UNTIL, "AReaL sees it itself"
    said = trial.setup()
    assert (said["checkpoint"]["kind"], said["checkpoint"]["step"]) == ("adopted", ADOPTED)
    assert "CRC-32" in str(said["skipped"])
    judge(trial.train(ADOPTED + 4), trained.truth, said, moments="kept")
