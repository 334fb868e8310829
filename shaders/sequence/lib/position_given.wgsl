// position slot of rope: the position of each token is given, either once for all batch entries or for each.

@group(0) @binding(3) var<storage, read> given: array<u32>;

fn position(row: u32) -> u32 { return given[row / p.batch_rows * p.batch_step + row / p.inner % p.tokens]; }
