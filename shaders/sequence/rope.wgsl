// Rotary position embedding of x[batch, heads, tokens, head_dim]: pair i < head_dim / 2 of a head, (a, b), is rotated by the
// angle t = position / base^(2 i / head_dim):
//   a' = a cos t - b sin t,   b' = a sin t + b cos t.
// halves: the pair is (x[i], x[i + head_dim / 2]); neighbours: (x[2 i], x[2 i + 1]).
// The gradient is the inverse rotation, with `turn` = -1. Source: Su et al. 2021, "RoFormer".
//
// The table has one row per position: head_dim / 2 cosines, then as many sines. One thread computes one pair, or four if half a
// head is a multiple of four. x is read once and y written once. Positions beyond the table give zeros.

alias Elem = f32;

struct Params {
    groups_x: u32,
    pairs: u32,         // batch * heads * tokens * half
    half: u32,          // pairs per head, in Elem
    tokens: u32,
    inner: u32,         // rows from one token to the next: 1, or the heads if these come after tokens in memory
    batch_rows: u32,    // heads * tokens
    batch_step: u32,    // positions per batch entry: tokens, or 0 if all entries share them
    offset: u32,        // position of token 0 if positions are not given
    positions: u32,     // rows of the table
    turn: f32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<Elem>;
@group(0) @binding(1) var<storage, read> table: array<Elem>;
@group(0) @binding(2) var<storage, read_write> y: array<Elem>;

#import position = position_counted

@compute @workgroup_size(64)
fn halves(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.pairs { return; }
    let row = at / p.half;
    let i = at % p.half;
    let first = row * 2u * p.half + i;
    let a = x[first];
    let b = x[first + p.half];
    let place = position(row);
    if place >= p.positions {
        y[first] = Elem(0);
        y[first + p.half] = Elem(0);
        return;
    }
    let cosine = table[place * 2u * p.half + i];
    let sine = table[place * 2u * p.half + p.half + i] * p.turn;
    y[first] = a * cosine - b * sine;
    y[first + p.half] = a * sine + b * cosine;
}

@compute @workgroup_size(64)
fn neighbours(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.pairs { return; }
    let row = at / p.half;
    let i = at % p.half;
    let a = x[2u * at];
    let b = x[2u * at + 1u];
    let place = position(row);
    if place >= p.positions {
        y[2u * at] = Elem(0);
        y[2u * at + 1u] = Elem(0);
        return;
    }
    let cosine = table[place * 2u * p.half + i];
    let sine = table[place * 2u * p.half + p.half + i] * p.turn;
    y[2u * at] = a * cosine - b * sine;
    y[2u * at + 1u] = a * sine + b * cosine;
}
