// Four elements of a matmul's lhs as stored: f32.
alias LhsWord = vec4<f32>;

fn lhs_of(word: LhsWord) -> vec4<f32> { return word; }
