// W[row, col .. col + 3] = scale q + offset, unpacked as it is read, with levels q of a few bits. share/packed/format.rs says
// where levels and scales lie in the words of a row. site_numbers() = (rows, columns, rank, bits of a factor); the last two
// are those of slot `private`. Zero outside. `col` is a multiple of 4.
// A scale of 16 bits times a level, and times a second scale, is exact, so a multiply-add rounds once, fused or not.
const LOW_BITS: u32 = 4u;    // bits of the low part of a level: 2, 4 or 8
const HIGH_BITS: u32 = 0u;   // bits of the high part: 0, 1 or 2
const MIDDLE: u32 = 8u;      // the level that stands for 0 where no offset is stored
const GROUP: u32 = 32u;      // columns that share a scale
const SCALES: u32 = 2u;      // the position in share::packed::Scales
const LEVELS: u32 = 0u;      // 1: levels instead of weights

// Words in whole vectors, so that a unit of 32 columns of 4 bits is one load.
@group(0) @binding(1) var<storage, read> packed: array<vec4<u32>>;

fn word_at(i: u32) -> u32 { return packed[i / 4u][i % 4u]; }

fn scales_at() -> u32 { return (site_numbers().y + 31u) / 32u * (LOW_BITS + HIGH_BITS); }

fn blocks() -> u32 { return (site_numbers().y + 255u) / 256u; }

fn scale_words() -> u32 {
    let groups = (site_numbers().y + GROUP - 1u) / GROUP;
    switch SCALES {
        case 0u, 1u: { return (groups + 1u) / 2u; }
        case 2u, 3u, 4u: { return groups; }
        case 5u: { return 2u * groups; }
        case 7u: { return 4u * blocks() + (blocks() + 1u) / 2u; }
        default: { return 5u * blocks(); }
    }
}

// The word at which a row begins: at a whole vector, if units are read in vectors.
fn row_start(row: u32) -> u32 {
    let words = scales_at() + scale_words();
    return row * select(words, (words + 3u) / 4u * 4u, LOW_BITS >= 4u);
}

// f16 and bf16 in the low or the high half of a word.
fn half_of(word: u32, high: u32) -> f32 { return unpack2x16float(word >> (16u * high)).x; }
fn short_of(word: u32, high: u32) -> f32 { return bitcast<f32>((word >> (16u * high)) << 16u); }

fn from_middle(scale: f32) -> vec2<f32> { return vec2(scale, -f32(MIDDLE) * scale); }
fn from_zero(scale: f32, word: u32) -> vec2<f32> { return vec2(scale, -scale * f32(bitcast<i32>(word) >> 16u)); }

// Scale and offset of a column, from the row's words.
fn scale_of(start: u32, col: u32) -> vec2<f32> {
    if LEVELS == 1u { return vec2(1.0, 0.0); }
    let first = start + scales_at();
    let g = col / GROUP;
    let block = col / 256u;
    let inner = col % 256u;
    switch SCALES {
        case 0u: { return from_middle(half_of(word_at(first + g / 2u), g % 2u)); }
        case 1u: { return from_middle(short_of(word_at(first + g / 2u), g % 2u)); }
        case 2u: { return unpack2x16float(word_at(first + g)); }
        case 3u: {
            let word = word_at(first + g);
            return from_zero(half_of(word, 0u), word);
        }
        case 4u: {
            let word = word_at(first + g);
            return from_zero(short_of(word, 0u), word);
        }
        case 5u: { return bitcast<vec2<f32>>(vec2(word_at(first + 2u * g), word_at(first + 2u * g + 1u))); }
        case 6u: {
            let d = unpack2x16float(word_at(first + 5u * block));
            let two = word_at(first + 5u * block + 1u + inner / 64u) >> (inner / 32u % 2u * 16u);
            return vec2(d.x * f32(two & 255u), -(d.y * f32((two >> 8u) & 255u)));
        }
        case 7u: {
            let d = half_of(word_at(first + 4u * blocks() + block / 2u), block % 2u);
            let word = word_at(first + 4u * block + inner / 64u);
            return from_middle(d * f32(bitcast<i32>(word << (24u - inner / 16u % 4u * 8u)) >> 24u));
        }
        default: {
            let d = unpack2x16float(word_at(first + 5u * block));
            let two = word_at(first + 5u * block + 1u + inner / 64u) >> (inner / 16u % 4u * 8u);
            return vec2(d.x * f32(two & 15u), -(d.y * f32((two >> 4u) & 15u)));
        }
    }
}

// Whole numbers below 2^23 as floats. GPUs add faster than they convert.
fn floats(numbers: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(numbers | vec4(0x4b000000u)) - vec4(8388608.0);
}

// Four numbers of so many bits, one in each byte from `shift` on.
fn fields(word: u32, shift: u32, bits: u32) -> vec4<f32> {
    return floats((vec4(word) >> (vec4(0u, 8u, 16u, 24u) + shift)) & vec4((1u << bits) - 1u));
}

// The weights 4 i .. 4 i + 3 of a unit of 32 columns, from the words of the low and of the high part that have them.
fn unpack(low: u32, high: u32, i: u32, scale: vec2<f32>) -> vec4<f32> {
    if LOW_BITS == 4u && HIGH_BITS == 0u {
        // Nibbles are masked where they are, and the factors by which that multiplies them are taken out of the scale.
        let two = vec4(low, low, low >> 16u, low >> 16u);
        if i < 4u {
            let q = floats(two & vec4(0xfu, 0xf00u, 0xfu, 0xf00u));
            return fma(scale.x * vec4(1.0, 0.00390625, 1.0, 0.00390625), q, vec4(scale.y));
        }
        let q = floats(two & vec4(0xf0u, 0xf000u, 0xf0u, 0xf000u));
        return fma(scale.x * vec4(0.0625, 0.000244140625, 0.0625, 0.000244140625), q, vec4(scale.y));
    }
    var q = fields(low, i / LOW_BITS * LOW_BITS, LOW_BITS);
    if HIGH_BITS == 1u {
        q += f32(1u << LOW_BITS) * floats((vec4(high) >> (vec4(0u, 1u, 2u, 3u) + 4u * i)) & vec4(1u));
    }
    if HIGH_BITS == 2u {
        q += f32(1u << LOW_BITS) * fields(high, i / 2u * 2u, 2u);
    }
    return fma(vec4(scale.x), q, vec4(scale.y));
}

fn load_site(row: u32, col: u32) -> vec4<f32> {
    let columns = site_numbers().y;
    if row >= site_numbers().x || col >= columns { return vec4<f32>(0.0); }
    let start = row_start(row);
    let unit = col / 32u;
    let i = col % 32u / 4u;
    let low = word_at(start + unit * LOW_BITS + i % LOW_BITS);
    var high = 0u;
    if HIGH_BITS > 0u {
        let first = start + (columns + 31u) / 32u * LOW_BITS;
        high = word_at(first + unit * HIGH_BITS + i % max(HIGH_BITS, 1u));
    }
    let w = with_private(row, col, unpack(low, high, i, scale_of(start, col)));
    return select(vec4<f32>(0.0), w, vec4(col, col + 1u, col + 2u, col + 3u) < vec4(columns));
}
