"""The benchmark of tokenization, on a few real documents."""

import pyarrow.parquet as pq
import pytest

from benchmarks import tokenization

pytestmark = pytest.mark.slow


@pytest.fixture
def file(test_data, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(test_data / "tiktoken_cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    texts = pq.read_table(test_data / "novels" / "val.parquet")[:200]
    pq.write_table(texts, tmp_path / "texts.parquet")
    return str(tmp_path / "texts.parquet")


def test_measures_speed_and_memory(file):
    speed = tokenization.measure_speed(file, rounds=1)
    assert [row["num_proc"] for row in speed] == [0, 1, 2]
    for row in speed:
        (turn,) = row["turns"]
        assert turn["tokens"] > 200_000
        # the processes that encode count too: no core encodes 5 million tokens a second
        assert turn["tokens"] / turn["cpu_seconds"] < 5e6
    memory = tokenization.measure_memory(file, repeat=2)
    assert memory["text_bytes"] > 2e6
    assert 200 * 2**20 < memory["peak_bytes"] < 4 * 2**30
    results = {"speed": speed, "memory": [memory, memory]}
    assert "the plain loop | " in tokenization.render(results)
