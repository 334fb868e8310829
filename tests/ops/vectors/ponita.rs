//! The `ponita` family: grids, separable convolutions, networks with forces, and charged particles. Formulas and gates:
//! `tests/vectors/ponita/README.md`.

use super::tying::{open, values};
use crate::support::folder::Folder;
use crate::support::{download, gpu, within};
use std::collections::BTreeMap;
use std::path::Path;
use tiebeam::geometry::nbody::Nbody;
use tiebeam::geometry::{
    Basis, Conv, Field, FieldConfig, Graph, Grid, Ponita, PonitaConfig, PonitaInput, Route, invariants,
};
use tiebeam::nn::Parameters;
use tiebeam::store::File;
use tiebeam::{Grads, Tensor};

pub const FILES: &[(&str, super::Check)] = &[
    ("grids", grids),
    ("conv_r3s2", conv),
    ("conv_r2s1", conv),
    ("net_nodes", net),
    ("net_graphs", net),
    ("nbody", nbody),
];

const ROUTES: [Route; 2] = [Route::Plain, Route::Fused];

/// Checks `max |a - b| <= relative max |b|`.
fn close(what: &str, got: &[f64], want: &[f64], relative: f64) {
    let most = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    within(what, got, want, |_| relative * most + 1e-30);
}

fn same(what: &str, got: &Tensor, file: &File, name: &str, relative: f64) {
    close(&format!("{what} {name}"), &download(got), &values(file, name), relative);
}

fn config(file: &File) -> serde_json::Value {
    serde_json::from_str(&file.metadata()["config"]).expect("a config in JSON")
}

fn tensor(file: &File, name: &str) -> Tensor {
    let shape = &file.info(name).unwrap_or_else(|e| panic!("{e}")).shape;
    Tensor::from_slice(gpu(), &file.tensor_f32(name).unwrap(), &shape[..])
}

fn grid(file: &File) -> Grid {
    let dimension = file.info("in.ori").unwrap().shape[1];
    Grid::from_vectors(&file.tensor_f32("in.ori").unwrap(), dimension).expect("unit vectors")
}

fn graph(file: &File) -> Graph {
    let dimension = file.info("in.pos").unwrap().shape[1];
    let list = |name| file.tensor_u32(name).unwrap();
    let positions = file.tensor_f32("in.pos").unwrap();
    let (sources, destinations) = (list("in.edge_src"), list("in.edge_dst"));
    Graph::new(gpu(), &positions, dimension, &sources, &destinations, &list("in.batch")).unwrap()
}

fn grids(path: &Path) {
    let file = open(path);
    for name in file.names() {
        let (kind, count) = name.split_once('.').expect("kind and count");
        let count = count.parse().unwrap_or(0);
        let grid = match kind {
            "fibonacci" => Grid::fibonacci(count),
            "circle" => Grid::circle(count),
            "icosahedron" => Grid::icosahedron(),
            "octahedron" => Grid::octahedron(),
            "group" => {
                permutes(&file, name);
                continue;
            }
            _ => panic!("no grid {name}"),
        };
        let got = download(&grid.tensor(gpu()));
        let want = values(&file, name);
        if kind == "icosahedron" || kind == "octahedron" {
            // The grid may have its vertices in another order, and be rotated by the file's group. `permutes` checks that.
            assert_eq!(grid.len(), want.len() / 3, "{name}");
        } else {
            within(name, &got, &want, |_| 2e-7);
        }
    }
}

/// Checks that the rotations of `group.NAME` permute the vertices of the file's polyhedron and of ours. This determines ours up
/// to the order of vertices.
fn permutes(file: &File, name: &str) {
    let (vertices, ours) = match name {
        "group.icosahedron" => ("icosahedron.12", Grid::icosahedron()),
        _ => ("octahedron.6", Grid::octahedron()),
    };
    let theirs = Grid::from_vectors(&file.tensor_f32(vertices).unwrap(), 3).unwrap();
    for (whose, grid) in [("the file's", &theirs), ("our", &ours)] {
        for (i, r) in values(file, name).chunks(9).enumerate() {
            for v in grid.vectors() {
                let turned: [f64; 3] = std::array::from_fn(|a| (0..3).map(|b| r[3 * a + b] * v[b]).sum());
                let near = |w: &[f64; 3]| (0..3).all(|a| (turned[a] - w[a]).abs() < 1e-6);
                assert!(grid.vectors().iter().any(near), "{name}: rotation {i} takes {v:?} off {whose} grid");
            }
        }
    }
}

/// The leaves of a file by name, each created once.
struct Leaves<'a> {
    file: &'a File,
    made: BTreeMap<String, Tensor>,
}

impl Leaves<'_> {
    fn get(&mut self, name: &str) -> Tensor {
        let leaf = || tensor(self.file, &format!("param.{name}")).requires_grad();
        self.made.entry(name.to_string()).or_insert_with(leaf).clone()
    }

    fn basis(&mut self, name: &str) -> Basis {
        let [w1, b1, w2, b2] = ["w1", "b1", "w2", "b2"].map(|part| self.get(&format!("{name}.{part}")));
        Basis { w1, b1, w2, b2 }
    }

    /// Compares every gradient of a parameter that the file has under this prefix.
    fn compare(&self, what: &str, prefix: &str, grads: &Grads, gate: f64) {
        let names: Vec<&str> = self.file.names().filter_map(|n| n.strip_prefix(prefix)).collect();
        let most = names
            .iter()
            .flat_map(|n| values(self.file, &format!("{prefix}{n}")))
            .fold(0.0f64, |m, x| m.max(x.abs()));
        let mut compared = 0;
        for name in names {
            let Some(leaf) = self.made.get(name) else { continue };
            let want = values(self.file, &format!("{prefix}{name}"));
            let got = grads.get(leaf).map_or_else(|| vec![0.0; want.len()], download);
            let own = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            within(&format!("{what} {prefix}{name}"), &got, &want, |_| gate * own + 1e-6 * most);
            compared += 1;
        }
        assert_eq!(compared, self.made.len(), "{what}: parameters with a gradient in the file");
    }
}

fn conv(path: &Path) {
    let file = open(path);
    let config = config(&file);
    let (degree, radius) =
        (config["degree"].as_u64().unwrap() as usize, config["radius"].as_f64().map(|r| r as f32));
    let (grid, plain) = (grid(&file), graph(&file));
    features(&file, &grid, &plain, degree, radius);
    for route in ROUTES {
        let what = format!("{route:?}");
        let mut leaves = Leaves { file: &file, made: BTreeMap::new() };
        let (basis, fiber) = (leaves.basis("basis"), leaves.basis("fiber_basis"));
        let layer = Conv {
            kernel: leaves.get("conv.kernel"),
            fiber_kernel: Some(leaves.get("conv.fiber_kernel")),
            bias: leaves.get("conv.bias"),
            tables: None,
        };
        let (graph, h) = (plain.track(), tensor(&file, "in.h").requires_grad());
        let field =
            Field::new(&graph, &grid, &basis, Some(&fiber), FieldConfig { degree, radius, layers: 1, route });
        let x1 = layer.spatial(&field, &h);
        same(&what, &x1, &file, "mid.x1", 3e-5);
        same(&what, &layer.fiber(&field, &x1), &file, "mid.x2", 3e-5);
        let y = layer.forward(&field, &h);
        same(&what, &y, &file, "out.y", 3e-5);
        let grads = y.backward_with(&tensor(&file, "proj.y")).unwrap();
        same(&what, grads.get(&h).unwrap(), &file, "grad.h", 3e-4);
        same(&what, grads.get(graph.positions()).unwrap(), &file, "grad.pos", 3e-4);
        leaves.compare(&what, "grad.", &grads, 3e-4);

        let mut raw = layer.clone();
        raw.kernel = tensor(&file, "calib.kernel_raw");
        raw.fiber_kernel = Some(tensor(&file, "calib.fiber_kernel_raw"));
        let deviations = raw.calibrate(&field, &h).unwrap().map(f64::from);
        close("calib.std", &deviations, &values(&file, "calib.std"), 1e-4);
        same(&what, &raw.kernel, &file, "param.conv.kernel", 1e-4);
        same(&what, raw.fiber_kernel.as_ref().unwrap(), &file, "param.conv.fiber_kernel", 1e-4);
    }
}

/// Compares all intermediate results of the geometry. Our edges are sorted, and the file has its own order.
fn features(file: &File, grid: &Grid, graph: &Graph, degree: usize, radius: Option<f32>) {
    let (d, ori) = (graph.vectors(), grid.tensor(gpu()));
    let back = {
        let mut back = vec![0u32; graph.edges().len()];
        graph.edges().order().iter().enumerate().for_each(|(new, &old)| back[old as usize] = new as u32);
        Tensor::from_slice(gpu(), &back, [back.len()])
    };
    let as_given = |x: &Tensor| x.index_select(0, &back);
    let attributes = invariants::spatial(&d, &ori);
    same("geometry", &as_given(&attributes), file, "mid.attr", 3e-6);
    same("geometry", &as_given(&invariants::polynomial(&attributes, degree)), file, "mid.poly", 3e-5);
    let distance = invariants::norm(&d);
    same("geometry", &as_given(&distance), file, "mid.dist", 3e-6);
    if let Some(radius) = radius {
        same("geometry", &as_given(&invariants::envelope(&distance, radius)), file, "mid.window", 3e-5);
    }
    same("geometry", &invariants::fiber(&ori), file, "mid.fiber_attr", 3e-6);
}

/// Returns the network of a file, and its leaves.
fn network<'a>(file: &'a File) -> (Ponita, Leaves<'a>) {
    let config = PonitaConfig::from_json(&file.metadata()["config"]).unwrap();
    let folder = Folder::new("ponita");
    // The parameters go through a file of ours, so the comparison also covers saving and loading.
    let name = file.path().file_name().unwrap();
    let path = folder.join(name);
    let mut net = Ponita::new(gpu(), config, grid(file), &mut tiebeam::Rng::new(1)).unwrap();
    let own = Parameters::of(&net);
    let named: BTreeMap<String, Tensor> =
        own.named().iter().map(|(n, _)| (n.clone(), tensor(file, &format!("param.{n}")))).collect();
    let vectors: Vec<(&str, &Tensor)> = named.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let ori = net.grid.tensor(gpu());
    let all = vectors.into_iter().chain([("grid", &ori)]);
    let metadata = [("config".to_string(), net.config.to_json())].into();
    tiebeam::store::save_tensors(&path, all, &metadata).unwrap();
    net = Ponita::load(gpu(), &path).unwrap();
    net.save(&path).unwrap();
    net = Ponita::load(gpu(), &path).unwrap();
    let made = Parameters::of(&net).named().iter().cloned().collect();
    (net, Leaves { file, made })
}

fn net(path: &Path) {
    let file = open(path);
    let plain = graph(&file);
    let (mut net, leaves) = network(&file);
    let has_vectors = file.contains("in.vec");
    for route in ROUTES {
        let what = format!("{route:?}");
        net.route = route;
        let input = PonitaInput {
            scalars: Some(tensor(&file, "in.x").requires_grad()),
            vectors: has_vectors.then(|| tensor(&file, "in.vec").requires_grad()),
        };
        let graph = plain.track();
        let hidden = net.hidden(&graph, &input);
        for (l, h) in hidden.iter().enumerate() {
            same(&what, h, &file, &format!("mid.hidden{l}"), 1e-4);
        }
        same(&what, &net.readout(&hidden), &file, "mid.readout", 1e-4);
        let output = net.forward(&graph, &input);
        same(&what, &output.scalars, &file, "out.scalar", 1e-4);
        same(&what, &output.vectors, &file, "out.vector", 1e-4);
        let loss = |x: &Tensor, name| x.mul(&tensor(&file, name)).sum_all();
        let loss = loss(&output.scalars, "proj.scalar").add(&loss(&output.vectors, "proj.vector"));
        let grads = loss.backward().unwrap();
        same(&what, grads.get(graph.positions()).unwrap(), &file, "grad.pos", 3e-4);
        same(&what, grads.get(input.scalars.as_ref().unwrap()).unwrap(), &file, "grad.x", 3e-4);
        if let Some(vectors) = &input.vectors {
            same(&what, grads.get(vectors).unwrap(), &file, "grad.vec", 3e-4);
        }
        leaves.compare(&what, "grad.", &grads, 3e-4);
        forces(&what, &file, &net, &plain, &input, &leaves);
        if file.contains("sym.rotation") {
            symmetry(&what, &file, &net, &plain, &input);
        }
    }
}

fn forces(what: &str, file: &File, net: &Ponita, graph: &Graph, input: &PonitaInput, leaves: &Leaves) {
    let made = net.energy_forces(graph, input).unwrap();
    let got: Vec<f64> = made.forces.iter().map(|&x| x as f64).collect();
    close(&format!("{what} force.pos"), &got, &values(file, "force.pos"), 3e-4);
    let energy: f64 = made.energies.iter().sum();
    let outputs = config(file)["out_scalar"].as_u64().unwrap() as usize;
    let want: f64 = values(file, "out.scalar").iter().step_by(outputs).sum();
    assert!((energy - want).abs() <= 1e-4 * want.abs().max(1.0), "{what}: energy {energy}, want {want}");
    let u = tensor(file, "proj.force");
    let product = net.force_product(graph, input, &u, Ponita::FORCE_STEP);
    leaves.compare(what, "grad2.", &product.backward().unwrap(), 3e-3);
}

/// Checks that under a translation and rotations that permute the grid, scalars are invariant and vectors are rotated.
fn symmetry(what: &str, file: &File, net: &Ponita, graph: &Graph, input: &PonitaInput) {
    let before = net.forward(graph, input);
    let (scalars, vectors) = (download(&before.scalars), download(&before.vectors));
    for r in file.tensor_f32("sym.rotation").unwrap().chunks(9) {
        let r = Tensor::from_slice(gpu(), r, [3, 3]);
        let shift = Tensor::from_slice(gpu(), &[0.5f32, -1.0, 2.0], [3]);
        let turned = PonitaInput {
            scalars: input.scalars.clone(),
            vectors: input.vectors.as_ref().map(|v| v.matmul(&r.t())),
        };
        let after = net.forward(&graph.at(&graph.positions().matmul(&r.t()).add(&shift)), &turned);
        within(&format!("{what}: turned scalars"), &download(&after.scalars), &scalars, |_| 1e-5);
        let back = after.vectors.matmul(&r);
        within(&format!("{what}: turned vectors"), &download(&back), &vectors, |_| 1e-5);
    }
}

fn f64s(file: &File, name: &str) -> Vec<f64> {
    let bytes = file.bytes(name).unwrap_or_else(|e| panic!("{e}"));
    bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("8 bytes"))).collect()
}

fn nbody(path: &Path) {
    let file = open(path);
    let config = config(&file);
    let particles = config["particles"].as_u64().unwrap() as usize;
    let triples = |name: &str| -> Vec<[f64; 3]> {
        f64s(&file, name).chunks_exact(3).map(|c| [c[0], c[1], c[2]]).collect()
    };
    let mut times: Vec<usize> =
        file.names().filter_map(|n| n.strip_prefix("f64.pos.")?.parse().ok()).filter(|&k| k > 0).collect();
    times.sort_unstable();
    let (x, v) = (triples("f64.pos.0"), triples("f64.vel.0"));
    for (s, charge) in f64s(&file, "f64.charge").chunks(particles).enumerate() {
        let own = s * particles..(s + 1) * particles;
        let mut system = Nbody::new(charge.to_vec(), x[own.clone()].to_vec(), v[own.clone()].to_vec());
        system.dt = config["dt"].as_f64().unwrap();
        system.clip = config["clip"].as_f64().unwrap();
        let mut done = 0;
        for &k in &times {
            system.advance(k - done);
            done = k;
            for (name, got) in [("pos", system.position.clone()), ("vel", system.recorded_velocity())] {
                let name = format!("f64.{name}.{k}");
                close(&name, &got.concat(), &triples(&name)[own.clone()].concat(), 1e-9);
            }
        }
    }
}
