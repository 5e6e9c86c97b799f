"""A tiny model folder and tiny data files, for everything that trains."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

WORDS = ["cat", "dog", "bird", "fish", "runs", "sleeps", "eats", "sings", "red", "blue", "a", "the"]


def write_model(folder: Path, head: int | None = None, layers: int = 2) -> Path:
    """A random BERT (width 32, 4 heads, FFN 64), with ``head`` labels if given; its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=layers,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    if head is None:
        BertModel(config).save_pretrained(folder)
    else:
        config.num_labels = head
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def write_pairs(path: Path, rows: int = 48, seed: int = 0, kind: str = "score") -> Path:
    """Random sentences and how many words they share: a score of 0..5, or the class of it."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence1", "sentence2", "score" if kind == "score" else "label"])
        for _ in range(rows):
            first = draw.choices(WORDS, k=draw.randint(2, 6))
            second = draw.choices(WORDS, k=draw.randint(2, 6))
            shared = 5 * len(set(first) & set(second)) / len(set(first) | set(second))
            label = f"{shared:.3f}" if kind == "score" else ("near" if shared > 0.7 else "far")
            writer.writerow([" ".join(first), " ".join(second), label])
    return path
