"""What a step costs on paper, for models of 135M to 70B and 1 to 1,024 processes: the tables of docs/scale.md.

    python benchmarks/scale_on_paper.py [--flops 1.5e11] [--normals 1e8]

--flops: what one process computes in a second; --normals: random numbers that it draws in one. `--measure` takes both
here, on one thread.
"""

import argparse
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder, from its config.json."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int

    @property
    def weights(self) -> float:
        """Numbers in its decoder layers, which every token meets."""
        kv = self.hidden * self.kv_heads // self.heads
        return self.layers * (2 * self.hidden**2 + 2 * self.hidden * kv + 3 * self.hidden * self.intermediate)

    @property
    def pair(self) -> int:
        """Numbers of a rank-1 pair on q_proj and v_proj."""
        kv = self.hidden * self.kv_heads // self.heads
        return self.layers * (2 * self.hidden + self.hidden + kv)


MODELS = (
    Model("SmolLM2-135M", 30, 576, 1536, 9, 3),
    Model("Qwen2-7B", 28, 3584, 18944, 28, 4),
    Model("Llama-3-8B", 32, 4096, 14336, 32, 8),
    Model("Llama-3-70B", 80, 8192, 28672, 64, 8),
)


def zo_flops(model: Model, tokens: float) -> float:
    """Of a zeroth-order step: two forwards of every token, two operations a weight."""
    return 4 * model.weights * tokens


def attention_flops(model: Model, tokens: float, length: int) -> float:
    """What attention adds: two products with half of the earlier tokens, in two forwards."""
    return 2 * 2 * 2 * model.layers * model.hidden * tokens * length / 2


def measured() -> tuple[float, float]:
    """Operations and random numbers in a second, on one thread."""
    torch.set_num_threads(1)
    x, weight = torch.randn(1024, 576), torch.randn(1536, 576)

    def seconds(work: object) -> float:
        times = []
        for _ in range(20):
            start = time.perf_counter()
            work()  # type: ignore[operator]
            times.append(time.perf_counter() - start)
        return sorted(times)[10]

    flops = 2 * x.numel() * 1536 / seconds(lambda: torch.nn.functional.linear(x, weight))
    return flops, 10**7 / seconds(lambda: torch.randn(10**7, generator=torch.Generator().manual_seed(0)))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", type=float, default=1.5e11)
    parser.add_argument("--normals", type=float, default=1e8)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--length", type=int, default=32, help="tokens of an example")
    parser.add_argument("--batch", type=int, default=64, help="examples of a step, all processes together")
    given = parser.parse_args()
    flops, normals = measured() if given.measure else (given.flops, given.normals)
    tokens = given.batch * given.length
    print(
        f"{given.batch} examples of {given.length} tokens a step; a process computes {flops:.3g} operations and draws"
    )
    print(f"{normals:.3g} random numbers in a second\n")
    print("| model | weights | pair d | operations | attention | losses | gradient | all weights | directions pay to |")
    print("|---|---|---|---|---|---|---|---|---|")
    for model in MODELS:
        work, extra = zo_flops(model, tokens), attention_flops(model, tokens, given.length)
        most = work / flops / (given.batch * model.pair / normals)
        print(
            f"| {model.name} | {model.weights / 1e9:.2f} G | {model.pair:,} | {work / 1e12:,.2f} T | "
            f"+{100 * extra / work:.1f} % | {8 * given.batch / 1e3:.1f} kB | {4 * model.pair / 1e3:,.0f} kB | "
            f"{2 * model.weights / 1e9:,.1f} GB | {most:,.0f} processes |"
        )
    print("\n| processes | forwards s | drawing s | received by each, bytes | all-reduce, bytes each |")
    print("|---|---|---|---|---|")
    model = MODELS[0]
    for processes in (1, 2, 4, 16, 64, 256, 1024):
        batch = max(given.batch, processes)
        forwards = zo_flops(model, batch * given.length) / flops / processes
        others = (processes - 1) / processes
        print(
            f"| {processes:,} ({batch:,} examples) | {forwards:.3f} | {batch * model.pair / normals:.3f} | "
            f"{8 * batch * others + 4 * (processes - 1):,.0f} | {2 * 4 * model.pair * others:,.0f} |"
        )


if __name__ == "__main__":
    main()
