"""The state of an AdamW that has not stepped yet, as AReaL's FSDP engine keeps it in its recover checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptstore.config import RunConfig
from ckptstore.errors import RefusedError
from ckptstore.formats.dcp_writer import Item, KeyPath, ObjectItem, TensorItem
from ckptstore.formats.pickling import Value


@dataclass(frozen=True, slots=True)
class AdamW:
    """The optimizer's settings: AReaL's defaults from v0.4.0 on. What a checkpoint says of them beats the run's YAML."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    fused: bool | None = True
    initial_lr: float | None = None  #: that of the schedule; None: lr

    def group(self, params: Sequence[str] | Sequence[int]) -> dict[str, Value]:
        """The one parameter group. Its keys are those that torch 2.6 and 2.13 ask for: loaders ignore more."""
        return {
            "lr": self.lr,
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "amsgrad": False,
            "maximize": False,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": self.fused,
            "decoupled_weight_decay": True,  # not asked for by 2.6
            "initial_lr": self.lr if self.initial_lr is None else self.initial_lr,  # set by any LR schedule
            "params": list(params),
        }


_ERA_A = AdamW(lr=2e-5, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.05)


def from_config(config: RunConfig | None, part: str, era: str) -> AdamW:
    """The settings that the run's YAML gives (`actor.optimizer:`, `critic.optimizer:`), that era's defaults for the rest.

    They must come from there: what the slot says beats the YAML once it is loaded, for the first step at least, and the
    first step of a fresh Adam moves each weight by the whole learning rate. RefusedError where the YAML does not tell it.
    """
    block = f"{'critic' if part == 'critic' else 'actor'}.optimizer"
    default = _ERA_A if era == "A" else AdamW()
    lr = config.get(f"{block}.lr") if config is not None else None
    if config is None or lr is None:
        raise RefusedError(
            f"nothing tells the learning rate ({block}.lr) of the fresh optimizer, and AReaL takes it from the slot",
            hint="Give the run's YAML with --config." if config is None else f"Say {block}.lr=…, as the trainer has it.",
        )

    def number(name: str, default: float) -> float:
        if config.unread and config.get(f"{block}.{name}") is None:
            raise RefusedError(
                f"{block}.{name} of the fresh optimizer may be in {config.unread}, which {config.path} names and is not read",
                hint=f"Say {block}.{name}=…, or give --config the whole YAML that AReaL keeps with the run's logs.",
            )
        return _number(config.get(f"{block}.{name}", default), f"{block}.{name}")

    return AdamW(
        lr=_number(lr, f"{block}.lr"),
        betas=(number("beta1", default.betas[0]), number("beta2", default.betas[1])),
        eps=number("eps", default.eps),
        weight_decay=number("weight_decay", default.weight_decay),
    )


def _number(value: object, key: str) -> float:
    """A number, also one in quotes, as OmegaConf would convert it."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)
        if not 0 <= number < math.inf:
            raise ValueError
    except (ValueError, OverflowError):
        raise RefusedError(f"{key} is {value!r:.40}, which is no number from 0", hint="Correct the YAML.") from None
    return number


def entries(settings: AdamW, parameters: Mapping[str, tuple[str, tuple[int, ...]]]) -> Iterator[tuple[KeyPath, Item]]:
    """What a DCP checkpoint holds for these parameters (name → dtype and shape): moments of zeros, no step taken."""
    for name, (dtype, shape) in parameters.items():
        state = ("dcp", "optim", "state", name)
        yield (*state, "step"), TensorItem("float32", (), None)
        yield (*state, "exp_avg"), TensorItem(dtype, shape, None)
        yield (*state, "exp_avg_sq"), TensorItem(dtype, shape, None)
    for key, value in settings.group(list(parameters)).items():
        yield ("dcp", "optim", "param_groups", 0, key), ObjectItem(value)


def empty_state(settings: AdamW, count: int) -> Value:
    """What `optimizer.state_dict()` is for `count` parameters before the first step."""
    return {"state": {}, "param_groups": [settings.group(range(count))]}
