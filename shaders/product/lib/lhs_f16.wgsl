// Four elements of a matmul's lhs as stored: f16, two per word. Unpacking needs no feature of the adapter.
alias LhsWord = vec2<u32>;

fn lhs_of(word: LhsWord) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(word.x), unpack2x16float(word.y));
}
