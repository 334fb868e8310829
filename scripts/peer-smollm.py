#!/usr/bin/env python3
"""Computes scores of SmolLM2 with an independent implementation (transformers on PyTorch), for tests/vectors/smollm.

    pip install torch transformers accelerate gguf safetensors      # in a scratch environment
    scripts/peer-smollm.py "$(scripts/fetch-smollm.sh)" tests/vectors/smollm/smollm2_135m.safetensors [--save FOLDER]

Writes the tokens of a fixed sentence and, after each token, the scores of a part of the vocabulary and the log-sum-exp of all scores,
in f64. --save also writes the model as a Hugging Face folder, on which the example can be tried.
"""
import os
import sys

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "In the beginning God created the heaven and the earth. In 1905 Albert Einstein, aged 26, wrote: E = mc^2.\n"


def main():
    gguf, out = sys.argv[1], sys.argv[2]
    folder, name = os.path.split(os.path.abspath(gguf))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
    if "--save" in sys.argv:
        to = sys.argv[sys.argv.index("--save") + 1]
        # The weights were dequantised when they were read. Only this label says that they are still quantised.
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(to)
        tokenizer.save_pretrained(to)
    tokens = tokenizer(TEXT, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        scores = model.double()(tokens).logits[0]
    ids = np.arange(0, scores.shape[1], 193, dtype=np.int32)
    save_file(
        {
            "tokens": tokens[0].numpy().astype(np.int32),
            "ids": ids,
            "scores": scores[:, ids].numpy(),
            "logsumexp": torch.logsumexp(scores, -1).numpy(),
            "best": scores.argmax(-1).numpy().astype(np.int32),
        },
        out,
        metadata={"text": TEXT, "model": name},
    )
    print(tokens.shape[1], "tokens; best behind the last:", repr(tokenizer.decode(scores[-1].argmax())))


main()
