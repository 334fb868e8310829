// position slot of rope: tokens count up from an offset.

fn position(row: u32) -> u32 { return p.offset + row / p.inner % p.tokens; }
