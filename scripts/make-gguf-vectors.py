#!/usr/bin/env python3
"""Makes the reference vectors of quantised weights in tests/vectors/gguf, by independent implementations.

    pip install numpy torch gguf safetensors compressed-tensors      # in a scratch environment
    scripts/make-gguf-vectors.py tests/vectors/gguf

blocks.safetensors has blocks of every type of GGUF that is read, and their values by the package gguf. folders.safetensors has
weights in the layouts of Hugging Face's folders, with the values that they stand for.
"""
import sys

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGML_QUANT_SIZES as SIZES
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file

ROWS, COLUMNS = 3, 512
# Where the f16 scales of a block begin.
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}
QUANTIZED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def random_blocks(rng, name):
    """Random levels, and scales of 1e-4 to 1e-1 of both signs."""
    elements, size = SIZES[Type[name]]
    blocks = rng.integers(0, 256, (ROWS * COLUMNS // elements, size), dtype=np.uint8)
    for at in SCALES[name]:
        scale = 10 ** rng.uniform(-4, -1, len(blocks)) * rng.choice([-1, 1], len(blocks))
        blocks[:, at:at + 2] = scale.astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(ROWS, -1)


def make_blocks():
    rng = np.random.default_rng(20)
    out = {}
    for name in SCALES:
        out[f"{name}.bytes"] = random_blocks(rng, name)
        out[f"{name}.values"] = dequantize(out[f"{name}.bytes"], Type[name])
    floats = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    out["source"] = floats
    for name in ["F32", "F16", "BF16"]:
        out[f"{name}.bytes"] = quantize(floats, Type[name]).view(np.uint8)
        out[f"{name}.values"] = dequantize(out[f"{name}.bytes"].view(quantize(floats, Type[name]).dtype), Type[name])
    for name in QUANTIZED:
        out[f"{name}.quantized.bytes"] = quantize(floats, Type[name])
        out[f"{name}.quantized.values"] = dequantize(out[f"{name}.quantized.bytes"], Type[name])
    return {key: np.ascontiguousarray(value) for key, value in out.items()}


def main():
    folder = sys.argv[1]
    save_file(make_blocks(), f"{folder}/blocks.safetensors")


if __name__ == "__main__":
    main()
