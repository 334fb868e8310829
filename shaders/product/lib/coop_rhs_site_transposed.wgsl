// w is the transpose of a site's matrix [n, k], computed as matmul_coop reads it: y = x W^T. It is zero outside. A line of
// the tile is a row of the site.
const RIGHT_BY_ROWS: u32 = 0u;

fn site_numbers() -> vec4<u32> { return p.rhs; }

fn rhs_start(base: u32, col0: u32, line: u32, along: u32) -> u32 { return 0u; }

fn rhs_fetch(start: u32, col0: u32, k0: u32, line: u32, along: u32) -> RhsWord {
    return load_site(col0 + line, k0 + along);
}

fn rhs_halves(word: RhsWord, k0: u32, line: u32, along: u32) -> vec4<f16> { return vec4<f16>(word); }
