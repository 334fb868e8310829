//! The exchanges of a world over MPI, on 1 to 4 ranks. Each test starts itself again under `mpirun`.

mod support;

use std::io::Write;
use std::sync::Arc;
use support::{mpirun, said};
use tiebeam::nn::{Init, Linear, Module};
use tiebeam::optim::{AdamW, AdamWConfig, Group};
use tiebeam::ranks::{Ranks, all_done, collect, share};
use tiebeam::train::Trainer;
use tiebeam::{Error, Gpu, Options, Rng, Tensor};
use tiebeam_mpi::World;

/// Set in the ranks.
const RANK: &str = "TIEBEAM_TEST_RANK";

/// Runs `work` on so many ranks. Returns what each has found, in their order.
fn on_ranks(test: &str, ranks: usize, work: impl FnOnce(Arc<World>) -> String) -> Vec<String> {
    if std::env::var_os(RANK).is_some() {
        let world = World::init().unwrap();
        let found = work(world.clone());
        // The ranks share a pipe, and what rank 0 prints at once stays together.
        let all = collect(&*world, found.into_bytes()).unwrap();
        let lines = all.iter().map(|bytes| format!("FOUND {}\n", String::from_utf8_lossy(bytes)));
        if world.rank() == 0 {
            let mut out = std::io::stdout();
            write!(out, "\n{}", lines.collect::<String>()).and_then(|()| out.flush()).unwrap();
        }
        // The rest of the test is the first process's. MPI ends with the world.
        drop(world);
        tiebeam::exit::at_once(0);
    }
    let mut command = mpirun();
    command.env(RANK, "1").arg("-n").arg(ranks.to_string()).arg(std::env::current_exe().unwrap());
    let output = command.args(["--exact", test, "--nocapture", "--test-threads", "1"]).output();
    let output = output.expect("mpirun starts; `make mpi` installs it");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{printed}{}", said(&output));
    let found: Vec<String> =
        printed.lines().filter_map(|line| line.strip_prefix("FOUND ")).map(String::from).collect();
    assert_eq!(found.len(), ranks, "{printed}");
    found
}

/// Numbers of a rank, of very different sizes, so that another order of sums has other bits.
fn numbers(rank: usize, n: usize) -> Vec<f32> {
    let one = |i: usize| {
        let word =
            (i as u64 * 2_654_435_761 + rank as u64 * 40_503).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        (word as f32 / 2f32.powi(31) - 1.0) * 2f32.powi((word % 41) as i32 - 20)
    };
    (0..n).map(one).collect()
}

fn sums(world: Arc<World>) -> String {
    let size = world.size();
    let mut other = 0;
    for n in [0, 1, 5, 255, 256, 257, 1000, 70_001] {
        let mut own = numbers(world.rank(), n);
        world.sum(&mut own).unwrap();
        let all: Vec<Vec<f32>> = (0..size).map(|rank| numbers(rank, n)).collect();
        let sum = |order: &mut dyn Iterator<Item = usize>, i: usize| {
            let first = order.next().expect("a rank");
            order.fold(all[first][i], |sum, rank| sum + all[rank][i])
        };
        for (i, own) in own.iter().enumerate() {
            let want = sum(&mut (0..size), i);
            assert_eq!(own.to_bits(), want.to_bits(), "{size} ranks, {n} numbers, number {i}");
            other += usize::from(sum(&mut (0..size).rev(), i).to_bits() != want.to_bits());
        }
    }
    assert!(size < 3 || other > 1000, "another order would be seen");
    "summed".into()
}

#[test]
fn sums_are_in_the_order_of_ranks() {
    for ranks in 1..=4 {
        let found = on_ranks("sums_are_in_the_order_of_ranks", ranks, sums);
        assert!(found.iter().all(|found| found == "summed"));
    }
}

fn messages(world: Arc<World>) -> String {
    let (rank, size) = (world.rank(), world.size());
    let bytes = |rank: usize, n: usize| (0..n).map(|i| (i * 7 + rank) as u8).collect::<Vec<u8>>();
    for n in [0, 1, 247, 248, 249, 3 << 20] {
        // Lengths differ between ranks.
        let all: Vec<Vec<u8>> = (0..size).map(|rank| bytes(rank, n + 100 * rank)).collect();
        assert!(world.gather(&all[rank]).unwrap() == all, "gather of {n}");
        let collected = collect(&*world, all[rank].clone()).unwrap();
        assert!(if rank == 0 { collected == all } else { collected.is_empty() }, "collect of {n}");
        let mut told = all[rank].clone();
        world.broadcast(&mut told).unwrap();
        assert!(told == all[0], "broadcast of {n}");
    }
    world.barrier();
    "told".into()
}

#[test]
fn messages_of_any_length_arrive() {
    for ranks in [1, 2, 4] {
        let found = on_ranks("messages_of_any_length_arrive", ranks, messages);
        assert!(found.iter().all(|found| found == "told"));
    }
}

/// Trains a network whose batches are shared. Returns a digest of the parameters, and the last loss.
fn trained(world: Arc<World>) -> String {
    let adapter = Gpu::adapter_of(world.local(), &Options::default()).unwrap();
    let gpu = Gpu::open_with(Options::default().adapter(Some(adapter.index.to_string()))).unwrap();
    let net = Linear::new(&gpu, 40, 30, true, Init::KaimingUniform, &mut Rng::new(1 + world.rank() as u64));
    let group = Group::new(net.parameters().trainable());
    let adamw = AdamW::new(&gpu, vec![group], AdamWConfig::default().lr(0.02).clip(Some(1.0))).unwrap();
    let mut trainer = Trainer::new(adamw).ranks(world.clone());
    trainer.share_state(&net).unwrap();
    let mut last = f32::NAN;
    let batch = |_, rng: &mut Rng| {
        let all = Tensor::randn(&gpu, [8, 40], rng);
        Ok(vec![all.slice(0, share(8, world.rank(), world.size())).contiguous()])
    };
    let loss = |inputs: &[Tensor], _: &mut Rng| Ok(net.forward(&inputs[0]).square().mean_all());
    let report = |report: &tiebeam::train::Report| {
        last = report.loss;
        Ok(())
    };
    assert!(trainer.train_recorded(20, batch, loss, report).unwrap());
    assert_eq!(trainer.differs(&net).unwrap(), None);
    let all = net.parameters();
    let mut digest = 0xcbf2_9ce4_8422_2325u64;
    for word in all.named().iter().flat_map(|(_, p)| p.to_vec::<f32>().unwrap()) {
        digest = (digest ^ u64::from(word.to_bits())).wrapping_mul(0x100_0000_01b3);
    }
    format!("{digest:016x} {last}")
}

#[test]
fn ranks_train_to_the_same_bits() {
    let name = "ranks_train_to_the_same_bits";
    let mut losses = Vec::new();
    for ranks in [1, 2, 4] {
        let found = on_ranks(name, ranks, trained);
        assert!(found.iter().all(|own| *own == found[0]), "{ranks} ranks: {found:?}");
        assert_eq!(on_ranks(name, ranks, trained), found, "again");
        losses.push(found[0].split(' ').nth(1).unwrap().parse::<f32>().unwrap());
    }
    for loss in &losses {
        assert!((loss - losses[0]).abs() < 1e-5, "{losses:?}");
    }
}

/// Runs a program by [`tiebeam_mpi::run`] on three ranks. Returns what all have said.
fn ended(test: &str, work: impl FnOnce(Arc<World>) -> tiebeam::Result<()>) -> String {
    if std::env::var_os(RANK).is_some() {
        let status = tiebeam_mpi::run(work);
        // The rest of the test is the first process's.
        tiebeam::exit::at_once(i32::from(status != std::process::ExitCode::SUCCESS));
    }
    let mut command = mpirun();
    command.env(RANK, "1").args(["-n", "3"]).arg(std::env::current_exe().unwrap());
    let output = command.args(["--exact", test, "--nocapture", "--test-threads", "1"]).output().unwrap();
    assert!(!output.status.success(), "{}", said(&output));
    said(&output)
}

/// A rank that returns would else wait in MPI's last call for the others, which wait for it.
#[test]
fn an_error_that_one_rank_knows_of_ends_all() {
    let told = ended("an_error_that_one_rank_knows_of_ends_all", |world| {
        if world.rank() == 1 {
            return Err(Error::config("the disk is full"));
        }
        world.barrier();
        Ok(())
    });
    assert_eq!(told.matches("error: rank 1: the disk is full").count(), 1, "{told}");
}

#[test]
fn an_error_that_all_know_of_is_said_once() {
    let told = ended("an_error_that_all_know_of_is_said_once", |world| {
        let own = if world.rank() == 1 { Err(Error::config("no such file")) } else { Ok(()) };
        all_done(&*world, own)
    });
    assert_eq!(told.matches("error: ").count(), 1, "{told}");
    assert!(told.contains("error: rank 1: no such file\n"), "{told}");
}
