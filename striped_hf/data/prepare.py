"""Helpers of the scripts in ``data_scripts/``: sources, tokenizers, and writing."""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from http.client import HTTPException
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tiktoken.load import read_file_cached
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from striped_hf.cli import UserError, one_line
from striped_hf.data.characters import character_tokenizer
from striped_hf.data.tokens import write_data_set
from striped_hf.pretrained import encode, load_tokenizer

Source = dict[str, str | None]

TINY_SHAKESPEARE: Source = {
    "name": "tiny Shakespeare",
    "url": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}

# GPT-2's published vocabulary, the two files of tiktoken's "gpt2" encoding:
# (name in a Hugging Face tokenizer folder, URL, sha256)
_GPT2_FILES = (
    (
        "merges.txt",
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
    (
        "vocab.json",
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
)


def argument_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Makes a parser with the flags of a data script.

    Args:
        description: The script's docstring.
        name: The name of the script and its data set: ``--output_dir`` defaults to data/NAME.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", type=Path, metavar="FILE", help="a UTF-8 text to use instead of the source"
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        metavar="DIR",
        default=Path("data", name),
        help="where train.bin, val.bin, meta.json and the tokenizer go (default: %(default)s)",
    )
    return parser


def download(url: str, sha256: str, path: Path) -> None:
    """Downloads a file with a progress bar, unless it exists with the right checksum.

    Args:
        url: The URL of the file.
        sha256: The checksum of the file, as hexadecimal digits.
        path: The file to write: under a temporary name, which is then renamed.

    Raises:
        UserError: If the download fails or has another checksum.
    """
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        print(f"using {path}, downloaded before")
        return
    print(f"downloading {url}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: the checksum differs
        raise UserError(
            f"cannot download {url}: fetch it where there is a network and pass it with "
            f"--input FILE ({one_line(error)})"
        ) from error


def read_text(path: Path) -> tuple[str, Source]:
    """Reads a source text and describes its origin.

    As in nanoGPT, line ends become "\\n" and a byte order mark stays a character.

    Args:
        path: A UTF-8 file.

    Returns:
        The text; and its name, its URL (None if not known) and the sha256 of its bytes.

    Raises:
        UserError: If the file is not UTF-8, or too short to be split.
        OSError: If the file cannot be read.
    """
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if len(text) < 2:
        raise UserError(f"{path} holds {len(text)} characters: too short to be split in two")
    if sha256 == TINY_SHAKESPEARE["sha256"]:
        return text, TINY_SHAKESPEARE
    return text, {"name": path.name, "url": None, "sha256": sha256}


def read_shakespeare(args: argparse.Namespace) -> tuple[str, Source]:
    """Reads ``--input``, or tiny Shakespeare, which is downloaded into ``--output_dir`` once."""
    path = args.input
    if path is None:
        path = args.output_dir / "tinyshakespeare.txt"
        download(str(TINY_SHAKESPEARE["url"]), str(TINY_SHAKESPEARE["sha256"]), path)
    return read_text(path)


def gpt2_tokenizer() -> PreTrainedTokenizerBase:
    """Makes GPT-2's Hugging Face tokenizer from the files that tiktoken downloads and caches.

    Raises:
        OSError, ValueError: If tiktoken has them neither in its cache nor from the network.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name, url, sha256 in _GPT2_FILES:
            Path(folder, name).write_bytes(read_file_cached(url, sha256))
        # from a folder: the names of the keywords differ between transformers 4 and 5, and with
        # the old names version 5 makes an empty vocabulary
        return AutoTokenizer.from_pretrained(folder, tokenizer_type="gpt2", model_max_length=1024)


def gpt2_encoding(otherwise: str = "") -> tuple[tiktoken.Encoding, PreTrainedTokenizerBase]:
    """Loads GPT-2's BPE from tiktoken, and makes the matching Hugging Face tokenizer.

    Args:
        otherwise: Another fix for the end of the error message.

    Raises:
        UserError: If tiktoken has the vocabulary neither in its cache nor from the network.
    """
    try:
        return tiktoken.get_encoding("gpt2"), gpt2_tokenizer()
    except (OSError, ValueError) as error:
        raise UserError(
            "tiktoken cannot load GPT-2's vocabulary: run once where there is a network, or set "
            f"TIKTOKEN_CACHE_DIR to a cache filled there{otherwise} ({one_line(error)})"
        ) from error


def write_characters(
    output_dir: Path, text: str, source: Source, expected: tuple[int, int, int] | None = None
) -> None:
    """Writes a text as a data set of characters; ids are indices into the sorted set of symbols.

    Args:
        output_dir: The data set's folder.
        text: The text. The first 90 % are the train split, the rest is the val split.
        source: The origin of the text.
        expected: The known numbers of symbols, train tokens and val tokens, if any.

    Raises:
        UserError: If the numbers differ from ``expected``.
    """
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    symbols, ids = np.unique(code_points, return_inverse=True)
    cut = _cut(text)
    _write(
        output_dir,
        ids[:cut],
        ids[cut:],
        vocab_size=len(symbols),
        source=source,
        tokenizer_name="characters",
        tokenizer=character_tokenizer("".join(map(chr, symbols))),
        expected=expected,
    )


def write_gpt2_tokens(
    output_dir: Path, text: str, source: Source, expected: tuple[int, int, int] | None = None
) -> None:
    """Writes a text as a data set of GPT-2's BPE tokens, encoded by tiktoken.

    Arguments and errors as for :func:`write_characters`; also UserError if tiktoken has the
    vocabulary neither in its cache nor from the network.
    """
    encoding, tokenizer = gpt2_encoding(", or pass --tokenizer with a local tokenizer's folder")
    cut = _cut(text)
    _write(
        output_dir,
        np.array(encoding.encode_ordinary(text[:cut])),
        np.array(encoding.encode_ordinary(text[cut:])),
        vocab_size=encoding.n_vocab,
        source=source,
        tokenizer_name="gpt2",
        tokenizer=tokenizer,
        expected=expected,
    )


def write_model_tokens(output_dir: Path, text: str, source: Source, name_or_path: str) -> None:
    """Writes a text as a data set of a given model's tokens, without special tokens.

    "<|endoftext|>" in the text is ordinary text, as in :func:`write_gpt2_tokens`. Arguments as for
    :func:`write_characters`.

    Raises:
        UserError: If ``name_or_path`` has no tokenizer, or its tokenizer cannot encode some of the
            characters.
    """
    tokenizer = load_tokenizer(name_or_path)
    cut = _cut(text)
    train, val = (
        np.array(
            encode(
                tokenizer,
                part,
                str(source["name"]),
                add_special_tokens=False,
                split_special_tokens=True,
            )
        )
        for part in (text[:cut], text[cut:])
    )
    _write(
        output_dir,
        train,
        val,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        source=source,
        tokenizer_name=name_or_path,
        tokenizer=tokenizer,
        expected=None,
    )


def _cut(text: str) -> int:
    """Returns the index of the val split's first character: 90 %, rounded like nanoGPT."""
    return int(len(text) * 0.9)


def _write(
    output_dir: Path,
    train: np.ndarray,
    val: np.ndarray,
    *,
    vocab_size: int,
    source: Source,
    tokenizer_name: str,
    tokenizer: PreTrainedTokenizerBase,
    expected: tuple[int, int, int] | None,
) -> None:
    counts = (vocab_size, len(train), len(val))
    if expected is not None and counts != expected:
        raise UserError(
            f"{source['name']} has {counts} as vocabulary size, train tokens and val tokens, "
            f"but the known numbers are {expected}: nothing was written"
        )
    meta = write_data_set(
        output_dir,
        {"train": train, "val": val},
        vocab_size=vocab_size,
        source=source,
        tokenizer_name=tokenizer_name,
        tokenizer=tokenizer,
    )
    print(
        f"{output_dir}: {source['name']} as {tokenizer_name}, vocabulary {vocab_size:,}; "
        f"train.bin {len(train):,} and val.bin {len(val):,} tokens ({meta['dtype']})"
    )
