//! Potentials from end to end: frames as text, forces and stress compared with differences of the energy, periodic cells with
//! explicit images, dynamics.

use crate::support::folder::Folder;
use crate::support::gpu;
use crate::support::potentials::{calculator, crystal, frame, potential};
use tiebeam::geometry::dynamics::Verlet;
use tiebeam::geometry::elements::{atomic_number, mass, symbol};
use tiebeam::geometry::vectors::{DMat3, DVec3, Vec3, rotation, turned};
use tiebeam::geometry::xyz::Frame;
use tiebeam::geometry::{Atoms, Calculator, Cell, Grid, Ponita, PonitaConfig, Potential, Properties};
use tiebeam::nn::Parameters;
use tiebeam::optim::{Group, Sgd, SgdConfig};
use tiebeam::{Rng, Tensor};

#[test]
fn elements_are_known_both_ways() {
    for z in 1..=118 {
        assert_eq!(atomic_number(symbol(z)), Some(z));
        assert_eq!(atomic_number(&z.to_string()), Some(z));
        // Masses grow with the atomic number, except for a few known pairs.
        let known = [18, 27, 52, 90, 92, 94, 95, 97, 101, 106, 108, 110, 112, 114, 116, 117];
        let grows = z == 1 || mass(z) > mass(z - 1) || known.contains(&(z - 1)) || known.contains(&z);
        assert!(grows, "{} {:?} after {:?}", symbol(z), mass(z), mass(z - 1));
    }
    assert_eq!((mass(0), mass(119), atomic_number("Xy")), (None, None, None));
}

/// Checks `|got - want| <= relative max |want|`.
fn close(what: &str, got: &[f64], want: &[f64], relative: f64) {
    let most = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    assert!(most > 1e-3, "{what}: nothing to compare with, {most}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(
            (g - w).abs() <= relative * most,
            "{what}: element {i} is {g}, not {w}; the largest is {most}"
        );
    }
    assert_eq!(got.len(), want.len(), "{what}");
}

/// Returns the negated central difference of the energy in every coordinate.
fn slopes(positions: &[Vec3], energy: impl Fn(&[Vec3]) -> f64) -> Vec<f64> {
    let step = 4e-3;
    let slope = |at: usize| {
        let moved = |by: f64| {
            let mut x = positions.to_vec();
            x[at / 3][at % 3] += by;
            energy(&x)
        };
        -(moved(step) - moved(-step)) / (2.0 * step)
    };
    (0..3 * positions.len()).map(slope).collect()
}

#[test]
fn forces_are_the_gradient_of_the_energy() {
    let frame = frame(7, 2, 2.4);
    let energy = |x: &[Vec3]| calculator().energy_forces(x, &frame.species, None).expect("finite").energy;
    let found = calculator().energy_forces(&frame.positions, &frame.species, None).expect("finite");
    let sum: f64 = found.atom_energies.iter().sum();
    assert!((found.energy - sum).abs() < 1e-9 * sum.abs(), "{} {sum}", found.energy);
    close("forces", found.forces.as_flattened(), &slopes(&frame.positions, energy), 2e-3);
    for k in 0..3 {
        let total: f64 = found.forces.iter().map(|f| f[k]).sum();
        assert!(total.abs() < 1e-5, "the forces sum to {total}");
    }
}

#[test]
fn rotations_average_what_a_rotation_changes() {
    let frame = frame(7, 2, 2.4);
    let average = |count: usize| Calculator::new(calculator().potential().clone()).rotations(count);
    let found = |c: &Calculator, x: &[Vec3]| c.energy_forces(x, &frame.species, None).expect("finite");
    assert_eq!(found(&average(1), &frame.positions), found(calculator(), &frame.positions), "the same bits");
    // The effect of rotating the input: the root mean square change over several rotations, of energies and of forces rotated
    // back.
    let mut rng = Rng::new(11);
    let turns: Vec<DMat3> = (0..8).map(|_| rotation(&mut rng)).collect();
    let change = |count: usize| {
        let calculator = average(count);
        let plain = found(&calculator, &frame.positions);
        let (mut energy, mut force) = (0.0f64, 0.0f64);
        for r in &turns {
            let found = found(&calculator, &turned(r, &frame.positions));
            energy += (found.energy - plain.energy).powi(2);
            for (f, want) in found.forces.iter().zip(&plain.forces) {
                force += (r.transpose() * DVec3::from(*f)).distance_squared(DVec3::from(*want));
            }
        }
        [energy.sqrt(), force.sqrt()]
    };
    let all = [1, 8, 64].map(change);
    println!("changes by rotations, energy and forces, of 1, 8 and 64: {all:?}");
    for part in 0..2 {
        let [one, some, many] = all.map(|of| of[part]);
        // The expected ratios are 1/sqrt(8) and 1/8, and with few rotations the values scatter around these.
        assert!(some < 0.6 * one && many < 0.3 * one, "part {part}: {one}, {some}, {many}");
    }
}

#[test]
fn averaged_forces_are_the_gradient_of_the_averaged_energy() {
    let frame = frame(7, 2, 2.4);
    let average = Calculator::new(calculator().potential().clone()).rotations(5);
    let found = |x: &[Vec3]| average.energy_forces(x, &frame.species, None).expect("finite");
    let plain = found(&frame.positions);
    let own: f64 = plain.atom_energies.iter().sum();
    assert!((plain.energy - own).abs() < 1e-9 * own.abs(), "{} {own}", plain.energy);
    close("forces", plain.forces.as_flattened(), &slopes(&frame.positions, |x| found(x).energy), 2e-3);
    // The forces differ from those without an average. Otherwise the test would pass without one.
    let other = calculator().energy_forces(&frame.positions, &frame.species, None).expect("finite");
    let apart = other.forces.as_flattened().iter().zip(plain.forces.as_flattened());
    assert!(apart.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) > 1e-3);
}

fn strained(x: &Vec3, a: usize, b: usize, by: f64) -> Vec3 {
    let mut y = *x;
    y[a] += by * x[b];
    y
}

#[test]
fn stress_is_the_derivative_with_respect_to_strain() {
    stress_is_a_derivative(calculator());
    let (frame, slab) = pair(Cell { periodic: [true, true, false], ..crystal().1 });
    let found = calculator().energy_forces(&frame.positions, &frame.species, Some(slab)).expect("finite");
    assert_eq!(found.stress, None, "a slab has no volume");
}

/// Positions and cell are rotated together, and the stress is rotated back.
#[test]
fn averaged_stress_is_the_derivative_with_respect_to_strain() {
    let average = Calculator::new(calculator().potential().clone()).rotations(3);
    stress_is_a_derivative(&average);
    let (frame, cell) = pair(crystal().1);
    let [s, other] = [&average, calculator()].map(|c| {
        let found = c.energy_forces(&frame.positions, &frame.species, Some(cell)).expect("finite");
        found.stress.expect("periodic along all")
    });
    assert!((0..9).all(|i| s[i / 3][i % 3] == s[i % 3][i / 3]), "symmetric: {s:?}");
    assert_ne!(s, other);
}

fn pair(cell: Cell) -> (Frame, Cell) {
    let positions = vec![[0.1, 0.2, 0.3], [1.9, 1.7, 2.2]];
    (Frame { positions, species: vec![8, 29], ..Frame::default() }, cell)
}

fn stress_is_a_derivative(calculator: &Calculator) {
    let (frame, cell) = pair(crystal().1);
    let volume = DMat3::from_cols_array_2d(&cell.vectors).determinant();
    let found = calculator.energy_forces(&frame.positions, &frame.species, Some(cell)).expect("finite");
    let stress = found.stress.expect("periodic along all");
    let step = 1e-3;
    let mut want = Vec::new();
    for (a, b) in (0..3).flat_map(|a| (0..3).map(move |b| (a, b))) {
        // Each of the two off-diagonal elements has half of the strain, which keeps it symmetric.
        let energy = |by: f64| {
            let both = |x: &Vec3| {
                let (p, q) = (strained(x, a, b, 0.5 * by), strained(x, b, a, 0.5 * by));
                std::array::from_fn(|k| p[k] + q[k] - x[k])
            };
            let x: Vec<Vec3> = frame.positions.iter().map(both).collect();
            let cell = Cell { vectors: cell.vectors.each_ref().map(both), ..cell };
            calculator.energy_forces(&x, &frame.species, Some(cell)).expect("finite").energy
        };
        want.push((energy(step) - energy(-step)) / (2.0 * step) / volume);
    }
    close("stress", stress.as_flattened(), &want, 2e-3);
}

/// In a cell shorter than the radius, an atom has several images of itself as neighbours.
#[test]
fn periodic_cells_are_explicit_images() {
    let one = Calculator::new(potential(Some(4.0), 1));
    let (_, cell) = crystal();
    let (positions, species) = (vec![[0.1, 0.2, 0.3], [1.9, 1.7, 2.2]], vec![8, 29]);
    let found = one.energy_forces(&positions, &species, Some(cell)).expect("finite");
    let (mut all, mut kinds) = (positions.clone(), species.clone());
    let images = -2..=2;
    for n in images.clone().flat_map(|a| images.clone().flat_map(move |b| (-2..=2).map(move |c| [a, b, c]))) {
        if n == [0, 0, 0] {
            continue;
        }
        let shift: Vec3 = std::array::from_fn(|k| (0..3).map(|i| n[i] as f64 * cell.vectors[i][k]).sum());
        all.extend(positions.iter().map(|x| -> Vec3 { std::array::from_fn(|k| x[k] + shift[k]) }));
        kinds.extend(&species);
    }
    let open = one.energy_forces(&all, &kinds, None).expect("finite");
    // With one layer of messages, an atom's energy depends on neighbours within one radius.
    close("energies", &found.atom_energies, &open.atom_energies[..2], 1e-5);
    // An atom moved by a vector of the cell gives the same crystal.
    let moved: Vec<Vec3> = vec![positions[0], std::array::from_fn(|k| positions[1][k] + cell.vectors[0][k])];
    let again = one.energy_forces(&moved, &species, Some(cell)).expect("finite");
    close("forces of wrapped atoms", again.forces.as_flattened(), found.forces.as_flattened(), 1e-4);
    assert!((again.energy - found.energy).abs() < 1e-5, "{} {}", again.energy, found.energy);
    // Also many periods away, where f32 positions would have no digit left for the place within the cell.
    let far = |k: usize| positions[1][k] + 1e6 * cell.vectors[0][k];
    let away: Vec<Vec3> = vec![positions[0], std::array::from_fn(far)];
    let again = one.energy_forces(&away, &species, Some(cell)).expect("finite");
    close("forces of atoms far away", again.forces.as_flattened(), found.forces.as_flattened(), 1e-4);
}

#[test]
fn a_refused_system_does_not_end_the_calculator() {
    let all = Calculator::new(potential(None, 1));
    let (positions, species) = (vec![[0.1, 0.2, 0.3], [1.9, 1.7, 2.2]], vec![8u8, 29]);
    let before = all.energy_forces(&positions, &species, None).expect("finite");
    // All pairs of these atoms would take 320 GB.
    let many = vec![[0.0; 3]; 200_000];
    let error = all.energy_forces(&many, &vec![8; many.len()], None).expect_err("too many").to_string();
    assert!(error.contains("bytes of one list of edges"), "{error}");
    assert_eq!(all.energy_forces(&positions, &species, None).expect("finite"), before);
    // A domain of a system may have no atom.
    let cell = Cell::cuboid([5.0; 3]);
    let none = Calculator::new(potential(Some(4.0), 1)).energy_forces(&[], &[], Some(cell)).expect("nothing");
    assert_eq!((none.energy, none.stress), (0.0, Some([[0.0; 3]; 3])));
}

/// A batch of frames, with different cells and in free space, in one graph.
#[test]
fn a_batch_is_its_frames() {
    let (_, cell) = crystal();
    let (pair, kinds) = ([[0.1, 0.2, 0.3], [1.9, 1.7, 2.2]], [8, 29]);
    let frame = frame(9, 2, 2.4);
    let all = [
        Atoms { positions: &pair, species: &kinds, cell: Some(cell) },
        Atoms::of(&frame),
        Atoms { positions: &pair, species: &kinds, cell: None },
    ];
    let potential = calculator().potential();
    let (graph, input) = potential.graph(&all).expect("a graph");
    let together = potential.net.energy_forces(&graph, &input).expect("finite");
    for (i, of) in all.iter().enumerate() {
        let alone = calculator().energy_forces(of.positions, of.species, of.cell).expect("finite");
        let reference = potential.reference_energy(of.species).expect("known species");
        let energy = reference + potential.scale * together.energies[i];
        assert!((energy - alone.energy).abs() < 1e-5, "frame {i}: {energy}, alone {}", alone.energy);
    }
}

/// Small systems share graphs, in any number, with and without cells, in one orientation and in several.
#[test]
fn a_batch_is_its_systems() {
    let (_, cell) = crystal();
    let slab = Cell { periodic: [true, true, false], ..cell };
    let (pair, kinds) = ([[0.1, 0.2, 0.3], [1.9, 1.7, 2.2]], [8, 29]);
    let frames: Vec<Frame> = (0..150).map(|i| frame(i, 2, 2.4)).collect();
    let mut all: Vec<Atoms> = frames.iter().map(Atoms::of).collect();
    for (i, cell) in [Some(cell), None, Some(slab), Some(Cell::cuboid([6.0; 3]))].into_iter().enumerate() {
        all.insert(40 * i, Atoms { positions: &pair, species: &kinds, cell });
    }
    all.insert(3, Atoms { positions: &[], species: &[], cell: Some(cell) });
    all.push(Atoms { positions: &[], species: &[], cell: None });
    for rotations in [1, 3] {
        let calculator = Calculator::new(calculator().potential().clone()).rotations(rotations);
        let together = calculator.energies_forces(&all).expect("finite");
        assert_eq!(together, calculator.energies_forces(&all).expect("finite"), "the same bits");
        assert_eq!(together.len(), all.len());
        for (i, (of, found)) in all.iter().zip(&together).enumerate() {
            let alone = calculator.energy_forces(of.positions, of.species, of.cell).expect("finite");
            assert!((found.energy - alone.energy).abs() < 1e-5, "{i}: {} {}", found.energy, alone.energy);
            assert_eq!((found.forces.len(), found.nearest), (alone.forces.len(), alone.nearest), "{i}");
            let numbers = |p: &Properties| -> Vec<f64> {
                let stress = p.stress.iter().flatten().flatten();
                p.forces.iter().flatten().chain(stress).copied().collect()
            };
            for (a, b) in numbers(found).iter().zip(numbers(&alone)) {
                assert!((a - b).abs() < 2e-5, "{i}: {a} {b}");
            }
            assert_eq!(found.stress.is_some(), alone.stress.is_some(), "{i}");
        }
        let stresses: Vec<_> = together.iter().filter_map(|found| found.stress).collect();
        assert_eq!(stresses.len(), 3, "two crystals, and a cell without atoms");
        assert!(stresses[0] != stresses[2], "each has its own");
    }
    // The system at fault is named, and leaves the device as it was.
    let bad = [Atoms::of(&frames[0]), Atoms { positions: &[[f64::NAN; 3]], species: &[8], cell: None }];
    let message = calculator().energies_forces(&bad).expect_err("not finite").to_string();
    assert!(message.contains("frame 1: ") && message.contains("NaN"), "{message}");
    let predicted = calculator().predict_batch(&frames[..2]).expect("finite");
    assert_eq!(predicted.len(), 2);
    assert!(
        (predicted[0].energy.expect("an energy")
            - calculator().predict(&frames[0]).expect("finite").energy.expect("one"))
        .abs()
            < 1e-5
    );
}

/// A system in parts is the whole, with and without a cell, whatever the size of the parts.
#[test]
fn parts_are_the_whole() {
    let free = frame(12, 5, 2.4);
    let periodic = Frame { cell: Some(Cell::cuboid([12.0; 3])), ..free.clone() };
    for of in [&free, &periodic] {
        let whole = calculator().energy_forces(&of.positions, &of.species, of.cell).expect("finite");
        for most in [100, 31, 1] {
            let parts = Calculator::new(calculator().potential().clone()).most_atoms(most);
            let found = parts.energy_forces(&of.positions, &of.species, of.cell).expect("finite");
            assert!((found.energy - whole.energy).abs() < 1e-4, "{most}: {} {}", found.energy, whole.energy);
            close("atoms", &found.atom_energies, &whole.atom_energies, 1e-5);
            close("forces", found.forces.as_flattened(), whole.forces.as_flattened(), 1e-4);
            assert_eq!(found.nearest, whole.nearest);
            if let (Some(found), Some(whole)) = (found.stress, whole.stress) {
                close("stress", found.as_flattened(), whole.as_flattened(), 1e-4);
            }
            assert_eq!(found.stress.is_some(), of.cell.is_some());
        }
    }
}

#[test]
fn nearest_atoms_are_known() {
    let of = |positions: &[Vec3], cell| {
        calculator().energy_forces(positions, &vec![29; positions.len()], cell).expect("finite").nearest
    };
    let found = of(&[[0.0; 3], [2.5, 0.0, 0.0], [2.5, 1.5, 0.0]], None).expect("neighbours");
    assert_eq!(found.atoms, [1, 2]);
    assert!((found.distance - 1.5).abs() < 1e-5 && !found.is_one_point(), "{found:?}");
    assert!(of(&[[1.0; 3], [1.0; 3]], None).expect("neighbours").is_one_point());
    assert_eq!(of(&[[0.0; 3], [0.0, 0.0, 9.0]], None), None);
    // An image of the atom itself, and of another.
    let found = of(&[[0.0; 3]], Some(Cell::cuboid([3.0, 5.0, 5.0]))).expect("an image");
    assert!(found.atoms == [0, 0] && (found.distance - 3.0).abs() < 1e-5, "{found:?}");
    let found = of(&[[0.1, 0.0, 0.0], [5.9, 0.0, 0.0]], Some(Cell::cuboid([6.0; 3]))).expect("an image");
    assert!(found.atoms == [0, 1] && (found.distance - 0.2).abs() < 1e-5, "{found:?}");
    // The shortest distance of the training frames goes with the potential.
    let frames = [frame(1, 2, 2.4), frame(2, 2, 2.4)];
    let shortest = frames.iter().flat_map(|f| (0..8).flat_map(move |i| (0..i).map(move |j| (f, i, j))));
    let shortest =
        shortest.map(|(f, i, j)| DVec3::from(f.positions[i]).distance(DVec3::from(f.positions[j])));
    let (want, got) =
        (shortest.fold(f64::INFINITY, f64::min), calculator().potential().nearest.expect("two atoms"));
    assert!((want - got).abs() < 1e-5, "{want} {got}");
    let twice =
        Frame { positions: vec![[0.0; 3], [3.0; 3], [3.0; 3]], species: vec![8; 3], ..frame(1, 1, 1.0) };
    let twice = Frame { forces: Some(vec![[1.0; 3]; 3]), ..twice };
    let made = Potential::new(
        gpu(),
        &[frame(1, 2, 2.4), twice],
        PonitaConfig::default(),
        Grid::octahedron(),
        &mut Rng::new(1),
    );
    let message = made.err().expect("one point").to_string();
    assert!(message.contains("frame 1: atoms 1 and 2 are at one point"), "{message}");
}

/// Exchanging axes with sign changes permutes the icosahedron's vertices.
#[test]
fn the_grids_own_motions_are_exact() {
    let frame = frame(9, 2, 2.4);
    let found = calculator().energy_forces(&frame.positions, &frame.species, None).expect("finite");
    let turn = |x: &Vec3| [x[1], -x[2], -x[0]];
    let turned: Vec<Vec3> = frame.positions.iter().map(|x| turn(x).map(|x| x + 1000.0)).collect();
    let again = calculator().energy_forces(&turned, &frame.species, None).expect("finite");
    assert!((again.energy - found.energy).abs() < 2e-5, "{} {}", again.energy, found.energy);
    let want: Vec<f64> = found.forces.iter().flat_map(turn).collect();
    close("forces", again.forces.as_flattened(), &want, 1e-4);
    // The same input gives the same bits.
    let twice = calculator().energy_forces(&frame.positions, &frame.species, None).expect("finite");
    assert_eq!(twice, found);
}

#[test]
fn bad_input_is_refused_in_words() {
    let refused = |calculator: &Calculator, x: &[Vec3], z: &[u8], cell: Option<Cell>, reason: &str| {
        let message = calculator.energy_forces(x, z, cell).expect_err(reason).to_string();
        assert!(message.contains(reason), "{message}");
    };
    let (x, z) = ([[0.0; 3], [0.0, 0.0, 2.0]], [29, 8]);
    refused(calculator(), &x, &[29, 1], None, "atom 1 is H (number 1); this one was trained on O, Cu");
    refused(calculator(), &x, &[29], None, "2 positions for 1 species");
    refused(calculator(), &[[0.0; 3], [f64::NAN, 0.0, 0.0]], &z, None, "is NaN");
    refused(calculator(), &[[0.0; 3], [1e300, 0.0, 0.0]], &z, None, "inf");
    let flat = Cell { vectors: [[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [3.0, 3.0, 0.0]], periodic: [true; 3] };
    refused(calculator(), &x, &z, Some(flat), "no volume");
    refused(calculator(), &x, &z, Some(Cell::cuboid([f64::INFINITY, 1.0, 1.0])), "not finite");
    refused(calculator(), &x, &z, Some(Cell::cuboid([1e-4; 3])), "smaller radius or a larger cell");
    let endless = Calculator::new(potential(None, 1));
    refused(&endless, &x, &z, Some(Cell::cuboid([5.0; 3])), "no radius");
    let nothing = calculator().energy_forces(&[], &[], None).expect("no atoms");
    assert_eq!((nothing.energy, nothing.forces.len()), (0.0, 0));
    let frames = [Frame { forces: None, ..frame(1, 2, 2.4) }];
    let made = Potential::new(gpu(), &frames, PonitaConfig::default(), Grid::octahedron(), &mut Rng::new(1));
    let message = made.err().expect("no forces").to_string();
    assert!(message.contains("frame 0 has no forces"), "{message}");
}

#[test]
fn a_file_keeps_the_potential() {
    let folder = Folder::new("model");
    let path = folder.join("model.safetensors");
    let own = calculator().potential();
    own.save(&path).expect("saved");
    let again = Potential::load(gpu(), &path).expect("loaded");
    assert_eq!((&again.species, &again.reference, again.scale), (&own.species, &own.reference, own.scale));
    assert!(own.nearest.is_some() && again.nearest == own.nearest);
    let frame = frame(7, 2, 2.4);
    let bits = |c: &Calculator| c.energy_forces(&frame.positions, &frame.species, None).expect("finite");
    assert_eq!(bits(&Calculator::new(again)), bits(calculator()));
    own.net.save(&path).expect("saved");
    let message = Potential::load(gpu(), &path).err().expect("a network alone").to_string();
    assert!(message.contains("no `potential`"), "{message}");
}

/// A small step against the gradient lowers the loss by the step times the gradient's squared norm. This number depends on
/// energies, forces, their weights and signs.
#[test]
fn the_objectives_gradient_is_the_losss() {
    let frames = [frame(1, 2, 2.4), frame(2, 2, 2.4)];
    for weight in [0.0, 5.0] {
        let potential = potential(Some(4.0), 2);
        let batch = potential.batch(&frames.iter().collect::<Vec<_>>()).expect("a batch");
        let all = Parameters::of(&potential.net);
        let group = Group::new(all.named().iter().map(|(name, p)| (name.clone(), p)));
        let mut descent = Sgd::new(gpu(), vec![group], SgdConfig::default()).expect("an optimizer");
        let loss = || {
            let errors = potential.loss(&batch, weight, Ponita::FORCE_STEP).expect("a loss");
            let mean = |x: &Tensor| {
                let x = crate::support::download(x);
                x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64
            };
            (weight as f64 * mean(&errors.energy_errors) + mean(&errors.force_errors), errors.objective)
        };
        let (before, objective) = loss();
        let grads = objective.backward().expect("gradients");
        let square: f64 = all
            .named()
            .iter()
            .filter_map(|(_, p)| grads.get(p))
            .map(|g| crate::support::download(g).iter().map(|x| x * x).sum::<f64>())
            .sum();
        let lr = 1e-3 * before / square;
        descent.step(&grads, lr as f32).expect("a step");
        let after = loss().0;
        let ratio = (before - after) / (lr * square);
        assert!(
            (ratio - 1.0).abs() < 0.03,
            "weight {weight}: {before} to {after} is {ratio} of what was promised"
        );
    }
}

/// Dynamics in a smooth potential conserve the energy: the error of velocity Verlet is of second order in the step and does not
/// grow.
#[test]
fn dynamics_keep_the_energy() {
    let frame = frame(7, 2, 2.4);
    let field = |x: &[Vec3]| {
        let found = calculator().energy_forces(x, &frame.species, None)?;
        Ok((found.energy, found.forces))
    };
    let worst = |dt: f64, steps: usize| {
        let mut atoms = Verlet::new(&frame.positions, &frame.species, field).expect("finite");
        atoms.heat(300.0, &mut Rng::new(5));
        let (first, mut worst, mut moved) = (atoms.total(), 0.0f64, 0.0f64);
        let momentum = |a: &Verlet| (0..8).map(|i| a.masses[i] * a.velocities[i][0]).sum::<f64>();
        assert!(momentum(&atoms).abs() < 1e-12 && (100.0..900.0).contains(&atoms.temperature()));
        let start = atoms.kinetic();
        for _ in 0..steps {
            atoms.step(dt, field).expect("finite");
            worst = worst.max((atoms.total() - first).abs());
            moved = moved.max((atoms.kinetic() - start).abs());
        }
        assert!(momentum(&atoms).abs() < 1e-4, "{}", momentum(&atoms));
        (worst, moved)
    };
    let (fine, moved) = worst(1.0, 200);
    assert!(moved > 0.05, "the potential does no work: {moved} eV");
    assert!(fine < 0.01 * moved, "{fine} eV of {moved}");
    let (coarse, _) = worst(4.0, 50);
    assert!(coarse > 4.0 * fine, "{coarse} at four times the step, {fine} before: not of second order");
    let species = [0u8, 29];
    let message =
        Verlet::new(&[[0.0; 3]; 2], &species, |_| Ok((0.0, vec![[0.0; 3]; 2]))).expect_err("X has no mass");
    assert!(message.to_string().contains("no element has number 0"), "{message}");
}

/// A flag ends the work between graphs, and the number of rotations takes no memory.
#[test]
fn a_flag_stops_a_calculator() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tiebeam::error::ErrorKind;
    let stop = Arc::new(AtomicBool::new(false));
    let endless = Calculator::new(calculator().potential().clone()).rotations(usize::MAX).stop(stop.clone());
    let frames = [frame(7, 2, 2.4), frame(8, 2, 2.4)];
    let atoms: Vec<Atoms> = frames.iter().map(Atoms::of).collect();
    let flag = stop.clone();
    let other = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        flag.store(true, Ordering::Relaxed);
    });
    let (at, error) = endless.energies_forces_at(&atoms).expect_err("it was stopped");
    assert_eq!((at, error.kind()), (None, ErrorKind::Stopped));
    other.join().expect("no panic");
    let parts = Calculator::new(calculator().potential().clone()).most_atoms(2).stop(stop.clone());
    let run = || parts.energy_forces(&frames[0].positions, &frames[0].species, None);
    assert_eq!(run().expect_err("it was stopped").kind(), ErrorKind::Stopped);
    stop.store(false, Ordering::Relaxed);
    assert!(run().is_ok(), "it goes on");
}

/// One fault among many systems is found by number, in every orientation.
#[test]
fn a_fault_is_found_by_number() {
    let flat = Cell { vectors: [[0.0; 3]; 3], periodic: [true; 3] };
    let mut frames: Vec<Frame> = (0..40).map(|seed| frame(seed, 2, 2.4)).collect();
    frames[23].cell = Some(flat);
    frames[31].cell = Some(flat);
    let atoms: Vec<Atoms> = frames.iter().map(Atoms::of).collect();
    for rotations in [1, 3] {
        let many = Calculator::new(calculator().potential().clone()).rotations(rotations);
        let (at, error) = many.energies_forces_at(&atoms).expect_err("a flat cell");
        assert!(at == Some(23) && error.to_string().contains("cell"), "{at:?}: {error}");
        let message = many.energies_forces(&atoms).expect_err("a flat cell").to_string();
        assert!(message.contains("frame 23"), "{message}");
    }
    // Where rounding has taken a position's place in the cell, there is no energy to tell.
    let far = [[0.0, 0.0, 1e300], [0.0, 0.0, 2.5]];
    let message =
        calculator().energy_forces(&far, &[29, 29], Some(Cell::cuboid([8.0; 3]))).expect_err("far away");
    assert!(message.to_string().contains("more than 1e9 periods away"), "{message}");
}
