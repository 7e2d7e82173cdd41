"""Windows and blocks: their tokens, and their path through DataLoader and Trainer."""

import multiprocessing

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from striped_hf.data import ContiguousBlocks, RandomWindows, StridedWindows, collate, open_split

MASK = (1 << 64) - 1


def mix(bits):
    """SplitMix64's output function, on Python's integers."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & MASK
    return bits ^ (bits >> 31)


def expected_start(seed, index, num_starts):
    gamma = 0x9E3779B97F4A7C15
    state = mix((seed + gamma) & MASK)
    return mix((state + (index + 1) * gamma) & MASK) % num_starts


def starts(windows, indices=None):
    """The starts of windows over the tokens 0, 1, 2, ..."""
    indices = range(len(windows)) if indices is None else indices
    return windows.__getitems__(list(indices))["input_ids"][:, 0].numpy()


@pytest.fixture
def split(make_data):
    return open_split(make_data(train=1000), "train")


def test_a_window_has_its_tokens_and_the_next_ones_as_targets(split):
    windows = RandomWindows(split, block_size=8, num_windows=50, seed=0)
    assert len(windows) == 50
    for index in range(50):
        item = windows[index]
        assert list(item) == ["input_ids", "labels", "shift_labels"]
        start = int(item["input_ids"][0])
        assert item["input_ids"].tolist() == list(range(start, start + 8))
        assert item["labels"].tolist() == list(range(start + 1, start + 9))
        assert item["shift_labels"].tolist() == item["labels"].tolist()
        assert {values.dtype for values in item.values()} == {torch.int64}


@pytest.mark.parametrize("seed", [0, 1, 1337, -1, 2**64 + 3, 2**100])
def test_the_start_depends_only_on_seed_and_index(split, seed):
    windows = RandomWindows(split, block_size=8, num_windows=10**12, seed=seed)
    for index in [0, 1, 2, 77, 10**12 - 1]:
        assert int(windows[index]["input_ids"][0]) == expected_start(seed, index, 1000 - 8)


def test_order_batches_and_number_of_windows_do_not_matter(split):
    windows = RandomWindows(split, 8, num_windows=200, seed=3)
    inorder = starts(windows)
    shuffled = np.random.default_rng(0).permutation(200)
    np.testing.assert_array_equal(starts(windows, shuffled.tolist()), inorder[shuffled])
    np.testing.assert_array_equal([int(windows[i]["input_ids"][0]) for i in range(200)], inorder)
    np.testing.assert_array_equal(starts(RandomWindows(split, 8, 100, seed=3)), inorder[:100])
    assert (starts(RandomWindows(split, 8, 200, seed=4)) != inorder).mean() > 0.98


def test_starts_are_uniform_over_all_valid_positions(make_data):
    split = open_split(make_data(train=58), "train")
    drawn = starts(RandomWindows(split, block_size=8, num_windows=100_000, seed=0))
    counts = np.bincount(drawn)
    assert len(counts) == 50  # 0 .. 58 - 8 - 1, and none beyond
    chi_square = ((counts - 2000.0) ** 2 / 2000).sum()
    assert 20 < chi_square < 90  # 49 degrees of freedom: mean 49, standard deviation 10
    pairs = np.bincount(drawn[:-1] * 50 + drawn[1:], minlength=2500)  # successive draws
    chi_square = ((pairs - 40.0) ** 2 / 40).sum()
    assert 2200 < chi_square < 2800  # 2499 degrees of freedom: standard deviation 71


def test_shortest_split_has_one_window(make_data):
    split = open_split(make_data(train=9), "train")
    assert set(starts(RandomWindows(split, 8, 20, seed=0))) == {0}
    assert len(ContiguousBlocks(split, 8)) == 1


@pytest.mark.parametrize("make", [lambda s, n: RandomWindows(s, n, 5, 0), ContiguousBlocks])
def test_a_split_that_is_too_short_is_an_error(make_data, make):
    split = open_split(make_data(train=9), "train")
    with pytest.raises(
        ValueError, match=r"train\.bin holds 9 tokens, fewer than block_size \+ 1 ="
    ):
        make(split, 9)
    with pytest.raises(ValueError, match="block_size=0"):
        make(split, 0)


def test_the_number_of_windows_must_be_positive(split):
    with pytest.raises(ValueError, match="num_windows=0"):
        RandomWindows(split, 8, 0, seed=0)


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_out_of_range_is_an_error(split, index):
    windows = RandomWindows(split, 8, 5, seed=0)
    with pytest.raises(IndexError):
        windows[index]
    with pytest.raises(IndexError):
        windows.__getitems__([0, index])
    assert len(list(windows)) == 5  # plain iteration ends


@pytest.mark.parametrize("count", [9, 10, 16, 17, 18, 1000])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_blocks_have_every_target_once_and_in_order(make_data, count, batch_size):
    split = open_split(make_data(train=count), "train")
    loader = DataLoader(ContiguousBlocks(split, 8), batch_size, collate_fn=collate)
    batches = list(loader)
    targets = torch.cat([batch["shift_labels"].flatten() for batch in batches])
    inputs = torch.cat([batch["input_ids"].flatten() for batch in batches])
    counted = targets != -100
    assert targets[counted].tolist() == list(range(1, count))
    assert inputs[counted].tolist() == list(range(count - 1))
    assert counted[: count - 1].all()  # the padding is at the end
    assert len(targets) - (count - 1) < 8
    assert inputs.max() < count  # padded inputs are valid ids, too
    for batch in batches:
        assert torch.equal(batch["labels"], batch["shift_labels"])


def test_single_blocks_equal_the_batch(make_data):
    blocks = ContiguousBlocks(open_split(make_data(train=100), "train"), 8)
    batch = blocks.__getitems__(list(range(len(blocks))))
    for name, values in collate([blocks[i] for i in range(len(blocks))]).items():
        assert torch.equal(values, batch[name])


@pytest.mark.parametrize(
    ("count", "window", "stride"),
    [(100, 16, 8), (100, 16, 15), (97, 16, 1), (16, 16, 8), (2, 16, 8)],
)
def test_strided_windows_have_every_target_once_with_its_context(count, window, stride):
    windows = StridedWindows(np.arange(count, dtype=np.uint16), window, stride)
    found = []
    for index in range(len(windows)):
        item = windows[index]
        assert item["input_ids"].shape == item["shift_labels"].shape == (window - 1,)
        for place, target in enumerate(item["shift_labels"].tolist()):
            if target == -100:
                continue
            found.append(target)
            inputs = item["input_ids"][: place + 1].tolist()
            assert inputs == list(range(index * stride, target))
            assert index == 0 or len(inputs) >= window - stride
    assert found == list(range(1, count))


@pytest.mark.parametrize(
    ("count", "window", "stride", "message"),
    [
        (100, 1, 1, "window=1: must be at least 2"),
        (100, 16, 16, "stride=16: must be between 1 and window - 1 = 15"),
        (100, 16, 0, "stride=0"),
        (1, 16, 8, "tokens holds 1: pass a text of at least 2"),
    ],
)
def test_impossible_sizes_of_strided_windows_are_errors(count, window, stride, message):
    with pytest.raises(ValueError, match=message):
        StridedWindows(np.arange(count), window, stride)


def test_windows_of_uint32_tokens_in_any_order(make_data):
    split = open_split(make_data(train=70_000), "train")
    assert split.dtype == "uint32"
    blocks = ContiguousBlocks(split, 64)
    batch = blocks.__getitems__([1093, 0])
    assert batch["input_ids"][:, 0].tolist() == [1093 * 64, 0]
    assert batch["labels"][0, -18:].tolist() == [69_999, *[-100] * 17]
    assert -100 not in batch["labels"][1]


@pytest.mark.parametrize("context", [None, "fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_make_no_difference(split, context):
    if context is not None and context not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this platform cannot start processes by {context}")
    windows = RandomWindows(split, 8, num_windows=22, seed=0)
    workers = {"num_workers": 2, "multiprocessing_context": context} if context else {}
    loader = DataLoader(windows, batch_size=4, collate_fn=collate, **workers)
    drawn = torch.cat([batch["input_ids"][:, 0] for batch in loader])
    np.testing.assert_array_equal(drawn, starts(windows))


def test_subset_goes_through_collate(split):
    windows = RandomWindows(split, 8, num_windows=20, seed=0)
    (batch,) = DataLoader(Subset(windows, [5, 3]), batch_size=2, collate_fn=collate)
    np.testing.assert_array_equal(batch["input_ids"][:, 0], starts(windows)[[5, 3]])


class RecordingTrainer(Trainer):
    """Records the model's inputs, and the number of targets that divides the loss."""

    def compute_loss(self, model, inputs, *args, num_items_in_batch=None, **kwargs):
        self.seen.append(({k: v.clone() for k, v in inputs.items()}, num_items_in_batch))
        return super().compute_loss(
            model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs
        )


def make_trainer(folder, split, *, workers=0, remove_unused_columns=False, **datasets):
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_head=1, n_embd=8, n_positions=16, vocab_size=split.vocab_size,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=5,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=workers,
        dataloader_pin_memory=False,
        remove_unused_columns=remove_unused_columns,
    )
    trainer = RecordingTrainer(
        GPT2LMHeadModel(config), arguments, data_collator=collate, **datasets
    )
    trainer.seen = []
    return trainer


@pytest.mark.parametrize("workers", [0, 2])
def test_trainer_trains_on_every_target_of_the_windows(split, tmp_path, workers):
    windows = RandomWindows(split, 16, num_windows=3 * 2 * 4, seed=1)
    trainer = make_trainer(tmp_path, split, workers=workers, train_dataset=windows)
    trainer.train()
    batches, counts = zip(*trainer.seen, strict=True)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 16)] * 6
    assert [int(count) for count in counts] == [2 * 4 * 16] * 6
    drawn = torch.cat([batch["input_ids"][:, 0] for batch in batches])
    assert sorted(drawn.tolist()) == sorted(starts(windows).tolist())
    # the learning rate is 0, so each logged loss is the loss of its two batches
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for step, loss in enumerate(logged):
        inputs, targets = (
            torch.cat([batch[name] for batch in batches[2 * step : 2 * step + 2]])
            for name in ("input_ids", "shift_labels")
        )
        with torch.no_grad():
            logits = trainer.model(input_ids=inputs).logits
        own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert loss == pytest.approx(float(own), abs=2e-4)  # Trainer rounds logged figures


def test_trainer_evaluates_every_target_once(make_data, tmp_path):
    split = open_split(make_data(val=100, train=100), "val")
    trainer = make_trainer(tmp_path, split, eval_dataset=ContiguousBlocks(split, 16))
    trainer.evaluate()
    targets = torch.cat([batch["shift_labels"].flatten() for batch, _ in trainer.seen])
    assert targets[targets != -100].tolist() == list(range(1, 100))


def test_a_trainer_that_removes_columns_is_an_error(split, tmp_path):
    windows = RandomWindows(split, 16, num_windows=24, seed=1)
    trainer = make_trainer(tmp_path, split, remove_unused_columns=True, train_dataset=windows)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer.train()
