"""sentence-transformers' Trainer, which puts its groups into the optimizer's arguments."""

from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

from striped_hf import StripedAdamW

datasets = pytest.importorskip("datasets")
sentence_transformers = pytest.importorskip("sentence_transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = 50


def tiny_sentence_model(folder: Path) -> "sentence_transformers.SentenceTransformer":
    vocabulary = {"[PAD]": 0, **{f"w{i}": i + 1 for i in range(WORDS)}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[PAD]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", model_max_length=16
    ).save_pretrained(folder)
    GPT2Model(
        GPT2Config(vocab_size=WORDS + 1, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    ).save_pretrained(folder)
    from sentence_transformers import models

    modules = [models.Transformer(str(folder)), models.Pooling(32)]
    return sentence_transformers.SentenceTransformer(modules=modules, device="cpu")


@pytest.mark.parametrize("mapping", [{}, {"wte": 1e-4, r"h\.0\..*bias": 1e-5}])
def test_learning_rate_mapping_keeps_its_rates(mapping: dict[str, float], tmp_path: Path) -> None:
    from sentence_transformers import losses

    text = [" ".join(f"w{(i * 7 + j) % WORDS}" for j in range(6)) for i in range(32)]
    groups = {}
    for optim in ("adamw_torch", "striped_adamw_8bit"):
        model = tiny_sentence_model(tmp_path / "model")
        trainer = sentence_transformers.SentenceTransformerTrainer(
            model,
            args=sentence_transformers.SentenceTransformerTrainingArguments(
                str(tmp_path),
                optim=optim,
                max_steps=3,
                learning_rate=5e-3,
                weight_decay=0.1,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                learning_rate_mapping=mapping,
            ),
            train_dataset=datasets.Dataset.from_dict({"a": text, "b": text}),
            loss=losses.MultipleNegativesRankingLoss(model),
        )
        trainer.train()
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        names = {param: name for name, param in model.named_parameters()}
        groups[optim] = [
            (group["initial_lr"], group["weight_decay"], [names[p] for p in group["params"]])
            for group in optimizer.param_groups
        ]
    assert type(optimizer) is StripedAdamW
    assert groups["striped_adamw_8bit"] == groups["adamw_torch"]
    assert {lr for lr, _, _ in groups["adamw_torch"]} == {5e-3, *mapping.values()}
    stripes = {
        names[param]: state["exp_avg_sq_row"].shape[-1]
        for param, state in optimizer.state.items()
        if "exp_avg_sq_row" in state
    }
    assert {name for name, blocks in stripes.items() if blocks == 3} == {
        name for name in stripes if name.endswith("c_attn.weight")
    }
    assert list(stripes.values()).count(3) == 2
