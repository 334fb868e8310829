// parts slot of attention: PARTS threads share rows (or keys), 64 / PARTS lanes apart, and add up what each has of the
// scores. All threads of the workgroup walk the same way, which the barriers need.

var<workgroup> partial: array<vec4<f32>, SLOTS * 64u>;

// Slots in turn, at least two: one is written again only behind another's barrier, when all have read it.
fn join(s: vec4<f32>, lane: u32, slot: u32) -> vec4<f32> {
    partial[slot * 64u + lane] = s;
    workgroupBarrier();
    var sum = vec4<f32>(0.0);
    for (var at = lane % (64u / PARTS); at < 64u; at += 64u / PARTS) {
        sum += partial[slot * 64u + at];
    }
    return sum;
}

// The end of the walk over keys: the limit of the last query among the workgroup's rows.
fn reach(last: u32, first: u32, block: u32) -> u32 {
    if p.splits > 1u { return p.tokens_k; }
    let end = min(block + 64u / PARTS * ROWS, p.rows) - 1u;
    // Rows of two heads: one of them is a head's last query.
    return limit(select(p.tokens_q - 1u, end, block / p.tokens_q == end / p.tokens_q));
}

fn start_of(first: u32, block: u32) -> u32 { return first_query(block); }

// Keys of a part: the same for the whole workgroup.
fn span(last: u32, start: u32) -> u32 { return select(last, p.chunk, p.splits > 1u); }
