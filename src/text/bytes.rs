//! The tokenizer whose tokens are the 256 bytes.

use super::stream::Rule;
use super::words::{Parts, Words};
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};

/// The character by which byte-level tokenizers write a byte: printable ones of Latin-1 by themselves, the others by characters from
/// U+0100 on, as GPT-2 does.
fn written(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    match printable(byte) {
        true => char::from(byte),
        false => {
            let before = (0..byte).filter(|b| !printable(*b)).count() as u32;
            char::from_u32(256 + before).unwrap_or_default()
        }
    }
}

/// A `tokenizer.json` whose token `b` is the byte `b`, for models of bytes. Other programs read it too.
///
/// ```
/// # let folder = std::env::temp_dir().join(format!("tiebeam-bytes-{}", std::process::id()));
/// # std::fs::create_dir_all(&folder).unwrap();
/// use tiebeam::text::{Words, byte_tokenizer};
/// std::fs::write(folder.join("tokenizer.json"), byte_tokenizer()).unwrap();
/// let words = Words::open(&folder)?;
/// assert_eq!(words.encode("Aé\n")?, [65, 195, 169, 10]);
/// assert_eq!(words.decode(&[65, 195, 169, 10])?, "Aé\n");
/// # std::fs::remove_dir_all(&folder).ok();
/// # Ok::<(), tiebeam::Error>(())
/// ```
pub fn byte_tokenizer() -> String {
    let vocab: Map<String, Value> = (0..=255u8).map(|b| (written(b).to_string(), json!(b))).collect();
    let rule =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let all = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": rule, "post_processor": null, "decoder": rule,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [],
        },
    });
    all.to_string()
}

impl Words {
    /// The tokenizer of [`byte_tokenizer`].
    ///
    /// ```
    /// let words = tiebeam::text::Words::of_bytes()?;
    /// assert_eq!((words.encode("A\u{e9}")?, words.table()), (vec![65, 195, 169], 256));
    /// # Ok::<(), tiebeam::Error>(())
    /// ```
    ///
    /// # Errors
    /// None that is known; the text of the tokenizer is always the same.
    pub fn of_bytes() -> Result<Words> {
        let fault = |error: String| Error::config(format!("the tokenizer of bytes: {error}"));
        let tokenizer = byte_tokenizer().parse().map_err(|error| fault(format!("{error}")))?;
        let parts = Parts {
            tokenizer,
            rule: Rule::byte_level(),
            before: Vec::new(),
            after: Vec::new(),
            begins_chats: false,
            ends: Vec::new(),
            limit: 256,
            kind: "bytes".into(),
            chat: None,
        };
        Words::assembled(parts).map_err(fault)
    }
}
