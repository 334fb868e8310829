//! Benchmarks a language model packed, as it was published, beside itself expanded to f32: time to read it, device memory, prompt and
//! answer. Both run in turn, and the ratios are those of one run.
//!
//!     scripts/fetch-smollm.sh
//!     cargo bench --bench decoding [-- MODEL --text FILE --json FILE]
//!     cargo bench --bench decoding -- --random 1b
//!
//! `--random` makes a file of random weights in Q4_1 with the sizes of SmolLM2-135M, Llama-3.2-1B or Llama-3.1-8B, in the temporary
//! folder, for machines without a download: times and memory do not depend on the values. With a text, the perplexity of each form
//! of the weights is measured on its last windows, without the cache of keys.
//!
//! The answer of one sequence reads every weight once a token, so on a device whose memory is the limit it should be as much faster
//! as the packed weights are smaller; the share of the measured copy rate is printed. On a CPU driver unpacking counts too.

use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;
use tiebeam::bench::Ceilings;
use tiebeam::decode::{Windows, perplexity};
use tiebeam::models::llama::{Form, Published};
use tiebeam::models::lm::{Lm, Session, SessionOptions};
use tiebeam::store::gguf::{self, GgufType, Value};
use tiebeam::text::Words;
use tiebeam::{DType, Error, Gpu, Result, Rng, files};

/// Tokens of the prompt and of the answer: together the context.
const PROMPT: usize = 192;
const ANSWER: usize = 64;
/// Rounds, in each of which both forms answer once, one after the other.
const ROUNDS: usize = 3;
/// Windows of a text, each as long as the context. `tiebeam quantise` has the same number.
const WINDOWS: usize = 8;

/// One form of the model: its name, weights, and the times of each round.
struct Way {
    name: &'static str,
    model: Lm,
    keys: DType,
    /// Seconds to read it, and bytes of its weights on the device.
    read: f64,
    weights: u64,
    /// Bytes on the device at most while it answers, other models left out.
    most: u64,
    prompt: Vec<f64>,
    answer: Vec<f64>,
    perplexity: Option<f64>,
}

fn read(file: &Published, name: &'static str, form: Form, keys: DType) -> Result<Way> {
    // A device of its own, whose memory is that of this model.
    let gpu = Gpu::open()?;
    let started = Instant::now();
    let model = file.load(&gpu, PROMPT + ANSWER, form)?;
    gpu.synchronize()?;
    let (read, weights) = (started.elapsed().as_secs_f64(), gpu.memory_stats().used);
    Ok(Way { name, model, keys, read, weights, most: 0, prompt: vec![], answer: vec![], perplexity: None })
}

fn gpu(model: &Lm) -> Gpu {
    model.norm.gain.gpu().clone()
}

impl Way {
    /// Reads the prompt and answers, always with the same tokens. Returns the scores at the end.
    fn round(&mut self) -> Result<Vec<f32>> {
        let vocab = self.model.config.vocab as u32;
        let token = |i: usize| (i as u32 * 7919 + 13) % vocab;
        let options = SessionOptions::default().context(PROMPT + ANSWER).chunk(256).keys(self.keys);
        let mut session: Session = self.model.session_with(options)?;
        let started = Instant::now();
        let mut scores = session.push(&(0..PROMPT).map(token).collect::<Vec<_>>())?;
        self.prompt.push(started.elapsed().as_secs_f64() / PROMPT as f64);
        let started = Instant::now();
        for i in 0..ANSWER {
            scores = session.push(&[token(PROMPT + i)])?;
        }
        self.answer.push(started.elapsed().as_secs_f64() / ANSWER as f64);
        self.most = self.most.max(gpu(&self.model).memory_stats().peak);
        Ok(scores)
    }
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// The file that `scripts/fetch-smollm.sh` obtains.
fn fetched() -> PathBuf {
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).unwrap_or_default();
    cache.join("tiebeam/SmolLM2-135M-Instruct.Q4_1.gguf")
}

/// Sizes of a model: width, hidden, layers, heads, heads of keys, tokens; and whether the table of tokens is its head.
const SIZES: [(&str, [usize; 6], bool); 3] = [
    ("135m", [576, 1536, 30, 9, 3, 49152], true),
    ("1b", [2048, 8192, 16, 32, 8, 128_256], true),
    ("8b", [4096, 14336, 32, 32, 8, 128_256], false),
];

/// A file that is removed with this.
struct Made(PathBuf);

impl Drop for Made {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Blocks of Q4_1: a scale and a minimum in f16 so that weights lie in -0.03 to 0.03, and 32 random levels of 4 bits.
fn blocks(count: usize, seed: u64) -> Vec<u8> {
    let [scale, least] = [0.004f32, -0.03].map(|x| half::f16::from_f32(x).to_le_bytes());
    let stream = Rng::new(seed).next_stream();
    let mut all = Vec::with_capacity(20 * count);
    for block in 0..count as u64 {
        all.extend(scale.into_iter().chain(least));
        all.extend(stream.block(block).into_iter().flat_map(u32::to_le_bytes));
    }
    all
}

/// Writes a model of random weights.
fn random(name: &str) -> Result<Made> {
    let Some(&(_, sizes, is_tied)) = SIZES.iter().find(|(other, ..)| *other == name) else {
        return Err(Error::config(format!("--random {name}: there are 135m, 1b and 8b")));
    };
    let [width, hidden, layers, heads, key_heads, vocab] = sizes;
    let number = |key: &str, n: usize| (format!("llama.{key}"), Value::Integer(n as i128));
    let metadata = [
        ("general.architecture".to_string(), Value::Text("llama".into())),
        number("context_length", PROMPT + ANSWER),
        number("embedding_length", width),
        number("block_count", layers),
        number("feed_forward_length", hidden),
        number("attention.head_count", heads),
        number("attention.head_count_kv", key_heads),
        ("llama.attention.layer_norm_rms_epsilon".to_string(), Value::Float(f64::from(1e-5f32))),
    ];
    let keys = width / heads * key_heads;
    let ones = vec![1.0; width];
    let mut all = vec![("token_embd".to_string(), [vocab, width])];
    all.extend((!is_tied).then(|| ("output".to_string(), [vocab, width])));
    let mut norms = vec!["output_norm.weight".to_string()];
    for l in 0..layers {
        let linears = [
            ("attn_q", [width, width]),
            ("attn_k", [keys, width]),
            ("attn_v", [keys, width]),
            ("attn_output", [width, width]),
            ("ffn_gate", [hidden, width]),
            ("ffn_up", [hidden, width]),
            ("ffn_down", [width, hidden]),
        ];
        all.extend(linears.map(|(linear, shape)| (format!("blk.{l}.{linear}"), shape)));
        norms.extend(["attn_norm", "ffn_norm"].map(|norm| format!("blk.{l}.{norm}.weight")));
    }
    let packed = (0..).zip(&all).map(|(seed, (name, shape))| {
        let count = shape[0] * shape[1] / 32;
        gguf::Entry::lazy(format!("{name}.weight"), GgufType::Q4_1, shape, move || Ok(blocks(count, seed)))
    });
    let norms = norms.iter().map(|name| gguf::Entry::f32(&name[..], &[width], &ones));
    let made = Made(std::env::temp_dir().join(format!("tiebeam-random-{name}.gguf")));
    gguf::save(&made.0, &metadata, packed.chain(norms))?;
    Ok(made)
}

/// The last windows of a text in the model's tokens.
fn windows(model: &Path, text: &Path) -> Result<Windows> {
    let text = std::fs::read_to_string(text).map_err(|e| Error::io(text, e))?;
    Windows::of_text(&Words::open(model)?, &text, WINDOWS, PROMPT + ANSWER)
}

fn run() -> Result<()> {
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let (mut path, mut text, mut to, mut name) = (None, None, None, None);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--json" => to = args.next().map(PathBuf::from),
            "--text" => text = args.next().map(PathBuf::from),
            "--random" => name = Some(args.next().unwrap_or_default()),
            _ => path = Some(PathBuf::from(arg)),
        }
    }
    if name.is_some() && (path.is_some() || text.is_some()) {
        return Err(Error::config("--random is a model of its own, which has no tokenizer for a text"));
    }
    let made = name.map(|name| random(&name)).transpose()?;
    let path = made.as_ref().map(|made| made.0.clone()).or(path).unwrap_or_else(fetched);
    if !path.exists() {
        return Err(Error::config(format!(
            "{}: no such model; scripts/fetch-smollm.sh obtains it; name another one, or take --random 135m",
            path.display()
        )));
    }
    // What is wrong with the text is said before the rounds.
    let windows = text.map(|text| windows(&path, &text)).transpose()?;
    let file = Published::open(&path)?;
    let bytes = file.bytes()? as u64;
    let mut ways = [
        read(&file, "packed", Form::Stored, DType::F32)?,
        read(&file, "packed, keys in f16", Form::Stored, DType::F16)?,
        read(&file, "expanded", Form::F32, DType::F32)?,
    ];
    // Another device again, because this takes memory.
    let device = Gpu::open()?;
    let copy = Ceilings::measure(&device, |_, _| {}).copy.unwrap_or(f64::NAN);
    println!("{}\n{}: {}\n", device.adapter(), path.display(), files::size(bytes));
    // Kernels are compiled in a first round, which also shows that all say the same.
    let first: Vec<Vec<f32>> = ways.iter_mut().map(Way::round).collect::<Result<_>>()?;
    let off = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!(
        "scores differ by {:.1e} from the expanded model's, {:.1e} with keys in f16",
        off(&first[0], &first[2]),
        off(&first[1], &first[2])
    );
    ways.iter_mut().for_each(|way| (way.prompt, way.answer) = (vec![], vec![]));
    for _ in 0..ROUNDS {
        ways.iter_mut().try_for_each(|way| way.round().map(drop))?;
    }
    if let Some(windows) = windows {
        // Windows are read without a cache of keys, so its type makes no difference.
        for way in ways.iter_mut().filter(|way| way.keys == DType::F32) {
            let found = perplexity(&way.model, &windows, |_| {})?;
            println!(
                "{}: perplexity {found:.4} on {WINDOWS} windows of {} tokens",
                way.name,
                windows.length()
            );
            way.perplexity = Some(found);
        }
    }
    let mut lines = String::new();
    println!(
        "{:20} {:>8} {:>10} {:>10} {:>12} {:>12} {:>8}",
        "", "read", "weights", "at most", "prompt", "answer", "of copy"
    );
    for way in &ways {
        let [prompt, answer] = [&way.prompt, &way.answer].map(|times| 1.0 / median(times));
        let share = way.weights as f64 * answer / copy;
        println!(
            "{:20} {:6.2} s {:>10} {:>10} {prompt:8.1} t/s {answer:8.2} t/s {:7.1}%",
            way.name,
            way.read,
            files::size(way.weights),
            files::size(way.most),
            100.0 * share
        );
        lines += &format!(
            "{}\n",
            json!({"family": "decoding", "way": way.name, "model": path.file_name().map(|n| n.to_string_lossy()),
                "file_bytes": bytes, "read_seconds": way.read, "weight_bytes": way.weights, "most_bytes": way.most,
                "prompt_tokens": PROMPT, "answer_tokens": ANSWER, "prompt_tokens_per_second": prompt,
                "answer_tokens_per_second": answer, "share_of_copy": share, "rounds": ROUNDS,
                "perplexity": way.perplexity,
                "adapter": device.adapter().name, "driver": device.adapter().driver,
                "version": env!("CARGO_PKG_VERSION")})
        );
    }
    let ratio = |of: fn(&Way) -> &Vec<f64>| {
        let mut all: Vec<f64> = of(&ways[2]).iter().zip(of(&ways[0])).map(|(b, a)| b / a).collect();
        all.sort_by(f64::total_cmp);
        [all[0], all[all.len() / 2], all[all.len() - 1]]
    };
    let [prompt, answer] = [ratio(|way| &way.prompt), ratio(|way| &way.answer)];
    println!(
        "\npacked is faster by (least, median, most of {ROUNDS} rounds): prompt {prompt:.2?}, answer {answer:.2?}"
    );
    println!(
        "weights {:.3} x the file's tensors; all memory {:.3} x, with keys in f16 {:.3} x",
        ways[0].weights as f64 / bytes as f64,
        ways[0].most as f64 / bytes as f64,
        ways[1].most as f64 / bytes as f64
    );
    to.map_or(Ok(()), |to| files::append(&to, lines))
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
