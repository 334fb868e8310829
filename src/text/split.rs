//! Rules by which byte-level BPE cuts text into words. A GGUF file names its rule in `tokenizer.ggml.pre`.
//!
//! The names are those of llama.cpp, which has more for the same (`src/llama-vocab.cpp`). The expressions are those of the
//! models' own `tokenizer.json`.

use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

/// A rule.
pub(super) struct Rule {
    /// Names in files. The first one is shown.
    names: &'static [&'static str],
    cuts: Cuts,
    /// Takes a whole word that is a token without looking at the merges.
    pub ignore_merges: bool,
    /// Begins texts with BOS where the file does not say whether to.
    pub adds_bos: bool,
    /// Composes accents first (Unicode's form NFC).
    pub composes: bool,
}

enum Cuts {
    /// GPT-2's expression, after the digits are taken apart if this is true.
    Gpt2 { digits: bool },
    /// These expressions one after another, each inside the pieces of the one before.
    By(&'static [&'static str]),
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// What llama.cpp does for files that name no rule: punctuation first, then GPT-2's words, then digits in threes.
const DEFAULT: [&str; 4] = [
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

const fn rule(names: &'static [&'static str], cuts: Cuts) -> Rule {
    Rule { names, cuts, ignore_merges: false, adds_bos: false, composes: false }
}

static RULES: [Rule; 7] = [
    rule(&["gpt-2", "phi-2", "mellum", "gigachat", "a.x-4.0", "exaone4"], Cuts::Gpt2 { digits: false }),
    rule(&["smollm", "starcoder", "refact"], Cuts::Gpt2 { digits: true }),
    Rule {
        ignore_merges: true,
        adds_bos: true,
        ..rule(
            &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
            Cuts::By(&[LLAMA3]),
        )
    },
    Rule { composes: true, ..rule(&["qwen2"], Cuts::By(&[QWEN2])) },
    // Qwen2's expression in tokenizers that do not compose accents.
    rule(&["deepseek-r1-qwen", "megrez", "kormo"], Cuts::By(&[QWEN2])),
    Rule { ignore_merges: true, adds_bos: true, ..rule(&["tekken"], Cuts::By(&[TEKKEN])) },
    rule(&["default"], Cuts::By(&DEFAULT)),
];

impl Rule {
    /// Returns the rule of this name, or a message that names those there are.
    pub fn named(name: &str) -> Result<&'static Rule, String> {
        RULES.iter().find(|rule| rule.names.contains(&name)).ok_or_else(|| {
            let all: Vec<&str> = RULES.iter().flat_map(|rule| rule.names).copied().collect();
            format!(
                "tokenizer.ggml.pre is '{name}', and how that rule cuts text is not known here; known are {}",
                all.join(", ")
            )
        })
    }

    pub fn name(&self) -> &'static str {
        self.names[0]
    }

    pub fn cutter(&self) -> Result<Sequence, String> {
        let bytes = |words: bool| ByteLevel::new(false, true, words).into();
        let parts: Vec<PreTokenizerWrapper> = match &self.cuts {
            Cuts::Gpt2 { digits: true } => vec![Digits::new(true).into(), bytes(true)],
            Cuts::Gpt2 { digits: false } => vec![bytes(true)],
            Cuts::By(all) => {
                let cuts = all.iter().map(|expression| {
                    let pattern = SplitPattern::Regex(expression.to_string());
                    let cut = Split::new(pattern, SplitDelimiterBehavior::Isolated, false);
                    cut.map(Into::into).map_err(|error| error.to_string())
                });
                cuts.chain([Ok(bytes(false))]).collect::<Result<_, String>>()?
            }
        };
        Ok(Sequence::new(parts))
    }
}

/// Returns the name of the rule that a `tokenizer.json` spells out, if it is one of those above. Of two that cut alike, it is the
/// one that composes accents as the file does.
pub(super) fn recognised(cutter: &serde_json::Value, composes: bool) -> Option<&'static str> {
    let parts = cutter["pretokenizers"].as_array().map_or(std::slice::from_ref(cutter), Vec::as_slice);
    let expression = parts.iter().find_map(|part| part["pattern"]["Regex"].as_str());
    let digits = parts.iter().any(|part| part["type"] == "Digits" && part["individual_digits"] == true);
    let gpt2 = parts.last().is_some_and(|part| part["type"] == "ByteLevel" && part["use_regex"] != false);
    let cuts_so = |rule: &&Rule| match rule.cuts {
        Cuts::Gpt2 { digits: apart } => expression.is_none() && gpt2 && digits == apart,
        Cuts::By([only]) => Some(*only) == expression && !digits && !gpt2,
        Cuts::By(_) => false,
    };
    let found = || RULES.iter().filter(cuts_so);
    found().find(|rule| rule.composes == composes).or_else(|| found().next()).map(Rule::name)
}
