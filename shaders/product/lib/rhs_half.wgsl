// Four elements of a matmul's rhs as stored: f16, for adapters that compute with it.
alias RhsWord = vec4<f16>;
