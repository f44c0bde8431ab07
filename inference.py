"""Continues prompts with a base model, or answers them with a fine-tuned one.

    python inference.py --checkpoint out/finetune "What is a list?" "Name three colours."
    python inference.py --checkpoint gpt2 --max-steps 50 "Hello, I'm a language model,"
    python inference.py --checkpoint out/finetune --prompts-file questions.txt
    echo "What is a list?" | python inference.py --checkpoint out/finetune

A checkpoint that was fine-tuned carries the name of its prompt template, which is applied by
itself; --raw gives it the bare prompts. A file and standard input hold one prompt a line. From
Python, `tokenize_batch_input`, `generate` and `decode_generation` do the same.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from checkpoint import find_checkpoint, load_model, read_prompt_template
from config import UserError, flag, parse_config, run_main
from distributed import pick_device
from sampling import check_vocabulary, decode_generation, generate, tokenize_batch_input
from tokenizer import EOT_TOKEN, format_prompt


@dataclass(frozen=True)
class InferenceConfig:
    prompts: tuple[str, ...] = flag((), "prompts (default: read standard input)", positional=True)
    checkpoint: str = flag("gpt2", "folder, OUT_DIR of a run, or hub name")
    prompts_file: str | None = flag(None, "a file with one prompt a line")
    raw: bool = flag(False, "give the prompts to a fine-tuned model without its template")
    temperature: float = flag(0.8, "0 takes the likeliest token", minimum=0)
    max_steps: int = flag(128, "most tokens of an answer", minimum=1)
    seed: int = flag(0, "of the samples", minimum=0, below=2**63)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")


def read_prompts(config: InferenceConfig) -> list[str]:
    """The prompts from the one place they were given in. Raises UserError for none or an empty."""
    if config.prompts and config.prompts_file:
        raise UserError("prompts given both as arguments and with --prompts-file: choose one")
    if config.prompts:
        prompts = list(config.prompts)
    elif config.prompts_file:
        try:
            prompts = lines(Path(config.prompts_file).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --prompts-file {config.prompts_file}: {error}") from None
    else:
        if sys.stdin is not None and sys.stdin.isatty():
            print("one prompt a line, then Ctrl-D:", file=sys.stderr)
        prompts = [] if sys.stdin is None else lines(sys.stdin.read())
    if not prompts:
        raise UserError("no prompt given: as arguments, with --prompts-file or on standard input")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(f"prompt {number} of {len(prompts)} is empty")
    return prompts


def lines(text: str) -> list[str]:
    """Without their ends. Not `splitlines`, which also cuts at characters like U+2028."""
    return text.removesuffix("\n").replace("\r\n", "\n").split("\n") if text else []


def why_it_ended(last_token: int, length: int, block_size: int) -> str:
    if last_token == EOT_TOKEN:
        return "<|endoftext|>"
    return "context full" if length >= block_size else "--max-steps"


def main() -> None:
    config = parse_config(InferenceConfig, description=__doc__)
    prompts = read_prompts(config)
    folder = find_checkpoint(config.checkpoint)
    template = None if config.raw else read_prompt_template(folder)
    texts = [format_prompt(prompt) for prompt in prompts] if template else prompts
    input_ids, masks = tokenize_batch_input(texts)
    model = load_model(folder, pick_device(config.device))
    check_vocabulary(model, config.checkpoint)
    output_ids, output_masks = generate(model, input_ids, masks, config.temperature,
                                        config.max_steps, seed=config.seed)
    answers = decode_generation(output_ids, output_masks, prompt_masks=masks)
    lengths = output_masks.sum(1)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        last = int(output_ids[i, lengths[i] - 1])
        reason = why_it_ended(last, int(lengths[i]), model.config.block_size)
        print(f"prompt:   {prompt}\nresponse: {answer}\n"
              f"          [{int(lengths[i] - masks[i].sum())} tokens, ended by {reason}]\n")


if __name__ == "__main__":
    run_main(main)
