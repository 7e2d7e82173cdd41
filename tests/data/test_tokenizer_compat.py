"""The saved tokenizers in the other supported versions of transformers."""

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.overlay import make_overlay

REPOSITORY = Path(__file__).parents[2]

CODE = r"""
import os, sys, tiktoken, transformers
from pathlib import Path
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline
from striped_hf.data import open_split, prepare

assert transformers.__version__ == sys.argv[1], transformers.__version__
text = "a  b\n\n\tc \r\n ' s n't , . \u00e9 <unk> </s> " * 3
prepare.write_characters(Path("data"), text, {"name": "odd", "url": None, "sha256": ""})
tokenizer = AutoTokenizer.from_pretrained("data")
ids = [*open_split("data", "train").tokens.tolist(), *open_split("data", "val").tokens.tolist()]
assert tokenizer(text)["input_ids"] == ids
assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text
try:
    tokenizer("#")
except Exception as error:
    assert "UNK" in str(error), error
else:
    raise AssertionError("an unknown character was dropped")

config = GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=64, vocab_size=len(tokenizer),
                    bos_token_id=None, eos_token_id=None)
GPT2LMHeadModel(config).save_pretrained("model")
tokenizer.save_pretrained("model")
generate = pipeline("text-generation", "model", device="cpu")
# the pipeline itself takes spaces out by default, whatever the tokenizer says, up to 5.0
options = dict(max_new_tokens=20, do_sample=True, clean_up_tokenization_spaces=False)
generated = generate("a  b\n", **options)[0]["generated_text"]
assert generated.startswith("a  b\n") and len(generated) == 5 + 20, generated

if len(sys.argv) > 2:  # the real data are there
    text = Path(sys.argv[2], "tinyshakespeare", "input.txt").read_text(encoding="utf-8")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(sys.argv[2], "tiktoken_cache"))
    prepare.gpt2_tokenizer().save_pretrained("gpt2")
    tokenizer = AutoTokenizer.from_pretrained("gpt2")
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert ids == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert tokenizer.decode(ids) == text
"""


@pytest.mark.slow
@pytest.mark.compat
@pytest.mark.parametrize(
    ("version", "companions"),
    [
        ("4.57.1", ("tokenizers==0.22.1", "huggingface_hub==0.36.2")),
        ("5.0.0", ("tokenizers==0.22.1", "huggingface_hub==1.33.0")),
    ],
)
def test_tokenizers_in_another_transformers(version, companions, tmp_path):
    packages = (f"transformers=={version}", *companions)
    python = make_overlay(tmp_path / "environment", packages, [str(REPOSITORY)])
    real_data = filter(None, [os.environ.get("STRIPED_HF_TEST_DATA")])
    done = subprocess.run(
        [python, "-c", CODE, version, *real_data],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
