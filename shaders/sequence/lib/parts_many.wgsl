// parts slot of attention: PARTS threads, which are 64 / PARTS lanes apart, share rows (or keys) and add up their parts of the
// scores. All threads of the workgroup make the same walk, which the barriers require.

var<workgroup> partial: array<vec4<f32>, SLOTS * 64u>;

// At least two slots are used in turn. A slot is written again only after the barrier of another, when all threads have read it.
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
    return limit(last_row(block, 64u / PARTS * ROWS));
}

fn start_of(first: u32, block: u32) -> u32 { return first_query(block); }

// Number of keys of a part. Uniform over the workgroup.
fn span(last: u32, start: u32) -> u32 { return select(last, p.chunk, p.splits > 1u); }
