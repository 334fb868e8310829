//! The passes of attention.

/// The three passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// The result.
    Forward,
    /// The gradient of the queries.
    Queries,
    /// The gradients of keys and values.
    Keys,
}

impl Pass {
    /// The kernel's entry.
    pub fn entry(self) -> &'static str {
        match self {
            Pass::Forward => "forward",
            Pass::Queries => "queries",
            Pass::Keys => "keys",
        }
    }

    /// Products over all pairs of a query and a key.
    pub fn products(self) -> f64 {
        match self {
            Pass::Forward => 2.0,
            Pass::Queries => 3.0,
            Pass::Keys => 4.0,
        }
    }
}
