// Four elements of a matmul's rhs as stored: f32.
alias RhsWord = vec4<f32>;

fn rhs_of(word: RhsWord) -> vec4<f32> { return word; }
