//! Neighbour lists: comparison with all pairs, periodic images, nearest neighbours, and clouds that are refused.

use super::*;

/// Finds sources and lengths of each point's neighbours, sorted, by a search over all pairs and images in f64.
fn all_pairs(of: &Clouds, images: i32) -> Vec<Vec<(u32, f64)>> {
    let point =
        |i: usize, k: usize| if k < of.dimension { of.positions[i * of.dimension + k] as f64 } else { 0.0 };
    let mut rows = Vec::new();
    let mut first = 0;
    for (g, &size) in of.sizes.iter().enumerate() {
        let cell = of.cells.get(g).copied().flatten();
        for own in first..first + size {
            let mut row = Vec::new();
            for other in first..first + size {
                let span = |axis: usize| match cell {
                    Some(cell) if cell.periodic[axis] => -images..=images,
                    _ => 0..=0,
                };
                for (a, b, c) in
                    span(0).flat_map(|a| span(1).flat_map(move |b| span(2).map(move |c| (a, b, c))))
                {
                    if own == other && (a, b, c) == (0, 0, 0) {
                        continue;
                    }
                    let shift = |k: usize| {
                        cell.map_or(0.0, |cell| {
                            [a, b, c].iter().zip(&cell.vectors).map(|(&n, v)| n as f64 * v[k]).sum()
                        })
                    };
                    let square =
                        (0..3).map(|k| (point(other, k) - point(own, k) + shift(k)).powi(2)).sum::<f64>();
                    row.push((other as u32, square.sqrt()));
                }
            }
            row.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
            rows.push(row);
        }
        first += size;
    }
    rows
}

/// Compares a graph's edges with `want`, the neighbours of each point with their lengths.
fn same_edges(what: &str, graph: &Graph, want: &[Vec<(u32, f64)>]) {
    let mut got: Vec<Vec<(u32, f64)>> = vec![Vec::new(); want.len()];
    for (s, t, d) in edges(graph) {
        got[t as usize].push((s, d.iter().map(|&x| (x as f64).powi(2)).sum::<f64>().sqrt()));
    }
    for (t, (got, want)) in got.iter_mut().zip(want).enumerate() {
        got.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        assert_eq!(got.len(), want.len(), "{what}: neighbours of {t}");
        for (a, b) in got.iter().zip(want) {
            assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-4, "{what}: node {t}: {a:?}, want {b:?}");
        }
    }
}

fn within(rows: &[Vec<(u32, f64)>], radius: f64) -> Vec<Vec<(u32, f64)>> {
    rows.iter().map(|row| row.iter().copied().filter(|e| e.1 < radius).collect()).collect()
}

/// Name, dimension, sizes, cells, radius, and the number of images in each direction that the reference searches.
type Case = (&'static str, usize, &'static [usize], Vec<Option<Cell>>, f32, i32);

#[test]
fn neighbours_are_those_of_all_pairs() {
    let skew = Cell { vectors: [[4.0, 0.0, 0.0], [1.5, 3.5, 0.0], [-1.0, 0.7, 5.0]], periodic: [true; 3] };
    let slab = Cell { vectors: [[3.0, 0.2, 0.0], [0.0; 3], [0.0, 0.5, 4.0]], periodic: [true, false, true] };
    let wire = Cell { vectors: [[0.0; 3], [0.3, 2.0, 0.1], [0.0; 3]], periodic: [false, true, false] };
    let cases: [Case; 7] = [
        ("free", 3, &[300], vec![], 1.3, 0),
        ("batch", 3, &[5, 0, 40, 1, 17], vec![], 2.0, 0),
        ("plane", 2, &[200], vec![], 0.9, 0),
        ("skew", 3, &[60], vec![Some(skew)], 1.7, 8),
        ("beyond the period", 3, &[7], vec![Some(skew)], 9.0, 10),
        ("slab and wire", 3, &[30, 20], vec![Some(slab), Some(wire)], 2.5, 9),
        ("one alone with itself", 3, &[1], vec![Some(Cell::cuboid([1.0, 2.0, 3.0]))], 2.1, 4),
    ];
    for (what, dimension, sizes, cells, radius, images) in cases {
        let nodes: usize = sizes.iter().sum();
        // Some points are far outside the cell. The search moves them inside, but edges are those of the given points.
        let positions = normal(nodes * dimension, 3, 2.5);
        let of = Clouds { positions: &positions, dimension, sizes, cells: &cells };
        let all = all_pairs(&of, images);
        let graph = Graph::radius(gpu(), &of, radius, false).unwrap();
        assert!(!graph.edges().is_empty(), "{what}: some edge");
        same_edges(what, &graph, &within(&all, radius as f64));
        let looped = Graph::radius(gpu(), &of, radius, true).unwrap();
        assert_eq!(looped.edges().len(), graph.edges().len() + nodes, "{what}: self-loops");
        for k in [1, 6] {
            let mut want = all.clone();
            for row in &mut want {
                row.sort_by(|a, b| a.1.total_cmp(&b.1));
                row.truncate(k);
                row.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
            }
            same_edges(
                &format!("{what}, {k} nearest"),
                &Graph::nearest(gpu(), &of, k, false).unwrap(),
                &want,
            );
        }
    }
}

#[test]
fn a_periodic_cell_is_its_images() {
    let cell = Cell::cuboid([3.0, 3.5, 4.0]);
    let positions = uniform(8 * 3, 5, 3.0);
    let of = Clouds { positions: &positions, dimension: 3, sizes: &[8], cells: &[Some(cell)] };
    let net = network(Grid::octahedron(), Some(2.9));
    let small = Graph::radius(gpu(), &of, 2.9, true).unwrap();
    let input = PonitaInput::scalars(&Tensor::ones(gpu(), [8, 1]));
    let one = net.energy_forces(&small, &input).unwrap();
    // Two cells along the first axis have twice the energy, and the same forces twice.
    let moved = positions.chunks(3).map(|p| [p[0] + 3.0, p[1], p[2]]).collect::<Vec<_>>().concat();
    let double = [positions.clone(), moved].concat();
    let wide = [Some(Cell::cuboid([6.0, 3.5, 4.0]))];
    let of = Clouds { positions: &double, dimension: 3, sizes: &[16], cells: &wide };
    let big = Graph::radius(gpu(), &of, 2.9, true).unwrap();
    assert_eq!(big.edges().len(), 2 * small.edges().len());
    let two = net.energy_forces(&big, &PonitaInput::scalars(&Tensor::ones(gpu(), [16, 1]))).unwrap();
    assert!((two.energies[0] - 2.0 * one.energies[0]).abs() < 1e-4 * one.energies[0].abs().max(1.0));
    let most = one.forces.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    for (i, f) in two.forces.iter().enumerate() {
        assert!((f - one.forces[i % 24]).abs() < 1e-4 * most, "force {i}");
    }
}

#[test]
fn the_nearest_of_clouds_that_have_little_in_common() {
    // A pair that is far apart, and one point in a small cell, which would have many images within the pair's distance.
    let positions = [0.0f32, 0.0, 0.0, 1000.0, 0.0, 0.0, 0.5, 0.5, 0.5];
    let cells = [None, Some(Cell::cuboid([2.0; 3]))];
    let of = Clouds { positions: &positions, dimension: 3, sizes: &[2, 1], cells: &cells };
    let graph = Graph::nearest(gpu(), &of, 1, false).unwrap();
    let all: Vec<(u32, u32)> = edges(&graph).into_iter().map(|e| (e.0, e.1)).collect();
    assert_eq!(all, [(1, 0), (0, 1), (2, 2)]);
    // A distance that overflows is an error instead of an endless search.
    let far = [0.0f32, 0.0, 0.0, 1e20, 0.0, 0.0];
    let of = Clouds { positions: &far, dimension: 3, sizes: &[2], cells: &[] };
    let message = Graph::nearest(gpu(), &of, 1, false).map(|_| ()).expect_err("too far").to_string();
    assert!(message.contains("too far"), "{message}");
    let plane = Clouds {
        positions: &[0.0, 0.0, 1.0, 1.0],
        dimension: 2,
        sizes: &[2],
        cells: &[Some(Cell::cuboid([5.0, 5.0, 1.0]))],
    };
    let message = Graph::radius(gpu(), &plane, 2.0, false).map(|_| ()).expect_err("out of plane").to_string();
    assert!(message.contains("out of it"), "{message}");
}

/// Positions, sizes, cells, radius, and a word of the message.
type Bad<'a> = (&'a [f32], &'a [usize], &'a [Option<Cell>], f32, &'static str);

#[test]
fn bad_clouds_are_refused() {
    let positions = [0.0f32, 0.0, 0.0, 1.0, 0.0, 0.0];
    let flat = Cell { vectors: [[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0]], periodic: [true; 3] };
    let try_with = |positions: &[f32], sizes: &[usize], cells: &[Option<Cell>], radius: f32| {
        let of = Clouds { positions, dimension: 3, sizes, cells };
        Graph::radius(gpu(), &of, radius, true).map(|g| g.edges().len()).map_err(|e| e.to_string())
    };
    let nan = [0.0, f32::NAN, 0.0, 1.0, 0.0, 0.0];
    let bad: [Bad; 8] = [
        (&nan, &[2], &[], 1.0, "node 0 is NaN"),
        (&positions, &[2], &[Some(flat)], 1.0, "no volume"),
        (&positions, &[2], &[Some(Cell { vectors: [[0.0; 3]; 3], periodic: [true; 3] })], 1.0, "no volume"),
        (&positions, &[2], &[Some(Cell::cuboid([f64::NAN, 1.0, 1.0]))], 1.0, "not finite"),
        (&positions, &[3], &[], 1.0, "do not add up"),
        (&positions, &[2], &[None, None], 1.0, "2 cells for 1 graphs"),
        (&positions, &[2], &[], f32::NAN, "must be above 0"),
        (&positions, &[2], &[Some(Cell::cuboid([1e-3; 3]))], 10.0, "images"),
    ];
    for (positions, sizes, cells, radius, word) in bad {
        let message = try_with(positions, sizes, cells, radius).expect_err(word);
        assert!(message.contains(word), "{message:?} does not say {word:?}");
    }
    assert_eq!(try_with(&positions, &[2], &[], 2.0), Ok(4));
    // 20000 points in one place have more edges than one binding can hold.
    let crowd = vec![0.0f32; 3 * 20_000];
    let message = try_with(&crowd, &[20_000], &[], 1.0).expect_err("too many");
    assert!(message.contains("bytes of the list"), "{message}");
    for (from, to, batch, word) in [
        (vec![0, 2], vec![1, 0], vec![], "node 2 of 2"),
        (vec![0], vec![1, 0], vec![], "1 sources and 2"),
        (vec![0], vec![1], vec![0, 1], "joins two graphs"),
        (vec![], vec![], vec![0], "1 entries of `batch`"),
    ] {
        let message = Graph::new(gpu(), &positions, 3, &from, &to, &batch).expect_err(word).to_string();
        assert!(message.contains(word), "{message:?} does not say {word:?}");
    }
}
