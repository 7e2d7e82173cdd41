"""Tiny Shakespeare in GPT-2's BPE (301,966 train and 36,059 val tokens) or a given model's tokens.

    python data_scripts/shakespeare.py                           # downloads 1.1 MB
    python data_scripts/shakespeare.py --input input.txt         # any UTF-8 text
    python data_scripts/shakespeare.py --tokenizer path/to/model --output_dir data/shakespeare_model

The script writes data/shakespeare: train.bin and val.bin (the same as nanoGPT's
data/shakespeare/prepare.py), meta.json, and the tokenizer. tiktoken encodes and downloads GPT-2's
vocabulary once. To work without a network, set TIKTOKEN_CACHE_DIR to a folder with the vocabulary.
"""

from striped_hf.cli import run
from striped_hf.data import prepare


def main() -> None:
    parser = prepare.argument_parser(__doc__, "shakespeare")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME_OR_FOLDER",
        help="a model with the tokenizer to use: a hub name or a local folder (default: GPT-2's "
        "BPE by tiktoken)",
    )
    args = parser.parse_args()
    text, source = prepare.read_shakespeare(args)
    if args.tokenizer is not None:
        prepare.write_model_tokens(args.output_dir, text, source, args.tokenizer)
        return
    expected = (50_257, 301_966, 36_059) if source is prepare.TINY_SHAKESPEARE else None
    prepare.write_gpt2_tokens(args.output_dir, text, source, expected)


if __name__ == "__main__":
    run(main)
