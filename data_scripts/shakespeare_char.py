"""Tiny Shakespeare, one token per character: 65 symbols, 1,003,854 train and 111,540 val tokens.

    python data_scripts/shakespeare_char.py                      # downloads 1.1 MB
    python data_scripts/shakespeare_char.py --input input.txt    # any UTF-8 text, no network

The script writes data/shakespeare_char: train.bin and val.bin (the same as nanoGPT's
data/shakespeare_char/prepare.py), meta.json, and the characters as a tokenizer for AutoTokenizer.
"""

from striped_hf.cli import run
from striped_hf.data import prepare


def main() -> None:
    args = prepare.argument_parser(__doc__, "shakespeare_char").parse_args()
    text, source = prepare.read_shakespeare(args)
    expected = (65, 1_003_854, 111_540) if source is prepare.TINY_SHAKESPEARE else None
    prepare.write_characters(args.output_dir, text, source, expected)


if __name__ == "__main__":
    run(main)
