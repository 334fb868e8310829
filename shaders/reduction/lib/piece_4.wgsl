// A load reads four elements, for rows whose width is a multiple of 4.
alias Piece = vec4<f32>;
const PIECE: u32 = 4u;

fn sum_of(piece: Piece) -> f32 { return (piece.x + piece.y) + (piece.z + piece.w); }

fn part(piece: Piece, i: u32) -> f32 { return piece[i]; }
