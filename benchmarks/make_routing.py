"""Record the routing of a real, if small, Mixture-of-Experts model for the benchmarks.

    python benchmarks/make_routing.py                # about 4 minutes on two cores

Uniform random ids flatter a dispatch: every rank receives about the same number of tokens.  This
script trains a byte-level language model with 256 experts and top-8 routing on the sources that
ship with Python, runs it over text that it was not trained on, and records what the router of one
layer chose, as an .npz with

    topk_ids      int16 [T, K]    experts by falling weight, all different
    topk_weights  float32 [T, K]  each row sums to 1
    meta          a JSON string   seed, steps, held-out loss, layer, torch version, command

Row t is byte t of the held-out stream, so that a window of rows is a piece of running text.
Shape letters: T tokens, K top_k, E experts, D model width, H expert width, B batch, S context.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

# Of four layers the third: a middle layer, as most layers of a large model are.  It routes by the
# context more than the first does (two tokens of the same byte share 1.4 of their 8 experts there,
# 1.0 here, 0.2 when the bytes differ), and it is not the last, which serves the output alone.
NUM_LAYERS, RECORDED_LAYER = 4, 2
WIDTH, HEADS, EXPERT_WIDTH = 128, 4, 32
CONTEXT, BATCH = 256, 16
BALANCE = 1e-2  # the Switch Transformer's weight, its loss normalised as here: 1 when even
PEAK_LR, WARMUP = 3e-3, 0.04  # WARMUP is a share of the run
DOCUMENT, EXCERPT, HELD_OUT = 1 << 16, 2048, 0.05
WINDOW, EP_SIZES = 512, (2, 4, 8, 16, 32, 64)

IntArray = np.ndarray[Any, np.dtype[np.integer[Any]]]
FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass(frozen=True)
class Config:
    """What is trained and for how long; steps 0 trains for `minutes` instead."""

    experts: int
    top_k: int
    tokens: int
    minutes: float
    steps: int
    seed: int
    balance: float


class Routing(NamedTuple):
    """topk_ids int64 [T, K], topk_weights float32 [T, K], balance: a scalar, 1 when even."""

    topk_ids: Tensor
    topk_weights: Tensor
    balance: Tensor


class Recording(NamedTuple):
    """Held-out loss in bits per byte, and per layer topk_ids int16 and topk_weights [T, K]."""

    bits: float
    topk_ids: list[IntArray]
    topk_weights: list[FloatArray]


class Tick(NamedTuple):
    """One training step for the display; done is the finished share, left is in seconds."""

    step: int
    done: float
    bits: float
    tokens_per_s: float
    left: float


class Attention(nn.Module):
    """Causal attention with rotary positions, float32 [B, S, D] to [B, S, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        half = WIDTH // HEADS // 2
        angle = torch.outer(torch.arange(CONTEXT), 1e4 ** -(torch.arange(half) / half))
        self.turn: Tensor
        self.register_buffer("turn", torch.stack([angle.cos(), angle.sin()]), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        """Turn [B, heads, S, D / heads] by each position's angles."""
        (a, b), (cos, sin) = x.chunk(2, -1), self.turn
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class MoE(nn.Module):
    """Top-K of E SwiGLU experts, softmax router, weights normalised over the chosen K."""

    def __init__(self, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.w_in = nn.Parameter(torch.randn(experts, WIDTH, 2 * EXPERT_WIDTH) * WIDTH**-0.5)
        self.w_out = nn.Parameter(torch.randn(experts, EXPERT_WIDTH, WIDTH) * EXPERT_WIDTH**-0.5)
        nn.init.normal_(self.router.weight, std=0.02)  # close to even, so that all get a start

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """float32 [T, D] to [T, D], and what the router chose."""
        experts = self.router.out_features
        probs = self.router(x).softmax(-1)
        weights, ids = probs.topk(self.top_k, sorted=True)
        weights = weights / weights.sum(-1, keepdim=True)
        # Rows sorted by expert make each expert's rows one slice, as grouped_mm wants them.
        order = ids.flatten().argsort(stable=True)
        token = order // self.top_k
        counts = torch.bincount(ids.flatten(), minlength=experts)
        ends = counts.cumsum(0).int()
        gate, up = F.grouped_mm(x.index_select(0, token), self.w_in, offs=ends).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, self.w_out, offs=ends)
        rows = rows * weights.flatten().index_select(0, order)[:, None]
        y = torch.zeros_like(x).index_add(0, token, rows)
        balance = experts * (counts / counts.sum() * probs.mean(0)).sum()
        return y, Routing(ids, weights, balance)


class ByteModel(nn.Module):
    """A next-byte model: embedding, a short causal convolution, blocks of attention and MoE."""

    def __init__(self, experts: int, top_k: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        # The last four bytes at once: spares the first layer learning to spell.
        self.mix = nn.Conv1d(WIDTH, WIDTH, 4, padding=3)
        self.attention = nn.ModuleList(Attention() for _ in range(NUM_LAYERS))
        self.moe = nn.ModuleList(MoE(experts, top_k) for _ in range(NUM_LAYERS))
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2 * NUM_LAYERS + 1))
        self.head = nn.Linear(WIDTH, 256)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Routing]]:
        """tokens int64 [B, S] to logits float32 [B, S, 256], and the routing of each layer."""
        x = self.embed(tokens)
        x = x + self.mix(x.transpose(1, 2))[..., : tokens.shape[1]].transpose(1, 2)
        routings = []
        for i, (attention, moe) in enumerate(zip(self.attention, self.moe, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            y, routing = moe(self.norms[2 * i + 1](x).flatten(0, 1))
            x = x + y.view_as(x)
            routings.append(routing)
        return self.head(self.norms[-1](x)), routings


def read_corpus(seed: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Training bytes and `tokens` + 1 held-out bytes, both uint8, from Python's own sources.

    Documents (files, the long ones cut) are held out whole.  The held-out stream takes EXCERPT
    running bytes from the middle of each, for one file alone would be one author's habits.
    Raises SystemExit when Python's library holds too little text for that.
    """
    root = Path(sysconfig.get_path("stdlib"))
    # Tests and codec tables are left out: distributions differ in the former, and the latter
    # are not text.
    skip = {"site-packages", "dist-packages", "test", "tests", "encodings", "__pycache__"}
    paths = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]
    paths += [p for p in (root / "LICENSE.txt", root.parent / "LICENSE") if p.is_file()]
    texts = [p.read_bytes() for p in sorted(paths)]
    documents = [t[i : i + DOCUMENT] for t in texts for i in range(0, len(t), DOCUMENT)]
    random.Random(seed).shuffle(documents)
    limit = int(HELD_OUT * len(documents))
    held, used = bytearray(), 0
    while len(held) <= tokens and used < len(documents) // 2:
        middle = max(0, len(documents[used]) - EXCERPT) // 2
        excerpt = documents[used][middle : middle + EXCERPT]
        held += excerpt if len(excerpt) == EXCERPT else b""
        used += 1
    train = bytearray().join(documents[max(used, limit) :])
    if len(held) <= tokens or len(train) < 1 << 20:
        raise SystemExit(f"make_routing: too little text under Python's library for {tokens}")
    return torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(held, dtype=torch.uint8)


@contextlib.contextmanager
def display() -> Iterator[Callable[[Tick], None]]:
    """A rich bar on a terminal, a plain line every 25 steps elsewhere or without rich."""
    form = "step {0.step:5d}  {0.bits:.3f} bits/byte  {0.tokens_per_s:6.0f} tokens/s"
    form += "  {0.left:4.0f} s left"
    try:
        from rich import console, progress
    except ImportError:
        progress = None  # type: ignore[assignment]
    if progress is None or not sys.stderr.isatty():
        yield lambda t: print(form.format(t), flush=True) if t.step % 25 == 0 else None
        return
    text = progress.TextColumn("{task.description}")
    columns = (progress.BarColumn(), progress.TaskProgressColumn(), text)
    with progress.Progress(*columns, console=console.Console(stderr=True)) as bar:
        task = bar.add_task("first step", total=1.0)
        yield lambda t: bar.update(task, completed=t.done, description=form.format(t))


def train(model: ByteModel, data: Tensor, config: Config, show: Callable[[Tick], None]) -> int:
    """Train on random windows of `data` (uint8); returns the number of steps taken."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    window = torch.arange(CONTEXT + 1)
    start, step, done, mean = time.monotonic(), 0, 0.0, 8.0
    while done < 1:
        at = torch.randint(len(data) - CONTEXT, (BATCH, 1))
        batch = data[at + window].long()
        # Linear up, cosine down to a tenth; by the share done, so it fits a clock as well.
        rate = min(1.0, (done + 1e-3) / WARMUP) * (0.55 + 0.45 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * rate
        logits, routings = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        balance = torch.stack([r.balance for r in routings]).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss + config.balance * balance)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        elapsed = time.monotonic() - start
        done = step / config.steps if config.steps else elapsed / (60 * config.minutes)
        mean += (loss.item() / math.log(2) - mean) / min(step, 20)
        left = elapsed * max(0.0, 1 / done - 1)
        show(Tick(step, done, mean, step * BATCH * CONTEXT / elapsed, left))
    return step


@torch.no_grad()
def record(model: ByteModel, held: Tensor, tokens: int) -> Recording:
    """Run the model over `held` (uint8, more than `tokens`) in contexts of S bytes."""
    inputs, targets = (held[i : i + tokens].long().view(-1, CONTEXT) for i in (0, 1))
    nats, parts = 0.0, []
    for x, y in zip(torch.split(inputs, BATCH), torch.split(targets, BATCH), strict=True):
        logits, routings = model(x)
        nats += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        parts.append(routings)
    layers = list(zip(*parts, strict=True))
    return Recording(
        nats / tokens / math.log(2),
        [torch.cat([r.topk_ids for r in layer]).short().numpy() for layer in layers],
        [torch.cat([r.topk_weights for r in layer]).numpy() for layer in layers],
    )


def load_skew(topk_ids: IntArray, experts: int) -> tuple[float, float, float]:
    """Busiest expert against uniform, share of the busiest tenth, entropy against uniform."""
    share = np.sort(np.bincount(topk_ids.ravel(), minlength=experts))[::-1] / topk_ids.size
    seen = share[share > 0]
    entropy = -(seen * np.log(seen)).sum() / math.log(experts)
    return float(share[0] * experts), float(share[: round(experts / 10)].sum()), float(entropy)


def rank_skew(topk_ids: IntArray, experts: int, ep_size: int) -> tuple[float, float, float]:
    """Mean distinct ranks per token, then mean and worst imbalance over windows.

    The imbalance is the largest over the mean number of tokens that a rank receives from one
    window; a token counts once for a rank, however many of its experts live there.
    """
    hit = np.zeros((len(topk_ids), ep_size), dtype=bool)
    np.put_along_axis(hit, topk_ids.astype(np.int64) // (experts // ep_size), True, axis=1)
    windows = max(1, len(hit) // WINDOW)
    received = hit[: windows * WINDOW].reshape(windows, -1, ep_size).sum(1)
    imbalance = received.max(1) / received.mean(1)
    return float(hit.sum(1).mean()), float(imbalance.mean()), float(imbalance.max())


def print_skew(topk_ids: IntArray, experts: int, seed: int) -> None:
    """The closing tables: the recorded ids beside uniform random ids of the same shape."""
    rng = np.random.default_rng(seed)
    tokens, top_k = topk_ids.shape
    uniform = rng.random((tokens, experts)).argpartition(top_k - 1, axis=1)[:, :top_k]
    print(f"\n{'load of the experts':34}{'recorded':>10}{'uniform':>10}")
    names = ("busiest expert / mean", "share of the busiest 10 %", "entropy / log(experts)")
    for name, ours, flat in zip(
        names, load_skew(topk_ids, experts), load_skew(uniform, experts), strict=True
    ):
        print(f"{name:34}{ours:10.3f}{flat:10.3f}")
    print(f"\n{'':4}{'distinct ranks / token':>24}{f'tokens max/mean, windows of {WINDOW}':>36}")
    print(f"{'EP':>4}{'recorded':>14}{'uniform':>10}{'recorded':>16}{'worst':>10}{'uniform':>10}")
    for ep_size in (w for w in EP_SIZES if experts % w == 0):
        ranks, mean, worst = rank_skew(topk_ids, experts, ep_size)
        flat_ranks, flat_mean, _ = rank_skew(uniform, experts, ep_size)
        print(f"{ep_size:4}{ranks:14.2f}{flat_ranks:10.2f}", end="")
        print(f"{mean:16.3f}{worst:10.3f}{flat_mean:10.3f}")


def save(path: Path, **arrays: Any) -> None:
    """Write the .npz under another name and rename it, so `path` is whole or untouched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".routing-") as folder:
        part = Path(folder) / "part.npz"
        np.savez_compressed(part, **arrays)
        part.replace(path)


def parse_arguments(argv: list[str] | None) -> tuple[Config, Path]:
    """The configuration and the file to write."""
    parser = argparse.ArgumentParser(
        prog="make_routing.py", description="Train a small MoE model and record its routing."
    )
    parser.add_argument("--minutes", type=float, default=4.0, help="training time (default 4)")
    parser.add_argument("--steps", type=int, default=0, help="train this long, not by the clock")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens to record (16384)")
    parser.add_argument("--experts", type=int, default=256, help="experts per layer (256)")
    parser.add_argument("--top-k", type=int, default=8, help="experts per token (8)")
    parser.add_argument("--seed", type=int, default=0)
    text = f"weight of the balancing loss ({BALANCE:g}); a smaller one gives more skew"
    parser.add_argument("--balance", type=float, default=BALANCE, help=text)
    parser.add_argument("--out", type=Path, help="default: routing_bytes_e<E>_k<K>.npz beside this")
    a = parser.parse_args(argv)
    if a.tokens < CONTEXT or a.tokens % CONTEXT:
        parser.error(f"--tokens must be a multiple of {CONTEXT}, got {a.tokens}")
    if not 1 <= a.top_k <= a.experts <= 1 << 15:
        parser.error(f"need 1 <= top-k <= experts <= 32768, got {a.top_k} and {a.experts}")
    if a.steps < 0 or a.minutes <= 0:
        parser.error("--steps must not be negative and --minutes must be positive")
    name = f"routing_bytes_e{a.experts}_k{a.top_k}.npz"
    config = Config(a.experts, a.top_k, a.tokens, a.minutes, a.steps, a.seed, a.balance)
    return config, a.out or Path(__file__).with_name(name)


def make(config: Config, out: Path) -> None:
    """Train, record one layer, save and print."""
    torch.manual_seed(config.seed)
    data, held = read_corpus(config.seed, config.tokens)
    model = ByteModel(config.experts, config.top_k)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(data) / 1e6:.1f} MB of text, {size / 1e6:.1f} M parameters, {NUM_LAYERS} layers")
    before = record(model, held, config.tokens).bits
    with display() as show:
        steps = train(model, data, config, show)
    result = record(model, held, config.tokens)
    ids, weights = result.topk_ids[RECORDED_LAYER], result.topk_weights[RECORDED_LAYER]
    command = f"python benchmarks/make_routing.py --steps {steps} --tokens {config.tokens}"
    command += f" --experts {config.experts} --top-k {config.top_k} --seed {config.seed}"
    command += f" --balance {config.balance:g}"
    meta = {
        "seed": config.seed,
        "steps": steps,
        "balance": config.balance,
        "bits_per_byte_before": round(before, 4),
        "bits_per_byte": round(result.bits, 4),
        "layer": RECORDED_LAYER,
        "layers": NUM_LAYERS,
        "text": "held-out excerpts of Python's standard library",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": command,
    }
    save(out, topk_ids=ids, topk_weights=weights, meta=np.array(json.dumps(meta)))
    print(f"held-out bits per byte: {before:.3f} before, {result.bits:.3f} after {steps} steps")
    print_skew(ids, config.experts, config.seed)
    print(f"\nwrote {out.name}: {out.stat().st_size / 1e3:.0f} kB, layer {RECORDED_LAYER}")


def main(argv: list[str] | None = None) -> int:
    """Exit code 130 when stopped by Ctrl-C, in which case nothing has been written."""
    config, out = parse_arguments(argv)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    try:
        make(config, out)
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
