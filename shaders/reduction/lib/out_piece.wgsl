// out slot of kernels over rows: results in f32.
alias Out = Piece;

fn to_out(x: Piece) -> Out { return x; }
