//! Tensors with a row for each token, by their names.

use super::job::Stage;

/// An output head and the tables of token vectors that a model without one, whose head is tied, has instead.
pub(super) const HEADS: [(&str, &[&str]); 5] = [
    (
        "lm_head.weight",
        &[
            "model.embed_tokens.weight",
            "model.language_model.embed_tokens.weight",
            "transformer.wte.weight",
            "transformer.word_embeddings.weight",
            "model.shared.weight",
            "model.decoder.embed_tokens.weight",
            "backbone.embeddings.weight",
        ],
    ),
    ("language_model.lm_head.weight", &["language_model.model.embed_tokens.weight"]),
    ("embed_out.weight", &["gpt_neox.embed_in.weight"]),
    ("output.weight", &["tok_embeddings.weight"]),
    ("cls.predictions.decoder.weight", &["bert.embeddings.word_embeddings.weight"]),
];

/// Further ends of the names of tables and heads.
const MORE: [&str; 8] = [
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "lm_head.weight",
    "lm_head.bias",
    "embed_out.bias",
    "cls.predictions.bias",
    "cls.predictions.decoder.bias",
];

/// Whether a tensor has a row for each token.
pub(super) fn is_table(name: &str) -> bool {
    let known = HEADS.iter().any(|(head, tables)| *head == name || tables.contains(&name));
    let ends = |end: &str| name.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
    let is_layer = matches!(Stage::of(name), Stage::Layer(_));
    known || name == "shared.weight" || !is_layer && MORE.iter().any(|end| ends(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_known_by_name() {
        for name in
            ["model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", "wte.weight", "shared.weight"]
        {
            assert!(is_table(name), "{name}");
        }
        for name in ["model.norm.weight", "model.layers.0.lm_head.weight", "my_lm_head.weight", "wpe.weight"]
        {
            assert!(!is_table(name), "{name}");
        }
    }
}
