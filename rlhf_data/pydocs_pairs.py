"""Writes preference pairs about the pydocs corpus: a right answer against a worse one.

    python rlhf_data/pydocs_pairs.py

Writes rows {"instruction", "chosen", "rejected"} with the questions of pydocs_questions.py. The
rejected answer is, in turn, that of another symbol of the same kind, the right answer cut in its
middle, or the right answer said twice: neither length nor the last character alone decides.
"""

import pathlib
import random
import sys
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from finetune_data.rows import write_rows
from minigpt2.config import ROOT, flag, parse_config, run_main
from pretrain_data.pydocs import question_and_answer, read_documents


@dataclass(frozen=True)
class PairsConfig:
    out: str = flag(str(ROOT / "rlhf_data" / "pydocs_pairs.json"), "file to write", is_path=True)


def make_rows(answers: dict[str, str]) -> list[dict[str, str]]:
    """A pair for each question, in a seeded order, given question -> answer; no equal answers."""
    order = random.Random(1337)
    questions = sorted(answers)
    order.shuffle(questions)
    kinds: dict[str, list[str]] = {}  # "What is the Python class" -> its answers
    for question in questions:
        kinds.setdefault(" ".join(question.split()[:5]), []).append(answers[question])
    rows = []
    for i, question in enumerate(questions):
        chosen, words = answers[question], answers[question].split()
        rejected = (order.choice(kinds[" ".join(question.split()[:5])]),
                    " ".join(words[: (len(words) + 1) // 2]), f"{chosen} {chosen}")[i % 3]
        if rejected != chosen:
            rows.append({"instruction": question, "chosen": chosen, "rejected": rejected})
    return rows


def main() -> None:
    config = parse_config(PairsConfig, description=__doc__)
    pairs = list(filter(None, map(question_and_answer, read_documents())))
    answers = dict(reversed(pairs))  # the first answer to a repeated question
    write_rows(pathlib.Path(config.out), make_rows(answers))


if __name__ == "__main__":
    run_main(main)
