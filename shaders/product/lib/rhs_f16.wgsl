// Four elements of a matmul's rhs as stored: f16, two per word. Unpacking needs no feature of the adapter.
alias RhsWord = vec2<u32>;

fn rhs_of(word: RhsWord) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(word.x), unpack2x16float(word.y));
}
