//! A small untrained potential, and frames for it.

use crate::support::gpu;
use std::sync::OnceLock;
use tiebeam::Rng;
use tiebeam::geometry::vectors::Vec3;
use tiebeam::geometry::xyz::Frame;
use tiebeam::geometry::{Calculator, Cell, Grid, PonitaConfig, Potential};

/// Creates a frame of two species near a lattice of this spacing, with arbitrary energy and forces.
pub fn frame(seed: u64, side: usize, spacing: f64) -> Frame {
    let mut rng = Rng::new(seed);
    let n = side * side * side;
    let mut draws = vec![0.0f32; 6 * n];
    rng.fill_normal(&mut draws);
    let at = |i: usize| -> Vec3 {
        let place = [i % side, i / side % side, i / side / side];
        std::array::from_fn(|k| spacing * (place[k] as f64 + 0.12 * draws[6 * i + k] as f64))
    };
    let force = |i: usize| -> Vec3 { std::array::from_fn(|k| draws[6 * i + 3 + k] as f64) };
    let species: Vec<u8> = (0..n).map(|i| if i % 3 == 0 { 8 } else { 29 }).collect();
    Frame {
        energy: Some(-3.0 * n as f64 + draws[0] as f64),
        positions: (0..n).map(at).collect(),
        forces: Some((0..n).map(force).collect()),
        species,
        ..Frame::default()
    }
}

pub fn potential(radius: Option<f32>, layers: usize) -> Potential {
    let config = PonitaConfig::default().channels(8).hidden(8).basis(8).layers(layers).radius(radius);
    let frames = [frame(1, 2, 2.4), frame(2, 2, 2.4)];
    let mut potential =
        Potential::new(gpu(), &frames, config, Grid::icosahedron(), &mut Rng::new(3)).expect("a potential");
    let batch = potential.batch(&frames.iter().collect::<Vec<_>>()).expect("a batch");
    potential.net.calibrate(&batch.graph, &batch.input).expect("frames that differ");
    potential
}

pub fn calculator() -> &'static Calculator {
    static ONE: OnceLock<Calculator> = OnceLock::new();
    ONE.get_or_init(|| Calculator::new(potential(Some(4.0), 2)))
}

pub fn crystal() -> (Frame, Cell) {
    let vectors = [[3.6, 0.0, 0.0], [0.7, 4.1, 0.0], [-0.4, 0.5, 4.4]];
    (frame(8, 1, 1.0), Cell { vectors, periodic: [true; 3] })
}
