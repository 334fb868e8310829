//! Point clouds: invariance and equivariance, edge cases, files, bad input. Neighbour lists are in `geometry/neighbours.rs`.

mod neighbours;

use crate::support::folder::Folder;
use crate::support::gpu;
use tiebeam::geometry::{Cell, Clouds, Graph, Grid, Ponita, PonitaConfig, PonitaInput, Route};
use tiebeam::nn::Parameters;
use tiebeam::{DType, Precision, Rng, Tensor, autocast, no_grad};

fn normal(n: usize, seed: u64, scale: f32) -> Vec<f32> {
    let mut x = vec![0.0; n];
    Rng::new(seed).fill_normal(&mut x);
    x.iter_mut().for_each(|x| *x *= scale);
    x
}

fn uniform(n: usize, seed: u64, scale: f32) -> Vec<f32> {
    let mut x = vec![0.0; n];
    Rng::new(seed).fill_uniform(&mut x);
    x.iter_mut().for_each(|x| *x *= scale);
    x
}

/// Returns source, destination and difference of every edge, in order.
fn edges(graph: &Graph) -> Vec<(u32, u32, Vec<f32>)> {
    let d = graph.vectors().to_vec::<f32>().unwrap();
    let ends = graph.edges().sources().iter().zip(graph.edges().destinations());
    ends.zip(d.chunks(graph.dimension())).map(|((&s, &t), d)| (s, t, d.to_vec())).collect()
}

fn network(grid: Grid, radius: Option<f32>) -> Ponita {
    let config = PonitaConfig::default()
        .in_vectors(if grid.is_oriented() { 1 } else { 0 })
        .out_vectors(if grid.is_oriented() { 1 } else { 0 })
        .channels(10)
        .hidden(9)
        .basis(7)
        .layers(2)
        .widening(2)
        .radius(radius)
        .pool(false);
    // Tests with a radius use no vectors.
    let config = if radius.is_some() { config.in_vectors(0).out_vectors(0) } else { config };
    Ponita::new(gpu(), config, grid, &mut Rng::new(11)).unwrap()
}

fn inputs(nodes: usize, seed: u64) -> PonitaInput {
    PonitaInput {
        scalars: Some(Tensor::from_slice(gpu(), &normal(nodes, seed, 1.0), [nodes, 1])),
        vectors: Some(Tensor::from_slice(gpu(), &normal(nodes * 3, seed + 1, 1.0), [nodes, 1, 3])),
    }
}

fn forward(net: &Ponita, graph: &Graph, input: &PonitaInput) -> [Vec<f32>; 2] {
    let y = no_grad(|| net.forward(graph, input));
    [y.scalars.to_vec().unwrap(), y.vectors.to_vec().unwrap()]
}

fn near(what: &str, got: &[f32], want: &[f32], relative: f32) {
    let most = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        assert!((a - b).abs() <= relative * most, "{what}: element {i}: {a}, want {b}, largest {most}");
    }
}

/// Compares values and all gradients of both routes.
fn by_both_routes(mut net: Ponita, graph: &Graph, input: &PonitaInput) {
    let named = Parameters::of(&net).named().to_vec();
    let mut made: Vec<Vec<Vec<f32>>> = Vec::new();
    for route in [Route::Plain, Route::Fused] {
        net.route = route;
        let graph = graph.track();
        let y = net.forward(&graph, input);
        let loss = y.scalars.square().sum_all().add(&y.vectors.square().sum_all());
        let grads = loss.backward().unwrap();
        let mut all = vec![y.scalars.to_vec::<f32>().unwrap(), y.vectors.to_vec().unwrap()];
        all.push(grads.get(graph.positions()).unwrap().to_vec().unwrap());
        all.extend(named.iter().map(|(_, leaf)| grads.get(leaf).unwrap().to_vec::<f32>().unwrap()));
        made.push(all);
    }
    let names = ["scalars", "vectors", "positions"].map(String::from).into_iter();
    let names: Vec<String> = names.chain(named.into_iter().map(|(name, _)| name)).collect();
    for ((plain, fused), name) in made[0].iter().zip(&made[1]).zip(names) {
        near(&format!("{} orientations, {name}", net.grid.len()), fused, plain, 3e-4);
    }
}

/// Fused kernels equal plain ops, with odd widths and more edges than one chunk of every op.
#[test]
fn fused_is_plain() {
    let grids = [
        (Grid::fibonacci(20), 32),
        // The last chunk of rows has fewer parts than the others.
        (Grid::icosahedron(), 29),
        (Grid::octahedron(), 3),
        (Grid::positions(3), 20),
    ];
    for (grid, nodes) in grids {
        let net = network(grid, None);
        let positions = normal(3 * (nodes + 2), 4, 1.0);
        let graph = Graph::full(gpu(), &positions, 3, &[nodes, 2], true).unwrap();
        let mut input = inputs(nodes + 2, 7);
        if !net.grid.is_oriented() {
            input.vectors = None;
        }
        by_both_routes(net, &graph, &input);
    }
}

/// Products are in 16 bits, the kernels on point clouds in f32.
#[test]
fn a_network_trains_in_half_precision() {
    for route in [Route::Fused, Route::Plain] {
        let mut net = network(Grid::dodecahedron(), None);
        net.route = route;
        let graph = Graph::full(gpu(), &normal(9 * 3, 4, 1.0), 3, &[9], true).unwrap();
        let run = |precision: Precision| {
            let y = autocast(precision, || net.forward(&graph, &inputs(9, 3)).scalars);
            let grads = y.square().sum_all().backward().unwrap();
            let mut all: Vec<f32> = y.cast(DType::F32).to_vec().unwrap();
            for (name, leaf) in Parameters::of(&net).named() {
                let Some(dx) = grads.get(leaf) else { continue };
                let dx = dx.to_vec::<f32>().unwrap();
                assert!(dx.iter().all(|g| g.is_finite()), "{precision} {name}");
                all.extend(dx);
            }
            all
        };
        let want = run(Precision::F32);
        for (precision, bound) in [(Precision::F16, 0.02), (Precision::Bf16, 0.1)] {
            let got = run(precision);
            let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
            let apart =
                norm(&mut got.iter().zip(&want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied());
            assert!(got.len() == want.len() && apart > 0.0 && apart < bound, "{precision}: {apart}");
        }
    }
}

/// An edge and its reverse share one row of kernels, also for periodic images and for atoms that see their own images. Edges
/// without a reverse have their own row.
#[test]
fn reverses_share_kernels() {
    let nodes = 6;
    let positions = uniform(3 * nodes, 21, 3.0);
    let cell = Cell { vectors: [[3.0, 0.0, 0.0], [0.7, 3.2, 0.0], [-0.4, 0.5, 2.9]], periodic: [true; 3] };
    let cells = [Some(cell)];
    let of = Clouds { positions: &positions, dimension: 3, sizes: &[6], cells: &cells };
    let periodic = Graph::radius(gpu(), &of, 3.6, true).unwrap();
    let nearest = Graph::nearest(gpu(), &Clouds { cells: &[], ..of }, 2, false).unwrap();
    let loops = |graph: &Graph| edges(graph).iter().filter(|(_, _, d)| d.iter().all(|x| *x == 0.0)).count();
    assert_eq!(loops(&periodic), nodes);
    let pairs = (periodic.edges().len() - nodes) / 2;
    assert!(pairs > 100, "images of images");
    assert_eq!(periodic.bonds(&Grid::octahedron()).len(), nodes + pairs);
    for grid in [Grid::fibonacci(12), Grid::tetrahedron(), Grid::positions(3)] {
        assert_eq!(periodic.bonds(&grid).len(), periodic.edges().len(), "no opposites");
    }
    let mutual = nearest.bonds(&Grid::octahedron()).len();
    assert!(nodes < mutual && mutual < 2 * nodes, "{mutual} of {}", nearest.edges().len());
    for graph in [periodic, nearest] {
        let input = PonitaInput { vectors: None, ..inputs(nodes, 7) };
        by_both_routes(network(Grid::octahedron(), Some(3.6)), &graph, &input);
    }
    let flat = Graph::full(gpu(), &normal(2 * nodes, 22, 1.0), 2, &[nodes], false).unwrap();
    assert_eq!(flat.bonds(&Grid::circle(6)).len(), flat.edges().len() / 2);
    let input = PonitaInput { vectors: None, ..inputs(nodes, 7) };
    by_both_routes(network(Grid::circle(6), Some(9.0)), &flat, &input);
}

#[test]
fn the_same_bits_twice_and_in_any_order() {
    for grid in [Grid::fibonacci(20), Grid::icosahedron()] {
        same_bits(network(grid, None));
    }
}

fn same_bits(net: Ponita) {
    let nodes = 40;
    let positions = normal(3 * nodes, 8, 1.0);
    let graph = Graph::full(gpu(), &positions, 3, &[nodes], true).unwrap();
    let input = inputs(nodes, 9);
    let run = |graph: &Graph| {
        let graph = graph.track();
        let y = net.forward(&graph, &input);
        let grads = y.scalars.square().sum_all().backward().unwrap();
        let mut all = y.scalars.to_vec::<f32>().unwrap();
        all.extend(grads.get(graph.positions()).unwrap().to_vec::<f32>().unwrap());
        for (_, leaf) in Parameters::of(&net).named() {
            if let Some(d) = grads.get(leaf) {
                all.extend(d.to_vec::<f32>().unwrap());
            }
        }
        all.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    let first = run(&graph);
    assert_eq!(first, run(&graph), "a second run");
    // Edges are sorted, so the order in which they are given changes no bit.
    let mut order: Vec<usize> = (0..graph.edges().len()).collect();
    Rng::new(4).shuffle(&mut order);
    let take = |ids: &[u32]| order.iter().map(|&i| ids[i]).collect::<Vec<u32>>();
    let (from, to) = (take(graph.edges().sources()), take(graph.edges().destinations()));
    let shuffled = Graph::new(gpu(), &positions, 3, &from, &to, &[]).unwrap();
    assert_eq!(first, run(&shuffled), "shuffled edges");
    // The same nodes in another order change only the order of sums.
    let mut names: Vec<u32> = (0..nodes as u32).collect();
    Rng::new(5).shuffle(&mut names);
    let place = |x: &[f32], width: usize| {
        let mut y = vec![0.0; x.len()];
        for (i, &n) in names.iter().enumerate() {
            y[n as usize * width..][..width].copy_from_slice(&x[i * width..][..width]);
        }
        y
    };
    let renamed = Graph::full(gpu(), &place(&positions, 3), 3, &[nodes], true).unwrap();
    let moved = |x: &Option<Tensor>, width: usize| {
        x.as_ref().map(|x| Tensor::from_slice(gpu(), &place(&x.to_vec::<f32>().unwrap(), width), x.shape()))
    };
    let other = PonitaInput { scalars: moved(&input.scalars, 1), vectors: moved(&input.vectors, 3) };
    let ([s, v], [s2, v2]) = (forward(&net, &graph, &input), forward(&net, &renamed, &other));
    near("renamed scalars", &s2, &place(&s, 1), 1e-5);
    near("renamed vectors", &v2, &place(&v, 3), 1e-5);
}

/// Rotates rows of three numbers.
fn turned(x: &[f32], r: &[[f64; 3]; 3]) -> Vec<f32> {
    x.chunks(3).flat_map(|x| r.map(|row| (0..3).map(|k| row[k] * x[k] as f64).sum::<f64>() as f32)).collect()
}

fn rotation(seed: u64) -> [[f64; 3]; 3] {
    let q = normal(4, seed, 1.0).into_iter().map(f64::from).collect::<Vec<_>>();
    let n = q.iter().map(|x| x * x).sum::<f64>().sqrt();
    let [w, x, y, z] = [0, 1, 2, 3].map(|i| q[i] / n);
    [
        [1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y - w * z), 2.0 * (x * z + w * y)],
        [2.0 * (x * y + w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z - w * x)],
        [2.0 * (x * z - w * y), 2.0 * (y * z + w * x), 1.0 - 2.0 * (x * x + y * y)],
    ]
}

/// Returns the root mean square change of scalars under rotations, relative to their deviation.
fn change(grid: Grid) -> f64 {
    let nodes = 7;
    let mut net = network(grid, None);
    let (positions, input) = (normal(3 * nodes, 21, 1.0), inputs(nodes, 22));
    let graph = Graph::full(gpu(), &positions, 3, &[nodes], true).unwrap();
    net.calibrate(&graph, &input).unwrap();
    let [before, _] = forward(&net, &graph, &input);
    let mean = before.iter().sum::<f32>() / nodes as f32;
    let deviation = before.iter().map(|x| ((x - mean) as f64).powi(2)).sum::<f64>();
    let vectors = input.vectors.as_ref().unwrap().to_vec::<f32>().unwrap();
    let mut total = 0.0;
    for seed in 0..6 {
        let r = rotation(100 + seed);
        let graph = Graph::full(gpu(), &turned(&positions, &r), 3, &[nodes], true).unwrap();
        let vectors = Tensor::from_slice(gpu(), &turned(&vectors, &r), [nodes, 1, 3]);
        let [after, _] = forward(&net, &graph, &PonitaInput { vectors: Some(vectors), ..input.clone() });
        total += after.iter().zip(&before).map(|(a, b)| ((a - b) as f64).powi(2)).sum::<f64>() / 6.0;
    }
    (total / deviation).sqrt()
}

#[test]
fn more_orientations_turn_better() {
    let errors = [6, 12, 32, 64].map(|n| change(Grid::fibonacci(n)));
    assert!(errors.windows(2).all(|pair| pair[1] < pair[0]), "{errors:?}");
    assert!(errors[3] < 0.2 * errors[0], "{errors:?}");
    // Opposite pairs of orientations need half as many kernels, and for the same number of kernels the error is smaller.
    let pairs = [32, 64].map(|n| change(Grid::antipodal(n)));
    assert!(pairs[0] < change(Grid::fibonacci(16)) && pairs[1] < errors[2], "{pairs:?} against {errors:?}");
    // A network on distances alone is exactly invariant.
    let alone = {
        let net = network(Grid::positions(3), None);
        let positions = normal(21, 21, 1.0);
        let input = PonitaInput { vectors: None, ..inputs(7, 22) };
        let graph = |positions: &[f32]| Graph::full(gpu(), positions, 3, &[7], true).unwrap();
        let [a, _] = forward(&net, &graph(&positions), &input);
        let [b, _] = forward(&net, &graph(&turned(&positions, &rotation(3))), &input);
        (a, b)
    };
    near("distances alone", &alone.1, &alone.0, 1e-5);
}

#[test]
fn icosahedral_rotations_and_translations_change_nothing() {
    let nodes = 9;
    let net = network(Grid::icosahedron(), None);
    // Multiples of 2^-8, so positions far away lose no digits.
    let positions: Vec<f32> =
        normal(3 * nodes, 31, 1.0).iter().map(|x| (x * 256.0).round() / 256.0).collect();
    let input = inputs(nodes, 32);
    let graph = |positions: &[f32]| Graph::full(gpu(), positions, 3, &[nodes], true).unwrap();
    let [scalars, vectors] = forward(&net, &graph(&positions), &input);
    let far: Vec<f32> =
        positions.iter().enumerate().map(|(i, x)| x + [1000.0, -1000.0, 500.0][i % 3]).collect();
    let [s, v] = forward(&net, &graph(&far), &input);
    assert!(s == scalars && v == vectors, "a translation by 1000 is exact");
    let old = input.vectors.as_ref().unwrap().to_vec::<f32>().unwrap();
    let mut tried = 0;
    for r in group(net.grid.vectors()) {
        let vectors_in = Tensor::from_slice(gpu(), &turned(&old, &r), [nodes, 1, 3]);
        let turned_in = PonitaInput { vectors: Some(vectors_in), ..input.clone() };
        let [s, v] = forward(&net, &graph(&turned(&positions, &r)), &turned_in);
        near("turned scalars", &s, &scalars, 1e-5);
        near("turned vectors", &v, &turned(&vectors, &r), 1e-5);
        tried += 1;
    }
    assert_eq!(tried, 60);
}

/// Returns the rotations that permute the vertices of an icosahedron: those that map one edge to another.
fn group(vertices: &[[f64; 3]]) -> Vec<[[f64; 3]; 3]> {
    let dot = |a: &[f64; 3], b: &[f64; 3]| (0..3).map(|i| a[i] * b[i]).sum::<f64>();
    let cross = |a: &[f64; 3], b: &[f64; 3]| -> [f64; 3] {
        std::array::from_fn(|i| a[(i + 1) % 3] * b[(i + 2) % 3] - a[(i + 2) % 3] * b[(i + 1) % 3])
    };
    let frame = |a: &[f64; 3], b: &[f64; 3]| {
        let z = cross(a, b);
        let n = dot(&z, &z).sqrt();
        let z = z.map(|x| x / n);
        [*a, cross(&z, a), z]
    };
    let near = |a: &[f64; 3], b: &[f64; 3]| (dot(a, b) - 1.0 / 5f64.sqrt()).abs() < 1e-9;
    let b0 = vertices.iter().find(|b| near(&vertices[0], b)).unwrap();
    let from = frame(&vertices[0], b0);
    let mut all = Vec::new();
    for a in vertices {
        for b in vertices.iter().filter(|b| near(a, b)) {
            let to = frame(a, b);
            all.push(std::array::from_fn(|i| {
                std::array::from_fn(|j| (0..3).map(|k| to[k][i] * from[k][j]).sum())
            }));
        }
    }
    all
}

#[test]
fn small_and_large_neighbourhoods() {
    for route in [Route::Plain, Route::Fused] {
        let mut net = network(Grid::octahedron(), Some(3.0));
        net.route = route;
        let one = |n: usize| PonitaInput::scalars(&Tensor::ones(gpu(), [n, 1]));
        // No node; one node; two nodes in one place; a node without neighbours, not even itself.
        let empty = Graph::full(gpu(), &[], 3, &[], true).unwrap();
        assert_eq!(forward(&net, &empty, &one(0))[0].len(), 0);
        assert!(net.energy_forces(&empty, &one(0)).unwrap().forces.is_empty());
        let single = Graph::full(gpu(), &[0.3, 0.1, -2.0], 3, &[1], true).unwrap();
        let made = net.energy_forces(&single, &one(1)).unwrap();
        assert!(made.energies[0].is_finite() && made.forces == [0.0; 3], "{made:?}");
        let twice = Graph::full(gpu(), &[1.0, 2.0, 3.0, 1.0, 2.0, 3.0], 3, &[2], true).unwrap();
        let made = net.energy_forces(&twice, &one(2)).unwrap();
        assert!(made.forces.iter().all(|f| f.is_finite()) && made.node_energies[0] == made.node_energies[1]);
        let alone = Graph::new(gpu(), &[0.0; 9], 3, &[0], &[1], &[]).unwrap();
        let made = net.energy_forces(&alone, &one(3)).unwrap();
        assert!(made.node_energies.iter().all(|e| e.is_finite()));
        assert_eq!(made.node_energies[0], made.node_energies[2], "both see nobody");
        // A star: one node with 300 neighbours, and the others with one each.
        let positions = uniform(3 * 301, 6, 2.0);
        let spokes: Vec<u32> = (1..=300).collect();
        let hub = vec![0u32; 300];
        let star = Graph::new(
            gpu(),
            &positions,
            3,
            &[spokes.clone(), hub.clone()].concat(),
            &[hub, spokes].concat(),
            &[],
        )
        .unwrap();
        let made = net.energy_forces(&star, &one(301)).unwrap();
        assert!(made.energies[0].is_finite() && made.forces.iter().any(|&f| f != 0.0));
        // The energy does not change when all nodes are moved together, so the forces sum to 0.
        for axis in 0..3 {
            let sum: f64 = made.forces.iter().skip(axis).step_by(3).map(|&f| f as f64).sum();
            let most = made.forces.iter().fold(0.0f32, |m, f| m.max(f.abs())) as f64;
            assert!(sum.abs() < 1e-3 * most, "net force {sum}, largest {most}");
        }
    }
}

/// Forces are the negative gradient of the energy, also near the cutoff of the envelope and in a periodic cell.
#[test]
fn forces_are_slopes() {
    let cell = [Some(Cell::cuboid([4.0, 4.0, 4.0]))];
    let positions = uniform(8 * 3, 41, 4.0);
    let mut net = network(Grid::octahedron(), Some(2.0));
    let input = PonitaInput::scalars(&Tensor::ones(gpu(), [8, 1]));
    let graph = |positions: &[f32]| {
        let of = Clouds { positions, dimension: 3, sizes: &[8], cells: &cell };
        Graph::radius(gpu(), &of, 2.0, true).unwrap()
    };
    net.calibrate(&graph(&positions), &input).unwrap();
    let made = net.energy_forces(&graph(&positions), &input).unwrap();
    let most = made.forces.iter().fold(0.0f32, |m, f| m.max(f.abs()));
    let step = 4e-3;
    for i in 0..6 {
        let energy = |by: f32| {
            let mut moved = positions.clone();
            moved[i] += by;
            net.energy_forces(&graph(&moved), &input).unwrap().energies[0]
        };
        let slope = (energy(-step) - energy(step)) / (2.0 * step as f64);
        assert!(
            (slope - made.forces[i] as f64).abs() < 5e-3 * most as f64,
            "{i}: {slope}, {}",
            made.forces[i]
        );
    }
}

#[test]
fn files_hold_all_or_are_refused() {
    let folder = Folder::new("geometry");
    let path = folder.join("net.safetensors");
    let net = network(Grid::dodecahedron(), None);
    net.save(&path).unwrap();
    let again = Ponita::load(gpu(), &path).unwrap();
    assert_eq!(again.config, net.config);
    let graph = Graph::full(gpu(), &normal(15, 1, 1.0), 3, &[5], true).unwrap();
    assert_eq!(forward(&again, &graph, &inputs(5, 2)), forward(&net, &graph, &inputs(5, 2)));
    let bytes = std::fs::read(&path).unwrap();
    for cut in [0, 7, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..cut]).unwrap();
        assert!(Ponita::load(gpu(), &path).is_err(), "cut to {cut} bytes");
    }
    // The names of ponita-torch.
    let torch = |name: &str| {
        name.replace("fiber_basis.", "fiber_basis_fn.")
            .replace("basis.w1", "basis_fn.1.weight")
            .replace("basis.b1", "basis_fn.1.bias")
            .replace("basis.w2", "basis_fn.3.weight")
            .replace("basis.b2", "basis_fn.3.bias")
            .replace("fn.w1", "fn.1.weight")
            .replace("fn.b1", "fn.1.bias")
            .replace("fn.w2", "fn.3.weight")
            .replace("fn.b2", "fn.3.bias")
            .replace("embed.", "x_embedder.")
            .replace("layer", "interaction_layers.")
            .replace("kernel", "kernel.weight")
            .replace("linear", "linear_")
            .replace("readout", "read_out_layers.")
    };
    let all = Parameters::of(&net);
    let theirs: Vec<(String, &Tensor)> = all.named().iter().map(|(n, t)| (torch(n), t)).collect();
    assert!(theirs.iter().any(|(n, _)| n == "interaction_layers.1.conv.fiber_kernel.weight"), "{theirs:?}");
    tiebeam::store::save_tensors(&path, theirs.iter().map(|(n, t)| (n, *t)), &Default::default()).unwrap();
    let imported = Ponita::from_torch(gpu(), &path, Grid::dodecahedron(), 1, 1, None, false).unwrap();
    assert_eq!(imported.config, net.config);
    assert_eq!(forward(&imported, &graph, &inputs(5, 2)), forward(&net, &graph, &inputs(5, 2)));
    assert!(Ponita::from_torch(gpu(), &path, Grid::dodecahedron(), 9, 1, None, false).is_err());
    assert!(Ponita::from_torch(gpu(), &path, Grid::circle(4), 1, 1, None, false).is_err());
    assert!(Ponita::load(gpu(), &path).is_err(), "no config");
    let bad = PonitaConfig::default().channels(0);
    assert!(Ponita::new(gpu(), bad, Grid::cube(), &mut Rng::new(1)).is_err());
    assert!(PonitaConfig::from_json("{\"channels\": \"many\"}").is_err());
}
