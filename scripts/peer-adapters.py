#!/usr/bin/env python3
"""Compares merges of adapters by `tiebeam` with PEFT and transformers, on a small Llama of random weights.

    python3 scripts/peer-adapters.py target/release/tiebeam

Needs torch, transformers, peft and safetensors. Prints the largest difference of each comparison, and fails above 1e-6."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

tiebeam = os.path.abspath(sys.argv[1])
folder = Path(tempfile.mkdtemp(prefix="peer-adapters-"))
os.chdir(folder)


def model(path="base"):
    return LlamaForCausalLM.from_pretrained(path)


def run(*words):
    subprocess.run([tiebeam, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def merge(config, out):
    Path(f"{out}.yaml").write_text(config)
    run("merge", f"{out}.yaml", "--out", out)
    adapter = Path(out, "adapter_model.safetensors")
    return load_file(adapter if adapter.exists() else Path(out, "model.safetensors"))


def weights(path, name="model"):
    return load_file(f"{path}/{name}.safetensors")


torch.manual_seed(0)
sizes = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6)
LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64)).save_pretrained("base")
for seed, name in enumerate("ab", 1):
    torch.manual_seed(seed)
    targets = ["q_proj", "v_proj", "down_proj"]
    tuned = get_peft_model(model(), LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    for key, value in tuned.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(value, std=0.05)
    tuned.save_pretrained(name)
    tuned.merge_and_unload().save_pretrained(f"full-{name}")

full = {name: weights(f"full-{name}") for name in "ab"}
factors = {name: weights(name, "adapter_model") for name in "ab"}
failed = False


def compare(what, got, want):
    global failed
    most = max((got[key].float() - value.float()).abs().max().item() for key, value in want.items())
    failed |= not most < 1e-6
    print(f"{what:<44} {most:.1e}")


compare("an adapter on its base", merge("{merge_method: passthrough, models: [{model: base+a}]}", "applied"), full["a"])
linear = """
merge_method: linear
models: [{model: base+a, parameters: {weight: 0.3}}, {model: base+b, parameters: {weight: 0.7}}]
"""
compare("two models with adapters", merge(linear, "linear"), {k: 0.3 * full["a"][k] + 0.7 * full["b"][k] for k in full["a"]})
averaged = merge("{merge_method: average, models: [{model: a}, {model: b}]}", "averaged")
compare("adapters, factor by factor", averaged, {k: (factors["a"][k] + factors["b"][k]) / 2 for k in factors["a"]})
Path("kept.yaml").write_text("{merge_method: rmm, models: [{model: a}, {model: b}], parameters: {basis: 2}}")
run("merge", "kept.yaml", "--out", "kept")
run("rebuild", "kept", "b", "--out", "rebuilt")
compare("an adapter that is rebuilt", weights("rebuilt", "adapter_model"), factors["b"])
run("extract", "base", "full-a", "--rank", "4", "--out", "extracted")
extracted = PeftModel.from_pretrained(model(), "extracted").merge_and_unload().state_dict()
compare("an adapter that is extracted, put on by PEFT", extracted, full["a"])
for path in ["averaged", "rebuilt"]:
    PeftModel.from_pretrained(model(), path)
for path in ["applied", "linear"]:
    loaded = model(path).state_dict()
    compare(f"transformers reads `{path}`", loaded, weights(path))
sys.exit(failed)
