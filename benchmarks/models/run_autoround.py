"""AutoRound on a whole model, in the environment of the peers.

    python benchmarks/models/run_autoround.py MODEL_FOLDER BATCHES OUTPUT_FOLDER BITS GROUP_SIZE THREADS [ITERATIONS]

BATCHES is a safetensors file with ``input_ids`` int64 [windows, tokens]. ITERATIONS is AutoRound's own default, 200,
where it is left out. The folder is written in the format GPTQ. The last line of the output is JSON: the seconds of the
tuning and the version.
"""

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

ITERATIONS = 200


def main() -> None:
    """Quantizes the model that the command line names."""
    folder, batches, output, bits, group_size, threads, *iterations = sys.argv[1:]
    torch.set_num_threads(int(threads))
    ids = load_file(batches)["input_ids"]
    windows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(folder),
        scheme="W4A16",
        bits=int(bits),
        group_size=int(group_size),
        sym=True,
        iters=int(iterations[0]) if iterations else ITERATIONS,
        dataset=DataLoader(windows, batch_size=8),
        seqlen=ids.shape[1],
        nsamples=len(ids),
        device_map="cpu",
    )
    start = time.perf_counter()
    tuner.quantize()
    seconds = time.perf_counter() - start
    tuner.save_quantized(output, format="auto_gptq")
    print(json.dumps({"seconds": seconds, "version": version("auto_round")}))


if __name__ == "__main__":
    main()
