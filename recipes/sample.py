"""Sample text from a trained model: a run's folder, or a name on the hub.

    python recipes/sample.py out/shakespeare_char --start "ROMEO:" --num_samples 2
    python recipes/sample.py gpt2-xl --start FILE:prompt.txt --max_new_tokens 100

A text may be longer than the model's context; later tokens depend only on the last ones that fit.
A sample stops at an end-of-text token.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from striped_hf.cli import UserError, is_main_process, load_pretrained, run
from striped_hf.pretrained import encode, load_tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a run's folder, or a name on the hub")
    parser.add_argument("--start", default="\n", help="the prompt, or FILE:path of a file with it")
    parser.add_argument("--num_samples", type=int, default=3)
    parser.add_argument("--max_new_tokens", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=0.8, help="below 1: less random")
    parser.add_argument("--top_k", type=int, default=200, help="draw from the k most likely tokens")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args()
    for name in ("num_samples", "max_new_tokens", "top_k", "temperature"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name)}: pass a number above 0")
    return args


def encode_prompt(tokenizer: Any, start: str) -> torch.Tensor:
    """Returns the prompt's tokens, [1, L]."""
    source = "--start"
    if start.startswith("FILE:"):
        path = Path(start.removeprefix("FILE:"))
        source = f"--start FILE:{path}"
        try:
            start = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{source} is not UTF-8 text ({error}): convert it") from error
    ids = encode(tokenizer, start, source)
    if not ids and tokenizer.bos_token_id is None:
        raise UserError(
            "--start is empty, and this model has no beginning-of-text token: pass a text"
        )
    return torch.tensor([ids or [tokenizer.bos_token_id]])


def generate(model: PreTrainedModel, prompts: torch.Tensor, args: argparse.Namespace) -> list[Any]:
    """Continues prompts [N, L]; returns the tokens of each, up to its end-of-text token."""
    generation: Any = model.generation_config
    ends = torch.as_tensor(generation.eos_token_id if generation.eos_token_id is not None else [])
    ends = ends.view(-1).to(prompts.device)
    length = prompts.shape[1] + args.max_new_tokens
    context = getattr(model.config, "max_position_embeddings", None) or length
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k}
    samples: list[Any] = [None] * len(prompts)
    ids, numbers = prompts, torch.arange(len(prompts))  # unfinished samples, and their indices
    while len(ids) and ids.shape[1] < length:
        # as many tokens as fit into the context at once; then one at a time over a sliding window
        window = ids[:, -max(1, context - 1) :]
        count = min(length - ids.shape[1], max(1, context - window.shape[1]))
        out = model.generate(  # type: ignore[operator]
            window, attention_mask=torch.ones_like(window), max_new_tokens=count, **sampling
        )
        new = out[:, window.shape[1] :]
        ended = torch.isin(new, ends)
        for row in ended.any(1).nonzero().flatten().tolist():
            end = int(ended[row].int().argmax()) + 1  # padding follows
            samples[int(numbers[row])] = torch.cat((ids[row], new[row, :end]))
        go_on = ~ended.any(1)
        ids, numbers = torch.cat((ids, new), dim=1)[go_on], numbers[go_on.cpu()]
    for number, sample in zip(numbers.tolist(), ids, strict=True):
        samples[number] = sample
    return samples


@torch.inference_mode()
def main() -> None:
    if not is_main_process():
        return  # only the main process of a launch samples
    args = parse_arguments()
    # the console's encoding may lack characters of the text
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_pretrained(AutoModelForCausalLM, args.model).to(device).eval()
    tokenizer: Any = load_tokenizer(args.model)
    set_seed(args.seed)
    prompts = encode_prompt(tokenizer, args.start).to(device).repeat(args.num_samples, 1)
    for ids in generate(model, prompts, args):
        print(f"{tokenizer.decode(ids, skip_special_tokens=True)}\n---------------")


if __name__ == "__main__":
    run(main)
