"""trainer.py, held in one step until a file exists: the time that a test needs to kill a rank.

    HOLD_AFTER=7 HOLD_UNTIL=/tmp/released torchrun ... tests/helpers/held_trainer.py FLAGS
"""

import itertools
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import trainer
from minigpt2.run import Run, run_training


def hold(steps: int, until: Path) -> None:
    """After `steps` steps of this process, waits in the next one until the file exists."""
    finish_step, count = Run.finish_step, itertools.count()

    def held(self, *arguments, **options):
        if next(count) == steps:
            while not until.exists():
                time.sleep(0.01)
        return finish_step(self, *arguments, **options)

    Run.finish_step = held


if __name__ == "__main__":
    hold(int(os.environ["HOLD_AFTER"]), Path(os.environ["HOLD_UNTIL"]))
    run_training(trainer.TrainerConfig, trainer.train, trainer.__doc__)
