"""Continues prompts with a base model, or answers them with a fine-tuned one.

    python inference.py --checkpoint out/finetune "What is a list?" "Name three colours."
    python inference.py --checkpoint gpt2 --max-steps 50 "Hello, I'm a language model,"
    python inference.py --checkpoint out/finetune --prompts-file questions.txt --json
    echo "What is a list?" | python inference.py --checkpoint out/finetune
    python inference.py --checkpoint out/finetune --chat

A checkpoint that was fine-tuned carries the name of its prompt template, which is applied by
itself; --raw gives it the bare prompts. A file and standard input hold one prompt a line. All of a
prompt is text: "<|endoftext|>" in it is not the token that separates documents. In float32, a text
depends on its prompt and the seed alone, whatever prompts there are beside it; bfloat16 rounds a
hundred times as much, and more differently in another batch. A prompt that is given again has the
next seed.

--json prints one object a line: prompt, response, prompt_tokens (how many), tokens (the response's
ids), logprobs (of each, in nats, at temperature 1 and among all tokens) and finish_reason: "stop"
(the model emitted <|endoftext|>), "length" (--max-steps) or "context" (cut, for the context is
full). From Python, `tokenize_batch_input`, `generate`, `decode_generation` and `logprobs` of
sampling.py do the same.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from chat import chat, printing
from checkpoint import find_checkpoint, load_model, read_prompt_template
from config import UserError, flag, parse_config, run_main
from distributed import Dtype, pick_device, pick_dtype
from draws import Choice, row_seeds
from kernels import prepare_to_sample
from model import GPT
from sampling import (
    check_room,
    check_vocabulary,
    decode_generation,
    encode_prompts,
    finish_reasons,
    generate,
    generated_rows,
    logprobs,
    pad_rows,
)
from tokenizer import StreamDecoder, format_prompt, repair

ENDINGS = {"stop": "ended by <|endoftext|>", "length": "ended by --max-steps",
           "context": "cut: the context is full"}


@dataclass(frozen=True)
class InferenceConfig:
    prompts: tuple[str, ...] = flag((), "prompts (default: read standard input)", positional=True)
    checkpoint: str = flag("gpt2", "folder, OUT_DIR of a run, or hub name")
    prompts_file: str | None = flag(None, "a file with one prompt a line")
    chat: bool = flag(False, "a conversation instead of prompts")
    json: bool = flag(False, "one JSON object a line, with tokens and their log-probabilities")
    raw: bool = flag(False, "give the prompts to a fine-tuned model without its template")
    temperature: float = flag(0.8, "0 takes the likeliest token", minimum=0)
    top_k: int = flag(0, "only the k likeliest tokens; 0: all", minimum=0)
    top_p: float = flag(1.0, "only the likeliest tokens with this probability together; 1: all",
                       minimum=0)
    repetition_penalty: float = flag(1.0, "above 1: tokens that are there become less likely")
    max_steps: int = flag(128, "most tokens of an answer", minimum=1)
    batch_size: int = flag(8, "prompts that are continued at once", minimum=1)
    seed: int = flag(0, "of the samples", minimum=0, below=2**63)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Dtype = flag("auto", "of the weights; auto: bfloat16 on CUDA, float32 elsewhere")


def read_prompts(config: InferenceConfig) -> list[str]:
    """The prompts from the one place they were given in. Raises UserError for none or an empty."""
    if config.prompts and config.prompts_file:
        raise UserError("prompts given both as arguments and with --prompts-file: choose one")
    if config.prompts:
        prompts = list(map(repair, config.prompts))
    elif config.prompts_file:
        prompts = lines(Path(config.prompts_file).read_bytes(), config.prompts_file)
    else:
        if sys.stdin is not None and sys.stdin.isatty():
            print("one prompt a line, then Ctrl-D:", file=sys.stderr)
        prompts = [] if sys.stdin is None else lines(sys.stdin.buffer.read(), "standard input")
    if not prompts:
        raise UserError("no prompt given: as arguments, with --prompts-file or on standard input")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(f"prompt {number} of {len(prompts)} is empty")
    return prompts


def lines(data: bytes, source: str) -> list[str]:
    """The lines of a text in UTF-8, whatever ends them on the system it comes from, but for empty
    ones at its end. Not `splitlines`, which also cuts at characters like U+2028. Raises
    UserError."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is no UTF-8: {error}") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
    return text.split("\n") if text else []


def check_config(config: InferenceConfig) -> Choice:
    """How tokens are chosen. Raises UserError for settings that have no meaning, alone or
    together."""
    if config.chat and (config.prompts or config.prompts_file or config.json):
        raise UserError("--chat reads what is typed: it takes no prompts, --prompts-file or --json")
    if config.chat and config.batch_size != InferenceConfig.batch_size:
        raise UserError("--chat answers one message at a time: --batch-size has no meaning")
    if sys.stdout is None:
        raise UserError("standard output is closed: there is nowhere to print to")
    if config.chat and sys.stdin is None:
        raise UserError("--chat reads standard input, which is closed")
    return Choice(config.temperature, config.top_k, config.top_p, config.repetition_penalty)


def respond(model: GPT, config: InferenceConfig, choice: Choice, prompts: list[str],
            texts: list[str]) -> None:
    """Continues the texts that were made of the prompts, some at a time, and prints what comes; of
    a single one, every token as it comes."""
    rows = encode_prompts(texts)
    check_room(list(map(len, rows)), config.max_steps, model.config.block_size)  # of all, first
    seeds = row_seeds(texts, config.seed)
    is_streamed = len(texts) == 1 and not config.json
    for start in range(0, len(texts), config.batch_size):
        part = slice(start, start + config.batch_size)
        batch, decoder = pad_rows(rows[part]), StreamDecoder()
        if is_streamed:
            print(f"prompt:   {prompts[0]}\nresponse: ", end="", flush=True)
        output = generate(model, *batch, max_steps=config.max_steps, seed=seeds[part],
                          on_tokens=printing(decoder, [], []) if is_streamed else None,
                          **dataclasses.asdict(choice))
        if is_streamed:
            print(decoder.flush(), end="")
        show(model, config, prompts[part], batch[1], *output, is_streamed)


def show(model: GPT, config: InferenceConfig, prompts: list[str], prompt_masks: torch.Tensor,
         output_ids: torch.Tensor, output_masks: torch.Tensor, is_streamed: bool) -> None:
    """Prints the results of some prompts, but for what was streamed already."""
    responses = decode_generation(output_ids, output_masks, prompt_masks)
    rows = generated_rows(output_ids, output_masks, prompt_masks)
    lengths = prompt_masks.sum(1).tolist()
    reasons = finish_reasons(output_ids, output_masks, prompt_masks, config.max_steps)
    if config.json:
        with torch.no_grad():
            scores = logprobs(model, output_ids, output_masks).tolist()
    for i, prompt in enumerate(prompts):
        if config.json:
            print(json.dumps({
                "prompt": prompt, "response": responses[i], "prompt_tokens": lengths[i],
                "tokens": rows[i], "logprobs": scores[i][lengths[i] - 1 :][: len(rows[i])],
                "finish_reason": reasons[i]}), flush=True)
            continue
        if not is_streamed:
            print(f"prompt:   {prompt}\nresponse: {responses[i]}", end="")
        print(f"\n          [{len(rows[i])} tokens, {ENDINGS[reasons[i]]}]\n", flush=True)


def main() -> None:
    config = parse_config(InferenceConfig, description=__doc__)
    choice = check_config(config)
    prompts = [] if config.chat else read_prompts(config)
    device = pick_device(config.device)
    folder = find_checkpoint(config.checkpoint)
    use_template = not config.raw and read_prompt_template(folder) is not None
    model = load_model(folder, device)
    check_vocabulary(model, config.checkpoint)
    prepare_to_sample(model, pick_dtype(config.dtype, device))
    if config.chat:
        chat(model, choice, config.max_steps, config.seed, use_template)
    else:
        texts = [format_prompt(prompt) for prompt in prompts] if use_template else prompts
        respond(model, config, choice, prompts, texts)


if __name__ == "__main__":
    run_main(main)
