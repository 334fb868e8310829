//! Networks that read their kernels from tables: accuracy, forces as the gradient of the tabulated energy, and refusals.

use crate::support::folder::Folder;
use crate::support::gpu;
use tiebeam::geometry::xyz::Frame;
use tiebeam::geometry::{
    Atoms, Calculator, Cell, Clouds, Graph, Grid, Ponita, PonitaConfig, PonitaInput, Potential, Properties,
};
use tiebeam::nn::Parameters;
use tiebeam::{Rng, Tensor, no_grad};

const RADIUS: f32 = 4.0;

fn normal(n: usize, seed: u64, scale: f32) -> Vec<f32> {
    let mut x = vec![0.0; n];
    Rng::new(seed).fill_normal(&mut x);
    x.iter_mut().for_each(|x| *x *= scale);
    x
}

/// Creates a network with odd widths, whose kernels bend a few times within the radius.
fn network(grid: Grid, radius: f32) -> Ponita {
    let config = PonitaConfig::default()
        .channels(10)
        .hidden(13)
        .basis(17)
        .layers(2)
        .widening(2)
        .radius(Some(radius))
        .pool(false);
    let mut net = Ponita::new(gpu(), config, grid, &mut Rng::new(11)).unwrap();
    let (graph, input) = cloud(net.grid.dimension(), 40, 3);
    net.calibrate(&graph, &input).unwrap();
    net
}

fn cloud(dimension: usize, nodes: usize, seed: u64) -> (Graph, PonitaInput) {
    let positions = normal(dimension * nodes, seed, 1.8);
    let of = Clouds { positions: &positions, dimension, sizes: &[nodes], cells: &[] };
    let graph = Graph::radius(gpu(), &of, RADIUS, true).unwrap();
    (graph, PonitaInput::scalars(&Tensor::from_slice(gpu(), &normal(nodes, seed + 1, 1.0), [nodes, 1])))
}

fn grids() -> [Grid; 4] {
    [Grid::icosahedron(), Grid::circle(7), Grid::positions(3), Grid::positions(2)]
}

fn largest<'a>(x: impl IntoIterator<Item = &'a f32>) -> f32 {
    x.into_iter().fold(0.0, |m, x| m.max(x.abs()))
}

/// Returns the largest difference relative to the largest value.
fn apart(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let difference: Vec<f32> = got.iter().zip(want).map(|(a, b)| a - b).collect();
    largest(&difference) / largest(want)
}

/// Draws attributes of edges within the radius, two per row if there are orientations.
fn attributes(net: &Ponita, rows: usize, radius: f32) -> Vec<f32> {
    let width = 1 + net.grid.is_oriented() as usize;
    let turn = if net.grid.dimension() == 2 { std::f32::consts::TAU } else { std::f32::consts::PI };
    let mut seen = vec![0.0; rows * width];
    Rng::new(5).fill_uniform(&mut seen);
    for row in seen.chunks_mut(width) {
        let far = radius * row[0].sqrt();
        match row {
            [x, r] => (*x, *r) = (far * (turn * *r).cos(), far * (turn * *r).sin()),
            _ => row[0] = far,
        }
    }
    seen
}

#[test]
fn tables_are_the_kernels_to_fourth_order() {
    for (grid, radius) in grids().into_iter().flat_map(|grid| [(grid.clone(), 2.0), (grid, RADIUS)]) {
        let net = network(grid, radius);
        let seen = attributes(&net, 4000, radius);
        let want = net.kernel_at(1, &seen).unwrap();
        let errors = [9, 17, 33, 65, Ponita::TABLE_POINTS].map(|points| {
            let table = net.tabulate(points).unwrap();
            apart(&table.kernel_at(1, &seen).unwrap(), &want)
        });
        println!("{} in {}-D, radius {radius}: {errors:?}", net.grid.len(), net.grid.dimension());
        assert!(errors[4] <= 1e-5, "{errors:?}");
        // Checked if kernels bend little within the coarsest cells, and as long as rounding does not dominate.
        for pair in errors.windows(2).filter(|pair| radius < RADIUS && pair[1] > 2e-6) {
            let ratio = pair[0] / pair[1];
            assert!((8.0..32.0).contains(&ratio), "{errors:?}: {ratio} for half the spacing");
        }
    }
}

#[test]
fn outputs_and_forces_are_the_networks() {
    for grid in grids() {
        let net = network(grid, RADIUS);
        let fast = net.tabulate(Ponita::TABLE_POINTS).unwrap();
        let (graph, input) = cloud(net.grid.dimension(), 40, 7);
        let outputs = |net: &Ponita| net.forward(&graph, &input).scalars.to_vec::<f32>().unwrap();
        let error = apart(&outputs(&fast), &outputs(&net));
        let [found, want] = [&fast, &net].map(|net| net.energy_forces(&graph, &input).unwrap());
        let forces = apart(&found.forces, &want.forces);
        println!("{} in {}-D: outputs {error}, forces {forces}", net.grid.len(), net.grid.dimension());
        assert!(error < 2e-5 && forces < 1e-4, "{error} {forces}");
        assert_eq!(found, fast.energy_forces(&graph, &input).unwrap(), "the same bits twice");
        // Graphs without a node, without an edge, and with edges beyond the radius, also far beyond.
        let one = |n: usize| PonitaInput::scalars(&Tensor::ones(gpu(), [n, 1]));
        let dimension = net.grid.dimension();
        let empty = Graph::full(gpu(), &[], dimension, &[], true).unwrap();
        assert!(fast.energy_forces(&empty, &one(0)).unwrap().forces.is_empty());
        let mut positions = vec![0.0; 3 * dimension];
        (positions[dimension], positions[2 * dimension]) = (RADIUS, 1e18);
        let alone = Graph::new(gpu(), &positions, dimension, &[], &[], &[]).unwrap();
        let beyond = Graph::new(gpu(), &positions, dimension, &[0, 1, 2], &[1, 0, 0], &[]).unwrap();
        let [alone, beyond] = [alone, beyond].map(|graph| fast.energy_forces(&graph, &one(3)).unwrap());
        assert_eq!(alone.node_energies, beyond.node_energies);
        assert!(alone.node_energies[0].is_finite() && largest(&beyond.forces) == 0.0, "{beyond:?}");
    }
}

fn frame(seed: u64) -> Frame {
    let draws: Vec<f64> = normal(48, seed, 1.0).into_iter().map(f64::from).collect();
    let at = |i: usize| std::array::from_fn(|k| 2.4 * (((i >> k) & 1) as f64 + 0.12 * draws[6 * i + k]));
    Frame {
        energy: Some(draws[0] - 20.0),
        positions: (0..8).map(at).collect(),
        forces: Some((0..8).map(|i| std::array::from_fn(|k| draws[6 * i + 3 + k])).collect()),
        species: (0..8).map(|i| if i % 3 == 0 { 8 } else { 29 }).collect(),
        cell: Some(Cell {
            vectors: [[4.8, 0.0, 0.0], [0.3, 4.9, 0.0], [-0.2, 0.4, 5.0]],
            periodic: [true; 3],
        }),
        ..Frame::default()
    }
}

fn potential() -> Potential {
    let config = PonitaConfig::default().channels(8).hidden(8).basis(8).layers(2).radius(Some(RADIUS));
    let frames = [frame(1), frame(2)];
    let mut potential =
        Potential::new(gpu(), &frames, config, Grid::icosahedron(), &mut Rng::new(3)).unwrap();
    let batch = potential.batch(&frames.iter().collect::<Vec<_>>()).unwrap();
    potential.net.calibrate(&batch.graph, &batch.input).unwrap();
    potential
}

fn found(potential: &Potential, frame: &Frame) -> Properties {
    let calculator = Calculator::new(potential.clone());
    calculator.energy_forces(&frame.positions, &frame.species, frame.cell).unwrap()
}

#[test]
fn a_calculator_gives_energy_forces_and_stress() {
    let (full, frame) = (potential(), frame(4));
    let fast = full.tabulate(Ponita::TABLE_POINTS).unwrap();
    let (a, b) = (found(&fast, &frame), found(&full, &frame));
    let flat = |x: &Properties| {
        let f: Vec<f32> = x.forces.as_flattened().iter().map(|&f| f as f32).collect();
        let s: Vec<f32> = x.stress.expect("periodic").as_flattened().iter().map(|&s| s as f32).collect();
        [f, s]
    };
    let [[f, s], [g, t]] = [flat(&a), flat(&b)];
    let (forces, stress) = (apart(&f, &g), apart(&s, &t));
    println!("energy {} against {}, forces {forces}, stress {stress}", a.energy, b.energy);
    assert!((a.energy - b.energy).abs() < 1e-5 * b.energy.abs());
    assert!(forces < 1e-4 && stress < 1e-4, "{forces} {stress}");
    assert!(f != g, "by the same kernels?");
    assert_eq!(a, found(&fast, &frame));
}

/// With a table so coarse that its function differs from the network's, forces are the gradient of the table's function.
#[test]
fn forces_are_the_gradient_of_the_table() {
    let (coarse, frame) = (potential().tabulate(7).unwrap(), frame(4));
    let [own, network] = [found(&coarse, &frame), found(&potential(), &frame)];
    let largest = own.forces.as_flattened().iter().fold(0.0f64, |m, f| m.max(f.abs()));
    let change =
        own.forces.as_flattened().iter().zip(network.forces.as_flattened()).map(|(a, b)| (a - b).abs());
    let change = change.fold(0.0, f64::max) / largest;
    println!("forces change by {change}");
    let step = 4e-3;
    let mut worst = 0.0f64;
    for (i, k) in (0..frame.len()).flat_map(|i| (0..3).map(move |k| (i, k))) {
        let energy = |by: f64| {
            let mut moved = frame.clone();
            moved.positions[i][k] += by;
            found(&coarse, &moved).energy
        };
        let want = -(energy(step) - energy(-step)) / (2.0 * step);
        worst = worst.max((own.forces[i][k] - want).abs() / largest);
    }
    assert!(worst < 2e-3, "{worst} of the largest force");
    assert!(change > 2.0 * worst, "the table is too good to tell: {change}, {worst}");
}

#[test]
fn what_cannot_be_trained_says_so() {
    let (full, frames) = (potential(), [frame(1)]);
    let mut fast = full.tabulate(9).unwrap();
    assert!(Parameters::of(&fast.net).trainable().is_empty());
    let batch = fast.batch(&[&frames[0]]).unwrap();
    let refused = |message: String| assert!(message.contains("a copy by tables, for inference"), "{message}");
    refused(fast.loss(&batch, 1.0, 1e-3).err().unwrap().to_string());
    refused(fast.net.calibrate(&batch.graph, &batch.input).unwrap_err().to_string());
    refused(fast.tabulate(9).err().unwrap().to_string());
    let endless = PonitaConfig::default().channels(4).hidden(4).basis(4).layers(1);
    let endless = Ponita::new(gpu(), endless, Grid::cube(), &mut Rng::new(1)).unwrap();
    for (net, points, word) in [
        (&endless, 129, "no radius"),
        (&full.net, 4, "use 5 or more"),
        (&full.net, 1 << 30, "bytes of a table"),
    ] {
        let message = net.tabulate(points).err().unwrap().to_string();
        assert!(message.contains(word), "{message}");
    }
}

#[test]
#[should_panic(expected = "force_product: this network is a copy by tables")]
fn no_force_product() {
    let fast = potential().tabulate(9).unwrap();
    let batch = fast.batch(&[&frame(1)]).unwrap();
    let _ = fast.net.force_product(&batch.graph, &batch.input, &batch.forces, 1e-3);
}

#[test]
#[should_panic(expected = "tables give kernels and bases no gradient")]
fn no_gradient_of_a_basis() {
    let mut net = network(Grid::octahedron(), RADIUS).tabulate(9).unwrap();
    net.basis.w1 = net.basis.w1.requires_grad();
    let (graph, input) = cloud(3, 5, 1);
    let _ = net.forward(&graph, &input);
}

#[test]
fn a_file_holds_the_parameters() {
    let folder = Folder::new("tables");
    let path = folder.join("tables.safetensors");
    let (full, frame) = (potential(), frame(4));
    full.tabulate(9).unwrap().save(&path).unwrap();
    let again = Potential::load(gpu(), &path).unwrap();
    assert_eq!(found(&again, &frame), found(&full, &frame));
    let named = |potential: &Potential| Parameters::of(&potential.net).named().len();
    assert_eq!(named(&again), named(&full));
    // The network that was tabulated has not changed.
    let (graph, input) = full.graph(&[Atoms::of(&frame)]).unwrap();
    assert!(full.net.forward(&graph, &input).scalars.is_tracked());
    assert!(no_grad(|| full.net.forward(&graph, &input).scalars.item().unwrap()).is_finite());
}
