// out slot of products: results as they are computed, in f32.
alias Out = Stored;

fn out_of(x: Out) -> Stored { return x; }

fn to_out(x: Stored) -> Out { return x; }
