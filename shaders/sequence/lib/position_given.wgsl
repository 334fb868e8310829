// position slot of rope: each token brings its own, of all batch entries or of each.

@group(0) @binding(3) var<storage, read> given: array<u32>;

fn position(row: u32) -> u32 { return given[row / p.batch_rows * p.batch_step + row % p.tokens]; }
