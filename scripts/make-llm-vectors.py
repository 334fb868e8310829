#!/usr/bin/env python3
"""Makes tiny language models of three families with transformers, and what transformers says about them, for tests/vectors/llm.

    pip install torch transformers tokenizers sentencepiece protobuf gguf safetensors      # in a scratch environment
    scripts/make-llm-vectors.py

The models have random weights of 16 bits. Their tokenizers are trained on examples/data/corpus.txt. Each folder gets the model as it
would be downloaded, `expected.json` (tokens of texts, decoded texts, a rendered chat, ends) and `expected.safetensors` (`logits`
[16, vocabulary] after the tokens `sequence` of expected.json, computed in float32 on the CPU). llama3/model.gguf is the first model in
llama.cpp's format, and mistral/vocabulary.gguf the third model's tokenizer. Equal versions of the packages give equal files.
"""
import io
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch
import transformers
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, MistralConfig, MistralForCausalLM
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import import_protobuf

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "tests/vectors/llm"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# Control tokens of all three models stand in these texts, where they are text.
TEXTS = [
    "",
    "The tensor is the weight of the tree, and it's the last.",
    "12345612 it'S 1234 hi\n\n\n123456!!\n",
    "I'LL they'VE we're DON'T o'clock 'sample '",
    " leading and trailing  ",
    "   \t\tindented\n    code();\r\n\r\n\tend\n",
    "\n\n \n  \n",
    "emoji 🙂👩‍👩‍👧🇨🇭 and ½ Ⅷ ٣٤٥ 10²",
    "café cafe\u0301 e\u0323\u0302 \ufb01n Å",
    "日本語のテキスト、中文字符 и русский ελληνικά",
    "<|begin_of_text|><|eot_id|> <|im_start|>user<|im_end|> <s> </s> [INST] <unk> <0x0A>",
    "a\u00a0b\u200bc\u3000d\u2581e\x00f",
    "fn main() { let x = vec![0u8; 1024]; } // 3.14159e-10 == 0xFF",
    " x",
    "x",
    "!!!???...,,, ---- ==== $$$ ^^^ ~~~ ``",
    "longwordwithoutblanks" * 8,
]
MESSAGES = [
    {"role": "user", "content": " What is the weight's shape?\n"},
    {"role": "assistant", "content": "It is [32, 32]."},
    {"role": "user", "content": "And 🙂 in\n\nlines?"},
]
LLAMA3_CHAT = """{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'].strip() %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- if tools is not none %}
    {{- raise_exception('Tools are not offered.') }}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + ns.system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('Unknown role ' ~ message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CHATML = """{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
MISTRAL_CHAT = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate between user and assistant.') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}
{% else %}
{{ ' ' + message['content'] + eos_token }}
{% endif %}
{% endfor %}
"""


def sentences():
    """The corpus, and lines with what it has too little of."""
    corpus = (ROOT / "examples/data/corpus.txt").read_text(encoding="utf-8")
    extra = "it's we'll they've I'm 'S 'S 12 123 1234 123456 2024 the end\n\n\n  and\n\n" * 200
    return [line + "\n" for line in corpus[:100_000].split("\n")] + [extra]


def byte_level(expression, tokens, control, normalizer=None, ignore_merges=False):
    """Byte-level BPE of so many tokens, with control tokens behind them."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=tokens, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sentences(), trainer)
    if ignore_merges:
        whole = json.loads(tokenizer.to_str())
        whole["model"]["ignore_merges"] = True
        tokenizer = Tokenizer.from_str(json.dumps(whole))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def random_model(model, seed):
    """Fills all weights, norms and biases included, with numbers of 16 bits."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        mean = 1.0 if "norm" in name else 0.0
        values = torch.randn(weight.shape, generator=generator) * (0.1 if mean else 0.3) + mean
        weight.data = values.to(torch.bfloat16)
    return model.eval()


def logits(folder, kind, sequence, **options):
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options).eval()
    with torch.no_grad():
        return model(torch.tensor([sequence])).logits[0].numpy()


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=True, split_special_tokens=True)


def texts_of(tokenizer):
    """Tokens of all texts. What is decoded is decoded from them."""
    rows = []
    for text in TEXTS:
        tokens = ids(tokenizer, text)
        decoded = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        rows.append({"text": text, "tokens": tokens, "decoded": decoded})
    return rows


def expect(folder, tokenizer, model, ends, bos, **more):
    size = model.config.vocab_size
    sequence = [(7 * i * i + 11 * i + 3) % size for i in range(16)]
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    chat = tokenizer.encode(rendered, add_special_tokens=False)
    expected = {
        "made_with": {
            "transformers": transformers.__version__,
            "torch": torch.__version__.split("+")[0],
            "tokenizers": __import__("tokenizers").__version__,
        },
        "vocabulary": len(tokenizer),
        "bos": bos,
        "ends": ends,
        "texts": texts_of(tokenizer),
        "messages": MESSAGES,
        "rendered": rendered,
        "chat": chat,
        "sequence": sequence,
        **more,
    }
    (folder / "expected.json").write_text(json.dumps(expected, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    found = logits(folder, type(model), sequence)
    save_file({"logits": found}, folder / "expected.safetensors")
    return sequence, found


def fresh(name):
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def set_json(path, **values):
    whole = json.loads(path.read_text())
    whole.update(values)
    path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def as_downloaded(path):
    """Writes the rotary angles as the models of 2024 have them, which transformers still reads."""
    whole = json.loads(path.read_text())
    rope = whole.pop("rope_parameters")
    whole["rope_theta"] = rope.pop("rope_theta")
    whole["rope_scaling"] = rope
    path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def rope_freqs(config):
    """The divisors of the rotary frequencies, by the formula of Llama 3.1, as the converter writes them."""
    rope = config.rope_parameters
    size = config.hidden_size // config.num_attention_heads
    wave = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    context = rope["original_max_position_embeddings"]
    smooth = (context / wave - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wave < context / high, 1, np.where(wave > context / low, factor, between)).astype(np.float32)


def rotated(weight, heads):
    """GGUF has the rows of Q and K in pairs that are rotated together, and safetensors in halves."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path, model, tokenizer, control, named, chat):
    config = model.config
    weights = {name: weight.float().numpy() for name, weight in model.state_dict().items()}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer.to_str())
    tokens = [token for token, _ in sorted(tokenizer.get_vocab(True).items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    writer.add_bos_token_id(tokens.index(named["bos"]))
    writer.add_eos_token_id(tokens.index(named["eos"]))
    writer.add_chat_template(chat)
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor("rope_freqs.weight", rope_freqs(config))
    for layer in range(config.num_hidden_layers):
        for theirs, ours in BLOCK.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(ours)
            weight = rotated(weight, heads) if heads else weight
            writer.add_tensor(f"blk.{layer}.{ours}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3():
    folder = fresh("llama3")
    control = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = byte_level(LLAMA3, 330, control, ignore_merges=True)
    bos, eos = "<|begin_of_text|>", "<|eot_id|>"
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=LLAMA3_CHAT)
    fast.save_pretrained(folder)
    ends = [tokenizer.token_to_id(token) for token in [eos, "<|end_of_text|>"]]
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={**rope, "original_max_position_embeddings": 16, "rope_theta": 500.0},
        bos_token_id=fast.bos_token_id, eos_token_id=ends,
    )
    model = random_model(LlamaForCausalLM(config), 1)
    model.to(torch.bfloat16).save_pretrained(folder)
    as_downloaded(folder / "config.json")
    assert not (logits(folder, LlamaForCausalLM, list(range(16))) == logits(
        folder, LlamaForCausalLM, list(range(16)), rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )).all(), "the scaled angles change nothing"
    expect(folder, fast, model, ends, fast.bos_token_id)
    write_gguf(folder / "model.gguf", model, tokenizer, control, {"bos": bos, "eos": eos}, LLAMA3_CHAT)


def qwen2():
    folder = fresh("qwen2")
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level(QWEN2, 310, control, normalizer=normalizers.NFC())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    fast.save_pretrained(folder, save_jinja_files=False)
    ends = [tokenizer.token_to_id(token) for token in ["<|im_end|>", "<|endoftext|>"]]
    config = Qwen2Config(
        # The table has more places than the tokenizer has tokens, as it is in Qwen's own models.
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, bos_token_id=ends[1], eos_token_id=ends[0],
    )
    model = random_model(Qwen2ForCausalLM(config), 2)
    model.generation_config.eos_token_id = ends
    model.to(torch.bfloat16).save_pretrained(folder)
    expect(folder, fast, model, ends, None)


def train_pieces(path):
    """A BPE model of sentencepiece, which does not say where its text was."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.rstrip("\n") for line in sentences() if line.strip()), model_writer=out,
        model_type="bpe", vocab_size=350, byte_fallback=True, character_coverage=0.985, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        control_symbols=["[INST]", "[/INST]"], unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(out.getvalue())


def pieces_gguf(path, model):
    """The tokenizer of a `tokenizer.model`, as the converter writes it."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece for piece in model.pieces])
    writer.add_token_scores([piece.score for piece in model.pieces])
    writer.add_token_types([piece.type for piece in model.pieces])
    writer.add_chat_template(MISTRAL_CHAT)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def legacy_tokens(fast, model):
    """Tokens by transformers' older rule, which `"legacy": true` asks for: a blank before each part, even if there is one. They are
    those of sentencepiece itself."""
    tokenizer = Tokenizer.from_str(fast.backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = None
    tokenizer.encode_special_tokens = True
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = [tokenizer.encode(text).ids for text in TEXTS]
    assert tokens == [[fast.bos_token_id] + pieces.encode(text) for text in TEXTS], "sentencepiece gives other tokens"
    return tokens


def mistral():
    folder = fresh("mistral")
    train_pieces(folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    fast = LlamaTokenizer.from_pretrained(folder, legacy=False, add_bos_token=True, chat_template=MISTRAL_CHAT)
    fast.save_pretrained(folder, save_jinja_files=False)
    set_json(folder / "tokenizer_config.json", legacy=False, chat_template=[{"name": "default", "template": MISTRAL_CHAT}])
    config = MistralConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False, sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=1, eos_token_id=2,
    )
    model = random_model(MistralForCausalLM(config), 3)
    model.to(torch.bfloat16).save_pretrained(folder)
    legacy = legacy_tokens(fast, folder / "tokenizer.model")
    sequence, found = expect(folder, fast, model, [2], 1, legacy=legacy)
    whole = logits(folder, MistralForCausalLM, sequence, sliding_window=None)
    assert np.abs(whole[:4] - found[:4]).max() < 1e-4 < np.abs(whole[4:] - found[4:]).max(), "the window changes nothing"
    proto = import_protobuf().ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    pieces_gguf(folder / "vocabulary.gguf", proto)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    llama3()
    qwen2()
    mistral()
