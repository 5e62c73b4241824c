"""Tokens per second of a language model, float and quantized: of a prompt, and of generation one token at a time.

    python -m benchmarks.speed.generation FLOAT_FOLDER QUANTIZED_FOLDER [--prompt 512] [--tokens 32] [--rounds 3]

Models take turns, and the best round of each counts, so that what else the machine does bears on all alike. On a busy
machine give it one thread and --cpu-time, which does not count what others take.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import miniquant


def measured(model: Any, ids: torch.Tensor, tokens: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of the prompt, and of so many tokens after it."""
    start = clock()
    with torch.inference_mode():
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        prompt = clock()
        for _ in range(tokens):
            following = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=following, past_key_values=output.past_key_values, use_cache=True)
    return prompt - start, clock() - prompt


def nbytes(model: Any) -> int:
    """Of parameters and buffers, each once."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float_folder", type=Path)
    parser.add_argument("quantized_folder", type=Path)
    parser.add_argument("--prompt", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the processor in place of the clock's")
    options = parser.parse_args()
    if options.cpu_time and torch.get_num_threads() > 1:
        parser.error("expected one thread with --cpu-time (OMP_NUM_THREADS=1 in the environment)")
    clock = time.process_time if options.cpu_time else time.perf_counter
    models = {
        f"{what}, {str(dtype).removeprefix('torch.')}": miniquant.load(folder, dtype=dtype)
        for what, folder in (("float", options.float_folder), ("QuantizedLinear", options.quantized_folder))
        for dtype in (torch.float32, torch.bfloat16)
    }
    ids = torch.randint(100, 10000, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    best = dict.fromkeys(models, (float("inf"), float("inf")))
    for model in models.values():
        measured(model, ids[:, :16], 1, clock)
    for _ in range(options.rounds):
        for name, model in models.items():
            now = measured(model, ids, options.tokens, clock)
            best[name] = (min(now[0], best[name][0]), min(now[1], best[name][1]))
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    print("| model | MB | prompt, tokens/s | generation, tokens/s |\n|---|---|---|---|")
    for name, (prompt, generation) in best.items():
        print(
            f"| {name} | {nbytes(models[name]) / 1e6:.0f} | {options.prompt / prompt:.0f} | "
            f"{options.tokens / generation:.1f} |"
        )


if __name__ == "__main__":
    main()
