"""OpenWebText in GPT-2's BPE: 8,013,769 documents, 9,035,582,198 train and 4,434,897 val tokens.

    python data_scripts/openwebtext.py                               # network; 54 GB on disk
    python data_scripts/openwebtext.py --data_files part-*.parquet   # or .jsonl, or .txt
    python data_scripts/openwebtext.py --dataset_name HuggingFaceFW/fineweb-edu \\
        --dataset_config_name sample-10BT --output_dir data/fineweb_edu

It reads any data set of `datasets.load_dataset` with a column "text" of strings. In a text file,
each paragraph is a document. An end-of-text token follows every document. The val split is 0.05 %
of the documents, the same ones as in nanoGPT's data/openwebtext/prepare.py. A small data set needs
a larger --val_fraction.
The script writes data/openwebtext: train.bin and val.bin (uint16, 18 GB), meta.json and the
tokenizer. A stopped run continues if it is started again with the same arguments. tiktoken encodes
and downloads GPT-2's vocabulary once. To work without a network, set TIKTOKEN_CACHE_DIR to a folder
with the vocabulary.
"""

import argparse
import os
from pathlib import Path

from striped_hf.cli import UserError, run
from striped_hf.data.documents import VAL_FRACTION, load_documents, write_documents

NAME = "openwebtext"
EXPECTED = (8_013_769, 9_035_582_198, 4_434_897)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset_name", metavar="NAME", default=NAME, help="hub name (default: %(default)s)"
    )
    parser.add_argument(
        "--dataset_config_name", metavar="NAME", help="its configuration, if it has several"
    )
    parser.add_argument(
        "--data_files",
        nargs="+",
        metavar="FILE",
        help="parquet, JSON lines or text files to use instead of the hub",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        default=Path("data", NAME),
        help="where train.bin, val.bin, meta.json and the tokenizer go (default: %(default)s)",
    )
    parser.add_argument(
        "--num_proc",
        type=int,
        metavar="N",
        default=os.cpu_count(),
        help="processes that encode (default: %(default)s, one per core)",
    )
    parser.add_argument(
        "--val_fraction",
        type=float,
        metavar="SHARE",
        default=VAL_FRACTION,
        help="share of the documents in the val split (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.num_proc < 1:
        raise UserError(f"--num_proc {args.num_proc}: pass at least 1")
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction:g}: pass a share between 0 and 1")
    documents = load_documents(args.dataset_name, args.dataset_config_name, args.data_files)
    name = args.dataset_name
    if args.dataset_config_name:
        name += f", {args.dataset_config_name}"
    source: dict[str, str | None] = {
        "name": name,
        "url": f"https://huggingface.co/datasets/{args.dataset_name}",
    }
    if args.data_files:
        source = {"name": " ".join(Path(f).name for f in args.data_files), "url": None}
    source["sha256"] = None
    meta = write_documents(
        args.output_dir, documents, source, args.num_proc, val_fraction=args.val_fraction
    )

    counts = (len(documents), meta["tokens"]["train"], meta["tokens"]["val"])
    is_nanogpts = name == NAME and not args.data_files and args.val_fraction == VAL_FRACTION
    known = EXPECTED if is_nanogpts else None
    print(f"{args.output_dir}: {source['name']} as gpt2")
    for what, count, expected in zip(
        ("documents", "train tokens", "val tokens"), counts, known or (None,) * 3, strict=True
    ):
        print(f"{what:>12} {count:>13,}" + (f"  expected {expected:>13,}" if expected else ""))
    if known and counts != known:
        raise UserError(
            f"{args.output_dir} is complete, but its counts differ from the known counts of "
            "OpenWebText: the hub's copy differs from the copy that nanoGPT used"
        )


if __name__ == "__main__":
    run(main)
