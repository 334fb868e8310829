#!/usr/bin/env python3
"""Makes the reference vectors of quantised weights in tests/vectors/gguf, by independent implementations.

    pip install numpy torch gguf safetensors compressed-tensors      # in a scratch environment
    scripts/make-gguf-vectors.py tests/vectors/gguf

blocks.safetensors has blocks of every type of GGUF that is read, and their values by the package gguf. folders.safetensors has
weights in the layouts of Hugging Face's folders, with the values that they stand for.
"""
import sys

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gguf import GGMLQuantizationType as Type
from gguf import GGML_QUANT_SIZES as SIZES
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

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


def grouped(x, columns):
    """One number for each column from one for each group."""
    return x.repeat_interleave(columns // x.shape[1], dim=1)


def compressed(seed, bits, rows, columns, group, symmetric, dtype):
    """Tensors of compressed-tensors' pack-quantized format, packed by that package."""
    g = torch.Generator().manual_seed(seed)
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    groups = 1 if group is None else columns // group
    q = torch.randint(low, high + 1, (rows, columns), generator=g)
    scale = (torch.rand(rows, groups, generator=g) * 0.1 + 0.001).to(dtype)
    zero = torch.randint(low, high + 1, (rows, groups), generator=g).to(torch.int8)
    zero = torch.zeros_like(zero) if symmetric else zero
    values = (q - grouped(zero, columns)).float() * grouped(scale, columns).float()
    args = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, group_size=group, strategy="channel" if group is None else "group"
    )
    # The package rounds the values again, in f64, so that it finds the levels from which they were made.
    state = {"weight": values.double(), "weight_scale": scale.double()}
    if not symmetric:
        state["weight_zero_point"] = zero
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    out = BaseCompressor.get_value_from_registry("pack-quantized").compress(state, scheme)
    out["weight_scale"] = scale
    return {**out, "values": values}


def pack(values, bits, order=None):
    """Packs numbers along the last axis into words, the first one lowest. `order` is the column of each place in a word."""
    count = 32 // bits
    values = values.reshape(*values.shape[:-1], -1, count)
    values = values[..., order or list(range(count))]
    shifts = (np.arange(count) * bits).astype(np.uint64)
    return (values.astype(np.uint64) << shifts).sum(-1).astype(np.uint32).view(np.int32)


def levels(seed, bits, rows, columns, group):
    """Levels, zeros and scales as GPTQ and AWQ have them: columns run over the outputs."""
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 1 << bits, (columns, rows))
    zeros = rng.integers(1, 1 << bits, (columns // group, rows))
    scales = rng.uniform(0.001, 0.1, zeros.shape).astype(np.float16)
    of = np.arange(columns) // group
    values = ((q - zeros[of]) * scales[of].astype(np.float32)).T.astype(np.float32)
    return q, zeros, scales, of, values


def gptq(seed, bits, rows, columns, group, one):
    """AutoGPTQ's layout: words run along the inputs, zeros along the outputs, less `one` in its first version."""
    q, zeros, scales, of, values = levels(seed, bits, rows, columns, group)
    out = {"qweight": pack(q.T, bits).T, "qzeros": pack(zeros - one, bits), "scales": scales, "g_idx": of.astype(np.int32)}
    return tensors({**out, "values": values})


def awq(seed, rows, columns, group):
    """AutoAWQ's layout of version GEMM: words run along the outputs, in an order of their own."""
    q, zeros, scales, _, values = levels(seed, 4, rows, columns, group)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return tensors({"qweight": pack(q, 4, order), "qzeros": pack(zeros, 4, order), "scales": scales, "values": values})


def tensors(arrays):
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}


def make_folders():
    all = {
        "ct4": compressed(1, 4, 12, 96, 32, True, torch.float16),
        "ct4_bf16": compressed(2, 4, 12, 96, None, True, torch.bfloat16),
        "ct4_zero": compressed(3, 4, 12, 96, 32, False, torch.float16),
        "ct4_zero_bf16": compressed(4, 4, 9, 48, 16, False, torch.bfloat16),
        "ct8": compressed(5, 8, 6, 44, None, True, torch.float32),
        "ct8_zero": compressed(6, 8, 9, 64, 32, False, torch.float16),
        "gptq4": gptq(7, 4, 16, 96, 32, 1),
        "gptq4_v2": gptq(8, 4, 8, 48, 16, 0),
        "gptq8": gptq(9, 8, 16, 64, 64, 1),
        "awq": awq(10, 16, 96, 32),
        "awq_short": awq(11, 8, 48, 16),
    }
    return {f"{case}.{key}": value.contiguous() for case, made in all.items() for key, value in made.items()}


def main():
    folder = sys.argv[1]
    save_file(make_blocks(), f"{folder}/blocks.safetensors")
    save_torch(make_folders(), f"{folder}/folders.safetensors")


if __name__ == "__main__":
    main()
