// in slot of reductions: an operand in 32 bits.
alias In = Elem;

fn in_of(x: In) -> Elem { return x; }
