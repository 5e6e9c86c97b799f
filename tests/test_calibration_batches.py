"""What batches calibration takes, which of their tokens count, and where activations wait."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_cases import texts, torch_encoder, vectors
from tiny_models import FAMILIES, mlp
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from slimkern import one_shot
from slimkern.calibration.batches import Batch, read_batches, real_rows, spread_over
from slimkern.calibration.store import Store


def tokenizer(batch: list[str], padding: bool = False, return_tensors: str = "", **cut: Any) -> Any:
    """One token per letter, as transformers' tokenizers would return it."""
    assert cut["truncation"]
    ids = [[2 + ord(c) % 90 for c in text[: cut["max_length"]]] for text in batch]
    if not padding:
        return {"input_ids": ids}
    length = max(map(len, ids))
    padded = torch.tensor([row + [1] * (length - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    return UserDict(
        input_ids=padded, attention_mask=mask, token_type_ids=torch.zeros_like(mask), extra=["a"]
    )


def test_texts_are_put_in_order_of_length():
    model = FAMILIES["distilbert"]()  # its forward takes no token types
    words = ["abc", "defghijkl", "m", "nopq", "rstuvwxyzabcdefg"]
    found = read_batches(model, words, tokenizer=tokenizer, max_length=10, batch_size=2)
    assert [tuple(b.inputs.kwargs["input_ids"].shape) for b in found] == [(2, 10), (2, 4), (1, 1)]
    assert [b.tokens for b in found] == [19, 7, 1]
    assert set(found[0].inputs.kwargs) == {"input_ids", "attention_mask"}
    plan = one_shot(model, words, 0.5, round_multiplier=8, tokenizer=tokenizer).plan
    assert plan == one_shot(model, iter(words), 0.5, round_multiplier=8, tokenizer=tokenizer).plan


def test_many_makes_of_the_same_batches():
    model = mlp(10, 24, 5)
    x = torch.cat(vectors(96, count=1))
    labelled = DataLoader(TensorDataset(x, torch.zeros(96)), batch_size=32)
    makes = [
        x,
        list(x.split(32)),
        labelled,  # targets are no argument of the forward
        [(part,) for part in x.split(32)],
        [{"input": part, "labels": part[:, 0]} for part in x.split(32)],
        {"input": x},
        (part for part in x.split(32)),
    ]
    for make in makes:
        found = read_batches(model, make, batch_size=32)
        assert [b.tokens for b in found] == [32, 32, 32]
        values = [(*b.inputs.args, *b.inputs.kwargs.values()) for b in found]
        assert all(torch.equal(v[0], part) for v, part in zip(values, x.split(32)))
        assert {len(v) for v in values} == {1}


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches holds no batch"),
        (iter(()), ValueError, "batches holds no batch"),
        (torch.zeros(0, 10), ValueError, "batches holds no batch"),
        (DataLoader(TensorDataset(torch.zeros(0, 10))), ValueError, "batches holds no batch"),
        ("one text", TypeError, "got one string"),
        (["a", "b"], TypeError, "give the model's tokenizer="),
        ([["a", "b"], ["c"]], TypeError, "batches holds lists of texts"),
        (["a", torch.zeros(2, 10)], TypeError, "batches mixes 1 texts with 1 others"),
        (7, TypeError, "got int"),
        ({"x": torch.zeros(3, 10), "y": torch.zeros(2)}, TypeError, "tensors of one length"),
        ({"x": [1, 2]}, TypeError, "tensors of one length"),
        ([3.0], ValueError, "got float"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_batch_is_named(batches, error, message):
    with pytest.raises(error, match=message):
        one_shot(mlp(10, 24, 8, 5), batches, 0.5)


def test_padding_alone_is_refused():
    (batch,) = texts([(3, 5)])
    batch["attention_mask"].zero_()
    with pytest.raises(ValueError, match="batches holds padding alone"):
        one_shot(FAMILIES["bert"](), [batch], 0.5)


def test_real_tokens_by_every_kind_of_mask():
    model, real = torch_encoder(), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    x = torch.arange(6.0).view(2, 3, 1).expand(2, 3, 12)
    added = torch.zeros(2, 3).masked_fill(~real, float("-inf"))
    for padding in (~real, added):
        (batch,) = read_batches(model, [{"src": x, "src_key_padding_mask": padding}])
        assert torch.equal(batch.real(x)[:, 0], torch.tensor([0.0, 1.0, 3.0]))
        assert batch.tokens == 3
    model = FAMILIES["bert"]()
    for mask in (real, real.long(), real.float(), added):
        (batch,) = read_batches(
            model, [{"input_ids": torch.ones(2, 3).long(), "attention_mask": mask}]
        )
        assert torch.equal(batch.mask, real)
    assert batch.real(torch.zeros(2, 7)).shape == (2, 7)  # a pooled output has no tokens
    assert read_batches(torch_encoder(), [x])[0].real(x).shape == (6, 12)


def outputs_of(batch: Batch, outputs: Any) -> list[Any]:
    return batch.real_outputs(outputs).tolist()


def test_outputs_of_real_tokens():
    (batch,) = read_batches(FAMILIES["bert"](), texts([(2, 3)]))  # the last token is padding
    per_token, numbers = torch.zeros(2, 3, 4), torch.arange(6.0).view(2, 3)
    assert batch.real_outputs({"hidden": per_token}).shape == (5, 4)
    assert outputs_of(batch, (torch.ones(2, 3).long(), numbers)) == [[0], [1], [2], [3], [4]]
    assert outputs_of(batch, torch.arange(2.0)) == [[0], [1]]
    assert outputs_of(batch, torch.tensor(3.0)) == [[3]]
    assert batch.real_outputs(torch.zeros(2, 7)).shape == (2, 7)
    with pytest.raises(ValueError, match="no floating-point tensor"):
        batch.real_outputs({"ids": torch.ones(2, 3).long()})


def test_a_few_batches_are_spread_evenly():
    batches = read_batches(FAMILIES["bert"](), texts([(1, 10)] * 20))
    assert spread_over(batches, 200) == list(range(20))
    assert spread_over(batches, 1000) == list(range(20))
    assert spread_over(batches, 50) == [2, 6, 10, 14, 18]
    assert spread_over(batches, 1) == [10]


def test_rows_that_are_not_finite():
    (batch,) = read_batches(FAMILIES["bert"](), texts([(2, 3)]))
    x = torch.full((2, 3, 4), 1e38)
    assert len(real_rows(batch, x, "a.b")) == 5  # their sum is infinite, they are not
    x[1, 2] = float("nan")  # padding
    assert len(real_rows(batch, x, "a.b")) == 5
    x[1, 1, 3] = float("-inf")
    with pytest.raises(
        ValueError, match=r"'a\.b': 1 of 5 tokens have activations that are NaN or inf"
    ):
        real_rows(batch, x, "a.b")


def named(seed: int, rows: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, rows, generator=generator)
    return {
        "plain": x,
        "across": x.permute(2, 0, 1),
        "again": x,
        "part": x[:, 0],
        "half": x.bfloat16(),
        "mask": x > 0,
        "number": torch.tensor(7),
        "one": x[:1, :, :1].transpose(0, 1),
    }


@pytest.mark.parametrize("memory", [0, 700, 10**6])
def test_a_store_gives_back_what_was_put(memory):
    with Store(memory) as store:
        for key in range(4):
            store.put(key, named(key))
        assert store.held <= memory
        store.put(2, named(9, rows=2))
        store.drop(0)
        store.drop("never")
        for key, wanted in ((1, named(1)), (2, named(9, rows=2)), (3, named(3))):
            found = store.get(key)
            assert set(found) == set(wanted)
            for name, tensor in wanted.items():
                assert torch.equal(found[name], tensor)
                assert found[name].dtype == tensor.dtype
                if name in ("plain", "across", "half"):
                    assert found[name].stride() == tensor.stride()
        with pytest.raises(KeyError):
            store.get(0)
        folder = store._folder
        assert (folder is None) == (memory > 10**5)
        if folder is not None:
            assert len(list(Path(folder.name).iterdir())) == len(store._files)
        for key in range(4):
            store.drop(key)
        assert store.held == 0
    assert folder is None or not Path(folder.name).exists()
