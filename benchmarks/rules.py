"""How often rules on a reward object to healthy runs, and to runs that decline: `python benchmarks/rules.py [--runs 100]`.

The runs are made up, 1000 steps each: a reward is the mean over prompts of unequal difficulty, a group of answers each, as
GRPO has it. Healthy ones rise and level off; some get harder data, come through outages of the inference server, are sparse.
"""

from __future__ import annotations

import argparse

import numpy as np

from ckptstore.rules import REWARD, Collapse, Rule, Zero
from ckptstore.streak import Watch

STEPS = 1000
HEALTHY = ("rising", "harder data", "slight overfit", "outages", "sparse", "easy to hard", "from -1 to 1")
RULES: dict[str, Rule] = {
    "zero (the default)": Zero(),
    "collapse (as it is)": Collapse(),
    "collapse: {drop: 0.5, halflife_steps: 200}": Collapse(drop=0.5, halflife_steps=200),
    "collapse: {drop: 0.6, halflife_steps: 200, patience: 50}": Collapse(drop=0.6, halflife_steps=200, patience=50),
    "collapse: {drop: 0.7, halflife_steps: 200}": Collapse(drop=0.7, halflife_steps=200),
}


def measured(random: np.random.Generator, chances: np.ndarray, prompts: int) -> np.ndarray:
    """What a trainer would log of the chance to be right at each step."""
    answers, spread = int(random.choice([4, 8, 16])), random.uniform(0.5, 4)
    a, b = np.maximum(chances * spread, 1e-3), np.maximum((1 - chances) * spread, 1e-3)
    each = random.beta(a[:, None], b[:, None], (len(chances), prompts)) * (chances > 0)[:, None]
    return np.asarray(random.binomial(answers, each).mean(axis=1) / answers)


def healthy(kind: str, random: np.random.Generator) -> np.ndarray:
    """A run's rewards."""
    at, prompts = np.arange(STEPS), int(random.choice([8, 16, 32, 64, 128, 256]))
    low = random.uniform(0.02, 0.5)
    high = min(0.97, low + random.uniform(0.05, 0.6))
    chances = high - (high - low) * np.exp(-at / random.uniform(50, 400))
    if kind == "harder data":
        for begin in random.integers(150, STEPS, int(random.integers(1, 4))):
            left, lasts = random.uniform(0.25, 0.9), random.uniform(50, 400)
            learned = 1 - np.exp(-(at - begin) / lasts) if random.random() < 0.6 else 0.0
            chances = np.where(at >= begin, chances * (left + (1 - left) * learned), chances)
    elif kind == "slight overfit":
        begin, left = int(random.integers(300, 700)), random.uniform(0.7, 1)
        chances = chances * (1 - (1 - left) * np.clip((at - begin) / (STEPS - begin), 0, 1))
    elif kind == "outages":
        for begin in random.integers(50, STEPS - 10, 4):
            chances[begin : begin + int(random.integers(1, 6))] = 0
    elif kind == "sparse":
        chances, prompts = np.linspace(random.uniform(0.002, 0.02), random.uniform(0.02, 0.1), STEPS), 16
    elif kind == "easy to hard":  # in each epoch anew
        wave = 0.5 + 0.5 * np.sin(2 * np.pi * at / random.integers(50, 250))
        chances = chances * (1 - random.uniform(0.2, 0.6) * wave)
    rewards = measured(random, chances, prompts)
    return 2 * rewards - 1 if kind == "from -1 to 1" else rewards


def declining(random: np.random.Generator, *, to: float, over: int) -> tuple[np.ndarray, int]:
    """A run's rewards that fall from 0.6 to `to` over so many steps, and where they have fallen."""
    at, begin = np.arange(STEPS), int(random.integers(150, 400))
    chances = 0.6 - 0.2 * np.exp(-at / 60)
    chances = chances + (to - chances) * np.clip((at - begin) / over, 0, 1)
    return measured(random, chances, int(random.choice([8, 16, 32, 64, 128, 256]))), begin + over


def objects_at(rule: Rule, rewards: np.ndarray) -> int:
    """The step at which a breaker with this rule halts; -1 where it never does."""
    watch = Watch(rule)
    for step, reward in enumerate(rewards.tolist()):
        watch.look({REWARD: reward}.get, step)
        if watch.tripped:
            return step
    return -1


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="of each kind")
    runs = parser.parse_args().runs
    well = {
        kind: [healthy(kind, np.random.default_rng([number, i])) for i in range(runs)] for number, kind in enumerate(HEALTHY)
    }
    ill = [declining(np.random.default_rng([99, i]), to=0.1, over=300) for i in range(2 * runs)]
    for name, rule in RULES.items():
        alarms = {kind: sum(objects_at(rule, rewards) >= 0 for rewards in many) for kind, many in well.items()}
        found = [step - end for rewards, end in ill if (step := objects_at(rule, rewards)) >= 0]
        late = f", {np.median(found):+.0f} steps from the end of the decline (median)" if found else ""
        print(name)
        print(f"    false alarms: {sum(alarms.values())} of {runs * len(well)}: {alarms}")
        print(f"    0.6 to 0.1 over 300 steps: found {len(found)} of {len(ill)}{late}")


if __name__ == "__main__":
    main()
