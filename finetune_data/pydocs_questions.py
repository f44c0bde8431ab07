"""Writes questions about the pydocs corpus in Alpaca's format, with the answers it contains.

    python finetune_data/pydocs_questions.py --names 300

Writes up to about 14,000 rows such as "What does the Python function json.dumps do?" with the first
sentence of its documentation.
"""

import pathlib
import random
import sys
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from finetune_data.rows import write_rows
from minigpt2.config import flag, parse_config, run_main
from pretrain_data.pydocs import WORDINGS, most_mentioned, question_and_answer, read_documents


@dataclass(frozen=True)
class QuestionsConfig:
    out: str = flag(str(pathlib.Path(__file__).resolve().parent / "pydocs_questions.json"),
                    "file to write", is_path=True)
    names: int | None = flag(None, "ask only about this many names of the standard library, those "
                             "mentioned most often, but in five wordings", minimum=1)


def main() -> None:
    config = parse_config(QuestionsConfig, description=__doc__)
    documents, wordings = read_documents(), [""]
    if config.names:
        documents, wordings = most_mentioned(documents, config.names), ["", *WORDINGS]
    pairs = [question_and_answer(document, wording) for document in documents
             for wording in wordings]
    answers = dict(reversed(list(filter(None, pairs))))  # keep the first to a repeated question
    rows = [{"instruction": question, "input": "", "output": answer}
            for question, answer in answers.items()]
    random.Random(1337).shuffle(rows)
    write_rows(pathlib.Path(config.out), rows)


if __name__ == "__main__":
    run_main(main)
