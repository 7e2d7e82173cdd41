"""Sample text from a trained model: a run's folder, or a name on the hub.

    python recipes/sample.py out/shakespeare_char --start "ROMEO:" --num_samples 2
    python recipes/sample.py gpt2-xl --start FILE:prompt.txt --max_new_tokens 100

The text goes on past the model's context: each token is then drawn from the last ones that fit.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from striped_hf.cli import UserError, is_main_process, load_pretrained, run


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


def encode(tokenizer, start: str) -> torch.Tensor:
    """Returns the prompt's tokens, [1, L]."""
    if start.startswith("FILE:"):
        start = Path(start.removeprefix("FILE:")).read_text(encoding="utf-8")
    try:
        ids = tokenizer(start, return_tensors="pt")["input_ids"].long()
    except Exception as error:  # what tokenizers raises for an unknown character has no class
        raise UserError(
            f"--start {start!r} has characters unknown to the model: {error}"
        ) from error
    if ids.numel() > 0:
        return ids
    if tokenizer.bos_token_id is None:
        raise UserError("--start is empty, and this model has no token to begin with: pass a text")
    return torch.tensor([[tokenizer.bos_token_id]])


@torch.inference_mode()
def main() -> None:
    if not is_main_process():
        return  # one process samples, whoever launched several
    args = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_pretrained(AutoModelForCausalLM, args.model).to(device).eval()
    tokenizer = load_pretrained(AutoTokenizer, args.model)
    set_seed(args.seed)

    ids = encode(tokenizer, args.start).to(device).repeat(args.num_samples, 1)
    length = ids.shape[1] + args.max_new_tokens
    context = getattr(model.config, "max_position_embeddings", length)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k}
    while ids.shape[1] < length:
        # all that still fits at once, with the cache; then token by token over a sliding window
        window = ids[:, -(context - 1) :]
        new = min(length - ids.shape[1], context - window.shape[1])
        out = model.generate(
            window, attention_mask=torch.ones_like(window), max_new_tokens=new, **sampling
        )
        ids = torch.cat((ids, out[:, window.shape[1] :]), dim=1)
        if out.shape[1] < window.shape[1] + new:
            break  # every sample came to its end
    for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
        print(f"{text}\n---------------")


if __name__ == "__main__":
    run(main)
