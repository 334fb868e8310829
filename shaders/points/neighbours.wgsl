// Finds the points within a radius of each query, by cells: with FILL false how many there are, with FILL true which
// points in which images. Points are listed by cell. A query looks at the cells that its sphere can touch, counted in
// whole cells along the three lattice vectors. Beyond a periodic side come the cells of the other side, one image
// further. This repeats as far as the reach says, as a radius may be longer than the period. A launch looks at some lines
// of cells, and in each cell at the members from `first` up to `last`. Results are ordered by cell, then as listed. The
// host sorts them.

const FILL: bool = false;

struct Params {
    groups_x: u32,
    n: u32,           // queries
    square: f32,      // radius squared
    line: u32,        // first line of cells of this launch; lines run along x and are counted layer after layer
    lines: u32,       // end of the lines of this launch
    first: u32,
    last: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> points: array<vec4<f32>>;     // wrapped into the periodic cell, relative to its lowest corner
@group(0) @binding(1) var<storage, read> places: array<vec4<u32>>;     // per point: its cell along three axes, its graph
@group(0) @binding(2) var<storage, read> members: array<u32>;          // points by cell
@group(0) @binding(3) var<storage, read> cells: array<u32>;            // where each cell's members begin
// Per graph: the cells along the axes and the first cell; then the reach in cells along the axes and bits of the periodic
// axes.
@group(0) @binding(4) var<storage, read> grids: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> lattice: array<vec4<f32>>;    // per graph: three vectors
@group(0) @binding(6) var<storage, read> queries: array<vec2<u32>>;    // the point, and where its results begin
@group(0) @binding(7) var<storage, read_write> found: array<u32>;      // counts; or the point and the image of each result

// Returns the cell at place c of n, and its image. An image of 1000 means that there is no cell.
fn wrapped(c: i32, n: i32, periodic: bool) -> vec2<i32> {
    let image = select(-((n - 1 - c) / n), c / n, c >= 0);
    if !periodic { return vec2<i32>(c, select(1000, 0, image == 0)); }
    return vec2<i32>(c - image * n, image);
}

@compute @workgroup_size(64)
fn search(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = (group.y * p.groups_x + group.x) * 64u + lane;
    if at >= p.n { return; }
    let query = queries[at];
    let own = query.x;
    let here = points[own].xyz;
    let place = places[own];
    let size = grids[2u * place.w];
    let reach = grids[2u * place.w + 1u];
    let n = vec3<i32>(size.xyz);
    var count = 0u;
    var next = query.y;
    let wide = 2u * reach.y + 1u;
    let lines = min(p.lines, (2u * reach.z + 1u) * wide);
    for (var line = p.line; line < lines; line++) {
        let cz = wrapped(i32(place.z) + i32(line / wide) - i32(reach.z), n.z, (reach.w & 4u) != 0u);
        let cy = wrapped(i32(place.y) + i32(line % wide) - i32(reach.y), n.y, (reach.w & 2u) != 0u);
        for (var x = -i32(reach.x); x <= i32(reach.x); x++) {
            let cx = wrapped(i32(place.x) + x, n.x, (reach.w & 1u) != 0u);
            if cx.y == 1000 || cy.y == 1000 || cz.y == 1000 { continue; }
            let image = vec3<i32>(cx.y, cy.y, cz.y);
            let l = 3u * place.w;
            let moved = f32(image.x) * lattice[l].xyz + f32(image.y) * lattice[l + 1u].xyz + f32(image.z) * lattice[l + 2u].xyz;
            let cell = size.w + (u32(cz.x) * size.y + u32(cy.x)) * size.x + u32(cx.x);
            let end = min(cells[cell] + p.last, cells[cell + 1u]);
            for (var m = cells[cell] + p.first; m < end; m++) {
                let other = members[m];
                let d = points[other].xyz + moved - here;
                let itself = other == own && all(image == vec3<i32>(0));
                if itself || dot(d, d) >= p.square { continue; }
                if FILL {
                    let i = vec3<u32>(image + 512);
                    found[2u * next] = other;
                    found[2u * next + 1u] = i.x | (i.y << 10u) | (i.z << 20u);
                    next++;
                }
                count++;
            }
        }
    }
    if !FILL { found[at] = count; }
}
