// Four elements of a matmul's lhs as stored: f16, for adapters that compute with it.
alias LhsWord = vec4<f16>;
