// keys slot of attention: each pair has its own keys.

fn entry_of(pair: u32) -> u32 { return pair / p.kv_heads; }

fn visible(pair: u32, row: u32) -> u32 { return limit(row); }

// No query of the pair sees a key from here on.
fn furthest(pair: u32) -> u32 { return p.tokens_k; }
