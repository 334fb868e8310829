// A load reads four elements, for rows whose width is a multiple of 4.
alias Piece = vec4<f32>;
const PIECE: u32 = 4u;

fn sum_of(piece: Piece) -> f32 { return (piece.x + piece.y) + (piece.z + piece.w); }

// Subtracts 1 from the element `wanted` of a row, if it is among those from `first` on.
fn with_target(piece: Piece, first: u32, wanted: u32) -> Piece {
    return select(piece, piece - 1.0, vec4<u32>(first, first + 1u, first + 2u, first + 3u) == vec4<u32>(wanted));
}

fn part(piece: Piece, i: u32) -> f32 { return piece[i]; }
