// Four elements of a matmul's lhs as stored: bf16, two per word. The upper half of an f32 needs no feature of the adapter.
alias LhsWord = vec2<u32>;

fn lhs_of(word: LhsWord) -> vec4<f32> {
    let low = word << vec2<u32>(16u);
    let high = word & vec2<u32>(0xffff0000u);
    return bitcast<vec4<f32>>(vec4<u32>(low.x, high.x, low.y, high.y));
}
