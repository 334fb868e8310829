//! Text of language models: tokenizers and chat templates, read from the files that come with a model.
//!
//! [`Words`] turns text into tokens and back as the model's own tokenizer does. It is read from a GGUF file's metadata or from a
//! Hugging Face folder (`tokenizer.json` or `tokenizer.model`), together with what stands around the text: the token that begins
//! it, the tokens that end an answer, and the [`ChatTemplate`] that writes a conversation as one text. Byte-level BPE and
//! sentencepiece BPE are read. How text is cut before BPE decides which tokens come out, and a GGUF file only names the rule, so
//! a rule that is not known here is refused by its name. Control tokens such as `<|im_end|>` are only recognised in the text that
//! a template wrote ([`Words::encode_chat`]). A message is part of that text, and can end itself by such a token, as in transformers
//! and llama.cpp. [`Stream`] gives the text of an answer while its tokens come.
//!
//! ```no_run
//! use tiebeam::text::{Message, Words};
//!
//! let words = Words::open("model.gguf".as_ref())?;
//! let prompt = match words.chat() {
//!     Some(chat) => words.encode_chat(&chat.render(&[Message::user("How are you?")], true)?)?,
//!     None => words.encode("How are you?")?,
//! };
//! # let answer = prompt.clone();
//! let mut stream = words.stream();
//! for token in answer {
//!     print!("{}", stream.push(token)?);
//! }
//! println!("{}", stream.finish());
//! # Ok::<(), tiebeam::Error>(())
//! ```

mod bytes;
mod chat;
mod folder;
mod functions;
mod json;
mod keep;
mod metadata;
mod pieces;
mod proto;
mod split;
mod stream;
mod words;
mod write;

pub use bytes::byte_tokenizer;
pub use chat::{ChatTemplate, Message};
pub use stream::Stream;
pub use words::Words;
pub use write::{TokenizerMetadata, gguf_metadata};
