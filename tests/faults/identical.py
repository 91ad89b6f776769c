"""Two to eight identical commands at once, on the same store. Some are killed."""

from __future__ import annotations

import random
import signal
import time

from oracle import STAGES, Laboratory, Outcome, differences, end_family, leftovers

# Commands are forks of one process, and Ray 2.60 draws the id of its first object from the same random numbers in each. Two that
# connect within the same milliseconds abort (WarmupStore), which commands of their own processes do not.
_APART_SECONDS = 0.2


def identical(lab: Laboratory, rng: random.Random) -> list[Outcome]:
    stage = rng.choice(("token_map", "train", "generate", "reference", "evaluate", "tokenizer", "report"))
    num_runs = rng.choice((2, 2, 2, 3, 3, 4, 8))
    num_killed = rng.choice((0, 0, 1)) if num_runs > 2 else 0
    store = lab.copy_before(lab.folder / "work", stage)
    outcome = Outcome(f"{stage}: {num_runs} at once, {num_killed} killed")
    cluster = lab.cluster
    commands = []
    for _ in range(num_runs):
        commands.append(lab.start(*lab.run_of(lab.folder / "work", stage), cluster=cluster))
        time.sleep(_APART_SECONDS)
    if num_killed:
        time.sleep(rng.uniform(0, lab.points[stage]["seconds"]))
        end_family(commands[0].pid)
    codes = [command.wait() for command in commands]
    texts = "".join(command.text for command in commands)
    outcome.log, outcome.is_rough = str(commands[-1].log), "Traceback" in texts
    if any(line.startswith("enat: ") for line in texts.splitlines()):
        outcome.verdict = "detected"
    expected = [(0, -signal.SIGKILL) if number < num_killed else (0,) for number in range(num_runs)]
    if any(code not in allowed for code, allowed in zip(codes, expected, strict=True)):
        outcome.verdict, outcome.note = "hung" if None in codes else "lost", f"exit codes {codes}"
    elif wrong := differences(store, lab.oracle, STAGES[: STAGES.index(stage) + 1]):
        outcome.verdict, outcome.note = "silent", "; ".join(wrong[:3])
    elif twice := leftovers(store):
        outcome.verdict, outcome.note = "doubled", ", ".join(twice[:3])
    return [outcome]
