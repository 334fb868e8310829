// parts slot of attention: a thread has whole heads, and stops at the last limit of its own rows.

fn join(s: vec4<f32>, lane: u32, slot: u32) -> vec4<f32> { return s; }

// The end of the walk over keys: the last limit of the thread's rows. A thread without rows does nothing.
fn reach(last: u32, first: u32, block: u32) -> u32 { return select(0u, last, first < p.rows); }

// The first query that sees one of the thread's keys. The limits hide the later keys from the first queries.
fn start_of(first: u32, block: u32) -> u32 {
    return select(p.tokens_q, first_query(first), first < p.tokens_k);
}

// Number of keys of the thread's part.
fn span(last: u32, start: u32) -> u32 { return min(max(last, start) - start, p.chunk); }
