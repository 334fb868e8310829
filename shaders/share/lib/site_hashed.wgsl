// W[i] = scale * sign(i) * omega[position(i)] for the flat index i = offset + row * columns + col, read from STORED stored
// numbers. site_numbers() = (rows, columns, offset, bits of scale). Zero outside.
// Source: STABLE-RPS and ROAST, arXiv 2310.11611.
const MAPPING: u32 = 3u;   // 0 element, 1 chunk, 2 tile, 3 stable
const STORED: u32 = 64u;
const SEED: u32 = 1u;
const SIGN_SEED: u32 = 2u;
const LAYER: u32 = 0u;
const CHUNK: u32 = 16u;
const TILE_ROWS: u32 = 4u;
const TILE_COLUMNS: u32 = 8u;

@group(0) @binding(1) var<storage, read> theta: array<f32>;

fn position(i: u32, row: u32, col: u32) -> u32 {
    switch MAPPING {
        case 0u: { return hash(i, SEED) % STORED; }
        case 1u: { return hash(i / CHUNK, SEED) % (STORED - CHUNK + 1u) + i % CHUNK; }
        case 2u: {
            let tile = hash2(LAYER * 65536u + row / TILE_ROWS, col / TILE_COLUMNS, SEED);
            let inside = row % TILE_ROWS * TILE_COLUMNS + col % TILE_COLUMNS;
            return tile % (STORED - TILE_ROWS * TILE_COLUMNS + 1u) + inside;
        }
        default: { return (hash(i / STORED, SEED) % STORED + i % STORED) % STORED; }
    }
}

fn weight(row: u32, col: u32) -> f32 {
    if col >= site_numbers().y { return 0.0; }
    let i = site_numbers().z + row * site_numbers().y + col;
    let value = theta[position(i, row, col)];
    return select(value, -value, (hash(i, SIGN_SEED) & 1u) == 1u);
}

fn load_site(row: u32, col: u32) -> vec4<f32> {
    if row >= site_numbers().x { return vec4<f32>(0.0); }
    let four = vec4<f32>(weight(row, col), weight(row, col + 1u), weight(row, col + 2u), weight(row, col + 3u));
    return bitcast<f32>(site_numbers().w) * four;
}
