"""The documentation topics in every CPython (pydoc_data.topics), one token per character.

    python data_scripts/python_docs.py                   # no download, about 480,000 characters
    python data_scripts/python_docs.py --input FILE      # any UTF-8 text

The topics are in the order of their names, joined by blank lines. The first 90 % are the train
split, the rest is the val split. The text differs a little between versions of Python, so meta.json
has the version and the sha256.
The script writes data/python_docs: train.bin, val.bin, meta.json, and the characters as a
tokenizer.
"""

import hashlib
import platform

from striped_hf.cli import UserError, run
from striped_hf.data import prepare


def read_topics() -> tuple[str, prepare.Source]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            f"this Python comes without pydoc_data.topics ({error}); pass a text with --input FILE"
        ) from error
    text = "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"
    return text, {
        "name": f"pydoc_data.topics of Python {platform.python_version()}",
        "url": None,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def main() -> None:
    args = prepare.argument_parser(__doc__, "python_docs").parse_args()
    text, source = read_topics() if args.input is None else prepare.read_text(args.input)
    prepare.write_characters(args.output_dir, text, source)


if __name__ == "__main__":
    run(main)
