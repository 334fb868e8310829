// in slot of kernels over rows: an operand in f32.
alias In = Piece;

fn in_of(x: In) -> Piece { return x; }
