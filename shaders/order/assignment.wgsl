// Prices of linear assignment by auction with decreasing eps. Rows want the column of least value(i, j) = c[i, j] + price[j].
//   A free row i bids  price[j] + (second least - least) + eps  for its best column j.
//   Each column goes to the highest bid (to the lowest row at ties) and takes the bid as its price. Its former owner is free
//   again.
// All free rows bid at once (Jacobi). The prices are f32, the start of an exact solver in f64, and prove nothing. No derivative.
// columns, begin:  initial prices from the least entry of each column, with all rows free.
// bid:     one workgroup per row. claim: one thread per row. resolve: one thread per column. step: ends a phase when few rows are
//          free.
// small:   one workgroup per problem, with all rounds in a few launches. Columns bid for rows, so that lanes read adjacent
//          entries.
// Bids are compared as bits, since prices are not negative. Maxima and minima of integers do not depend on the order of threads.

const MOST: u32 = 256u;     // columns of a small problem

struct Params {
    groups_x: u32,
    n: u32,
    flip: u32,      // the sign bit if the largest sum is wanted, else 0
    leave: u32,     // rows that may stay free at the end of a phase
    rounds: u32,    // most rounds of all phases together
    problems: u32,  // number of small problems
    now: u32,       // rounds of a small problem in this launch
    begins: u32,    // 1 in the first launch
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> cost: array<u32>;
@group(0) @binding(1) var<storage, read_write> price: array<f32>;
// Per row: the column that it bids for, and its bid. Before the first round, per column: its least and greatest entry.
@group(0) @binding(2) var<storage, read_write> bids: array<vec2<u32>>;
// Per column: the highest bid, then (from n on) the lowest row that made it.
@group(0) @binding(3) var<storage, read_write> top: array<atomic<u32>>;
// Per column: its row, and the phase in which the row got it.
@group(0) @binding(4) var<storage, read_write> owner: array<vec2<u32>>;
// Per row: the phase in which it has a column.
@group(0) @binding(5) var<storage, read_write> held: array<u32>;
@group(0) @binding(6) var<storage, read_write> state: State;

struct State {
    done: u32,      // 1 when prices are found, 2 after too many rounds
    phase: u32,     // counted from 1
    rounds: u32,    // rounds so far
    free: atomic<u32>,
    eps: f32,
    range: f32,     // the greatest minus the least entry
}

const NOBODY: u32 = 0xffffffffu;
// Above every allowed value.
const FAR: f32 = 3.0e38;
const FIRST: f32 = 0.1;     // first and last eps, relative to the range
const LAST: f32 = 1.0e-6;
const FALL: f32 = 0.25;

/// An entry of the minimised cost. A forbidden one is FAR, so that no comparison sees infinities.
fn entry(at: u32) -> f32 {
    let bits = cost[at];
    if (bits & 0x7f800000u) == 0x7f800000u { return FAR; }
    return bitcast<f32>(bits ^ p.flip);
}

/// A new price, finite and above the old one even after rounding.
fn raised(old: f32, least: f32, second: f32, range: f32, eps: f32) -> u32 {
    let to = min(old + min(second - least, range) + eps, FAR);
    return max(bitcast<u32>(to), bitcast<u32>(old) + 1u);
}

@compute @workgroup_size(64)
fn columns(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let j = (group.y * p.groups_x + group.x) * 64u + lane;
    if j >= p.n { return; }
    var low = FAR;
    var high = -FAR;
    for (var i = 0u; i < p.n; i++) {
        let c = entry(i * p.n + j);
        low = min(low, c);
        high = max(high, select(c, -FAR, c == FAR));
    }
    bids[j] = vec2(bitcast<u32>(low), bitcast<u32>(high));
}

var<workgroup> lows: array<f32, 64>;
var<workgroup> tops: array<f32, 64>;
var<workgroup> highs: array<f32, 64>;

/// Combines the values of all lanes: the minimum of `low`, the maximum of `top_low` (the least entries of columns), and the maximum
/// of `high`. Every lane must call this.
fn extremes(lane: u32, low: f32, top_low: f32, high: f32) -> vec3<f32> {
    lows[lane] = low;
    tops[lane] = top_low;
    highs[lane] = high;
    workgroupBarrier();
    for (var step = 32u; step > 0u; step = step >> 1u) {
        if lane < step {
            lows[lane] = min(lows[lane], lows[lane + step]);
            tops[lane] = max(tops[lane], tops[lane + step]);
            highs[lane] = max(highs[lane], highs[lane + step]);
        }
        workgroupBarrier();
    }
    // Loops with barriers depend on these values. Only workgroupUniformLoad tells compilers that they are uniform.
    return vec3(workgroupUniformLoad(&lows[0]), workgroupUniformLoad(&tops[0]), workgroupUniformLoad(&highs[0]));
}

@compute @workgroup_size(64)
fn begin(@builtin(local_invocation_index) lane: u32) {
    var low = FAR;
    var top_low = -FAR;
    var high = -FAR;
    for (var j = lane; j < p.n; j += 64u) {
        let seen = bitcast<vec2<f32>>(bids[j]);
        low = min(low, seen.x);
        top_low = max(top_low, select(seen.x, -FAR, seen.x == FAR));
        high = max(high, seen.y);
    }
    let all = extremes(lane, low, top_low, high);
    for (var j = lane; j < p.n; j += 64u) {
        price[j] = max(all.y - bitcast<f32>(bids[j].x), 0.0);
        atomicStore(&top[j], 0u);
        atomicStore(&top[p.n + j], NOBODY);
        owner[j] = vec2(NOBODY, 0u);
        held[j] = 0u;
        bids[j] = vec2(NOBODY, 0u);
    }
    if lane == 0u {
        state.range = clamp(all.z - all.x, 0.0, FAR);
        state.eps = FIRST * state.range;
        state.phase = 1u;
        state.rounds = 0u;
        // If all entries are equal, any prices are right.
        state.done = select(0u, 1u, state.range <= 0.0);
        atomicStore(&state.free, p.n);
    }
}

var<workgroup> best: array<f32, 64>;
var<workgroup> next: array<f32, 64>;
var<workgroup> place: array<u32, 64>;
var<workgroup> bidding: u32;

@compute @workgroup_size(64)
fn bid(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y * p.groups_x + group.x;
    if row >= p.n { return; }
    if lane == 0u { bidding = select(0u, 1u, state.done == 0u && held[row] != state.phase); }
    if workgroupUniformLoad(&bidding) == 0u { return; }
    var least = FAR;
    var second = FAR;
    var at = NOBODY;
    // Each row starts at another column, so rows with many equal entries do not all bid for the same column.
    for (var k = lane; k < p.n; k += 64u) {
        let j = select(row + k, row + k - p.n, row + k >= p.n);
        let value = min(entry(row * p.n + j) + price[j], FAR);
        if value < least {
            second = least;
            least = value;
            at = k;
        } else {
            second = min(second, value);
        }
    }
    best[lane] = least;
    next[lane] = second;
    place[lane] = at;
    workgroupBarrier();
    for (var step = 32u; step > 0u; step = step >> 1u) {
        if lane < step {
            let other = lane + step;
            let better = best[other] < best[lane] || (best[other] == best[lane] && place[other] < place[lane]);
            next[lane] = min(max(best[lane], best[other]), min(next[lane], next[other]));
            if better {
                best[lane] = best[other];
                place[lane] = place[other];
            }
        }
        workgroupBarrier();
    }
    // A row whose entries are all forbidden does not bid.
    if lane != 0u || place[0] == NOBODY { return; }
    let k = place[0];
    let j = select(row + k, row + k - p.n, row + k >= p.n);
    let bits = raised(price[j], best[0], next[0], state.range, state.eps);
    bids[row] = vec2(j, bits);
    atomicMax(&top[j], bits);
}

@compute @workgroup_size(64)
fn claim(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = (group.y * p.groups_x + group.x) * 64u + lane;
    if row >= p.n { return; }
    let mine = bids[row];
    if mine.x == NOBODY { return; }
    bids[row] = vec2(NOBODY, 0u);
    if atomicLoad(&top[mine.x]) == mine.y { atomicMin(&top[p.n + mine.x], row); }
}

@compute @workgroup_size(64)
fn resolve(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let j = (group.y * p.groups_x + group.x) * 64u + lane;
    if j >= p.n { return; }
    let row = atomicLoad(&top[p.n + j]);
    if row == NOBODY { return; }
    let phase = state.phase;
    let before = owner[j];
    if before.y == phase { held[before.x] = 0u; } else { atomicSub(&state.free, 1u); }
    held[row] = phase;
    owner[j] = vec2(row, phase);
    price[j] = bitcast<f32>(atomicLoad(&top[j]));
    atomicStore(&top[j], 0u);
    atomicStore(&top[p.n + j], NOBODY);
}

@compute @workgroup_size(1)
fn step() {
    if state.done != 0u { return; }
    state.rounds++;
    if atomicLoad(&state.free) > p.leave {
        if state.rounds >= p.rounds { state.done = 2u; }
        return;
    }
    state.eps *= FALL;
    state.done = select(0u, 1u, state.eps < LAST * state.range);
    // A new phase number voids all assignments of the last phase.
    state.phase++;
    atomicStore(&state.free, p.n);
}

// In a small problem, the columns bid for the rows.
var<workgroup> row_price: array<f32, MOST>;
var<workgroup> row_owner: array<u32, MOST>;
var<workgroup> row_top: array<atomic<u32>, MOST>;
var<workgroup> row_claim: array<atomic<u32>, MOST>;
var<workgroup> has: array<u32, MOST>;
var<workgroup> wants: array<u32, MOST>;
var<workgroup> offer: array<u32, MOST>;
var<workgroup> count: atomic<u32>;
var<workgroup> waiting: u32;

/// Makes one round and returns how many columns are still free. Every lane must call this.
fn trade(base: u32, lane: u32, range: f32, eps: f32) -> u32 {
    for (var j = lane; j < p.n; j += 64u) {
        wants[j] = NOBODY;
        if has[j] != 0u { continue; }
        var least = FAR;
        var second = FAR;
        var at = 0u;
        for (var k = 0u; k < p.n; k++) {
            let i = select(j + k, j + k - p.n, j + k >= p.n);
            let value = min(entry(base + i * p.n + j) + row_price[i], FAR);
            if value < least {
                second = least;
                least = value;
                at = i;
            } else {
                second = min(second, value);
            }
        }
        if least == FAR { continue; }
        wants[j] = at;
        offer[j] = raised(row_price[at], least, second, range, eps);
        atomicMax(&row_top[at], offer[j]);
    }
    workgroupBarrier();
    for (var j = lane; j < p.n; j += 64u) {
        if wants[j] != NOBODY && atomicLoad(&row_top[wants[j]]) == offer[j] { atomicMin(&row_claim[wants[j]], j); }
    }
    workgroupBarrier();
    for (var i = lane; i < p.n; i += 64u) {
        let j = atomicLoad(&row_claim[i]);
        if j == NOBODY { continue; }
        if row_owner[i] != NOBODY { has[row_owner[i]] = 0u; } else { atomicSub(&count, 1u); }
        has[j] = 1u;
        row_owner[i] = j;
        row_price[i] = bitcast<f32>(atomicLoad(&row_top[i]));
        atomicStore(&row_top[i], 0u);
        atomicStore(&row_claim[i], NOBODY);
    }
    workgroupBarrier();
    if lane == 0u { waiting = atomicLoad(&count); }
    return workgroupUniformLoad(&waiting);
}

// Where `held` has the state of a small problem between launches: prices and owners of rows, whether each column has a row, the
// bits of eps and range, the rounds so far, and whether the next round begins a phase.
fn kept_at(problem: u32) -> u32 { return problem * (3u * p.n + 4u); }

var<workgroup> kept: vec4<u32>;

@compute @workgroup_size(64)
fn small(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let problem = group.y * p.groups_x + group.x;
    if problem >= p.problems { return; }
    let base = problem * p.n * p.n;
    let own = kept_at(problem);
    if p.begins != 0u {
        var low = FAR;
        var high = -FAR;
        for (var e = lane; e < p.n * p.n; e += 64u) {
            let c = entry(base + e);
            low = min(low, c);
            high = max(high, select(c, -FAR, c == FAR));
        }
        let all = extremes(lane, low, low, high);
        let range = clamp(all.z - all.x, 0.0, FAR);
        if lane == 0u { kept = vec4<u32>(bitcast<u32>(FIRST * range), bitcast<u32>(range), 0u, 1u); }
    } else if lane == 0u {
        let at = own + 3u * p.n;
        kept = vec4<u32>(held[at], held[at + 1u], held[at + 2u], held[at + 3u]);
    }
    let state_now = workgroupUniformLoad(&kept);
    let range = bitcast<f32>(state_now.y);
    var eps = bitcast<f32>(state_now.x);
    var rounds = state_now.z;
    var fresh = state_now.w != 0u;
    // The problem has ended, and the launch that ended it has written the prices.
    if p.begins == 0u && (rounds >= p.rounds || eps <= LAST * range) { return; }
    for (var i = lane; i < p.n; i += 64u) {
        row_price[i] = select(bitcast<f32>(held[own + i]), 0.0, p.begins != 0u);
        row_owner[i] = held[own + p.n + i];
        has[i] = held[own + 2u * p.n + i];
        atomicStore(&row_top[i], 0u);
        atomicStore(&row_claim[i], NOBODY);
    }
    workgroupBarrier();
    // Counts the columns without a row.
    if lane == 0u {
        var waiting_now = 0u;
        for (var j = 0u; j < p.n; j++) { waiting_now += select(1u, 0u, has[j] != 0u); }
        atomicStore(&count, waiting_now);
    }
    workgroupBarrier();
    for (var now = 0u; now < p.now && rounds < p.rounds && eps > LAST * range; now++) {
        if fresh {
            for (var i = lane; i < p.n; i += 64u) {
                row_owner[i] = NOBODY;
                has[i] = 0u;
            }
            if lane == 0u { atomicStore(&count, p.n); }
            workgroupBarrier();
        }
        rounds++;
        fresh = trade(base, lane, range, eps) <= p.leave;
        if fresh { eps *= FALL; }
    }
    workgroupBarrier();
    for (var i = lane; i < p.n; i += 64u) {
        held[own + i] = bitcast<u32>(row_price[i]);
        held[own + p.n + i] = row_owner[i];
        held[own + 2u * p.n + i] = has[i];
    }
    if lane == 0u {
        let at = own + 3u * p.n;
        held[at] = bitcast<u32>(eps);
        held[at + 1u] = bitcast<u32>(range);
        held[at + 2u] = rounds;
        held[at + 3u] = select(0u, 1u, fresh);
    }
    // The potential of a column is the negated least cost plus price. FAR, after too many rounds, means that there are none.
    for (var j = lane; j < p.n; j += 64u) {
        var least = FAR;
        for (var i = 0u; i < p.n; i++) { least = min(least, entry(base + i * p.n + j) + row_price[i]); }
        price[problem * p.n + j] = select(-least, FAR, rounds >= p.rounds);
    }
}
