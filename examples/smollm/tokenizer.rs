//! Tokenizers: byte-level BPE with the tokens and merges inside a GGUF file, or a folder's `tokenizer.json`.

use std::path::Path;
use tiebeam::store::gguf::{Gguf, Value};
use tiebeam::{Error, Result};
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, PreTokenizerWrapper, Tokenizer};

/// Converts text to tokens and back.
pub struct Words {
    tokenizer: Tokenizer,
    /// The token that ends an answer.
    pub end: u32,
}

fn fault(message: impl ToString) -> Error {
    Error::config(format!("the file's tokenizer: {}", message.to_string()))
}

impl Words {
    /// Reads the metadata `tokenizer.ggml.*`.
    pub fn of(file: &Gguf) -> Result<Words> {
        let model = file.text("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(fault(format!("its kind is '{model}'; only byte-level BPE ('gpt2') is read")));
        }
        let tokens = file.texts("tokenizer.ggml.tokens")?;
        let vocabulary = tokens.iter().zip(0..).map(|(token, id)| (token.to_string(), id)).collect();
        let merges: Option<Vec<(String, String)>> = file
            .texts("tokenizer.ggml.merges")?
            .iter()
            .map(|merge| merge.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string())))
            .collect();
        let merges = merges.ok_or_else(|| fault("a merge is not two tokens with a blank between"))?;
        let mut tokenizer = Tokenizer::new(BPE::new(vocabulary, merges));
        let bytes = ByteLevel::new(false, false, true);
        // SmolLM's tokenizer splits numbers into single digits.
        let parts: Vec<PreTokenizerWrapper> = match file.text("tokenizer.ggml.pre").unwrap_or("default") {
            "smollm" => vec![Digits::new(true).into(), bytes.into()],
            _ => vec![bytes.into()],
        };
        tokenizer.with_pre_tokenizer(Some(Sequence::new(parts)));
        tokenizer.with_decoder(Some(bytes));
        // Kind 3 marks control tokens, which text is never encoded to.
        let Some(Value::List(kinds)) = file.metadata().get("tokenizer.ggml.token_type") else {
            return Err(fault("there is no list tokenizer.ggml.token_type"));
        };
        let special: Vec<AddedToken> = tokens
            .iter()
            .zip(kinds)
            .filter(|(_, kind)| **kind == Value::Integer(3))
            .map(|(token, _)| AddedToken::from(*token, true))
            .collect();
        tokenizer.add_special_tokens(&special);
        Ok(Words { tokenizer, end: file.number("tokenizer.ggml.eos_token_id")? as u32 })
    }

    /// Reads `tokenizer.json` beside a `config.json` of this text.
    pub fn in_folder(folder: &Path, config: &str) -> Result<Words> {
        let path = folder.join("tokenizer.json");
        let fault = |message: String| Error::format(&path, message);
        if !path.is_file() {
            return Err(fault("it is missing; a model folder needs its tokenizer".into()));
        }
        let tokenizer = Tokenizer::from_file(&path).map_err(|e| fault(e.to_string()))?;
        let config: serde_json::Value = serde_json::from_str(config).map_err(|e| fault(e.to_string()))?;
        // The value is one number or a list, of which the first is taken.
        let end = config["eos_token_id"].as_u64().or(config["eos_token_id"][0].as_u64());
        let end = end.and_then(|id| u32::try_from(id).ok());
        Ok(Words { tokenizer, end: end.ok_or_else(|| fault("config.json has no eos_token_id".into()))? })
    }

    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode(text, false).map_err(fault)?.get_ids().to_vec())
    }

    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer.decode(tokens, true).map_err(fault)
    }
}
