// keys slot of attention: each pair has keys of its own.

fn first_key(pair: u32) -> u32 { return pair * p.tokens_k; }

fn visible(pair: u32, row: u32) -> u32 { return limit(row); }
