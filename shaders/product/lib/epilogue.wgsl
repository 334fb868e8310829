// The activation that a store may apply. Each store defines `store_piece`, which stores element `at` of y in column
// `col`, both counted in pieces.
// ACTIVATION is 0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 silu. As it is a constant, the compiler keeps one branch.
const ACTIVATION: u32 = 0u;

fn activated(x: Stored) -> Stored {
    switch ACTIVATION {
        case 1u: { return narrow(relu(widen(x))); }
        case 2u: { return narrow(gelu(widen(x))); }
        case 3u: { return narrow(gelu_tanh(widen(x))); }
        case 4u: { return narrow(silu(widen(x))); }
        default: { return x; }
    }
}
