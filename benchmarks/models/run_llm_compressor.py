"""llm-compressor's GPTQ on a whole model, in the environment of the peers.

    python benchmarks/models/run_llm_compressor.py MODEL_FOLDER BATCHES OUTPUT_FOLDER BITS GROUP_SIZE THREADS

BATCHES is a safetensors file with ``input_ids`` int64 [windows, tokens]. The folder is written in the format
compressed-tensors. The last line of the output is JSON: the seconds of ``oneshot`` and the version.
"""

import json
import sys
import time
from importlib.metadata import version

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Quantizes the model that the command line names."""
    folder, batches, output, bits, group_size, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    ids = load_file(batches)["input_ids"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = QuantizationArgs(num_bits=int(bits), symmetric=True, strategy="group", group_size=int(group_size))
    recipe = GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    )
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        batch_size=4,
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - start
    model.save_pretrained(output, save_compressed=True)
    print(json.dumps({"seconds": seconds, "version": version("llmcompressor")}))


if __name__ == "__main__":
    main()
