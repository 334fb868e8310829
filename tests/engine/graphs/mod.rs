//! Compares random programs with an interpreter on the host, and recorded steps of them with their code.
//!
//! The interpreter computes in f64 and shares no code with the library. The allowed error of a tensor is measured for each graph:
//! the program is interpreted five more times, with every number rounded to f32 after a random change (see `graphs/host.rs`). The
//! largest change of any of the tensor's elements, plus two roundoffs of the largest element, is its unit. A result may be off by
//! `UNITS` units.
//!
//! `TIEBEAM_GRAPHS=n` runs n graphs instead of a hundred, and `TIEBEAM_GRAPH_SEED=n` runs only that one.

mod engine;
mod expect;
mod generate;
mod host;
mod interpret;
mod program;
mod proposals;

use crate::support::{download, gpu, other_kernels, texel_gpu};
use expect::{Expected, Graph};
use host::{Fault, Tape};
use program::{Op, Program};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, OnceLock};
use tiebeam::{Gpu, Step, Tensor};

/// eps of normalisations.
pub const EPS: f32 = 1e-3;

/// Units that a result may be off: three times the worst of the first 3000 graphs, which is 3.3 (99% are below 1).
const UNITS: f64 = 10.0;

/// The seeds of the graphs to run: one if the environment names it, else the first `1 / share` of all.
fn seeds(share: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().map(|n| n.parse::<u64>().expect("a number"));
    match number("TIEBEAM_GRAPH_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("TIEBEAM_GRAPHS").unwrap_or(100) / share,
    }
}

/// A second device on the adapter. Two threads can then compile kernels at the same time.
fn second() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| Gpu::open().expect("the adapter opened before"))
}

/// Returns the device for a seed. Most graphs use the adapter's own kernels, and some the others.
fn device(seed: u64) -> &'static Gpu {
    match seed % 8 {
        3 => other_kernels(),
        7 => texel_gpu(),
        1 | 5 => second(),
        _ => gpu(),
    }
}

/// Runs `check` on the graphs, and prints the programs and seeds of those that fail.
fn each(share: u64, check: impl Fn(&Graph) -> Result<(), String> + Sync) {
    let failed = Mutex::new(Vec::new());
    let one = &|seed: u64| {
        let graph = generate::graph(seed);
        let result = catch_unwind(AssertUnwindSafe(|| check(&graph)));
        let result = result.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            Err(text.unwrap_or_else(|| "a panic".into()))
        });
        device(seed).take_fault();
        if let Err(why) = result {
            let mut failed = failed.lock().expect("no panic while held");
            failed.push(seed);
            if failed.len() <= 5 {
                eprintln!("{}  {why}\n", graph.program);
            }
        }
    };
    std::thread::scope(|scope| {
        for half in 0..2 {
            scope.spawn(move || seeds(share).filter(|seed| seed % 2 == half).for_each(one));
        }
    });
    let failed = failed.into_inner().expect("the threads are done");
    assert!(failed.is_empty(), "graphs {failed:?} of {:?} fail on {}", seeds(share), gpu().adapter().name);
}

/// Returns every tensor that a run returns, with its name, its elements and its expected value.
fn compared<'a>(graph: &'a Graph, run: &engine::Outcome) -> Vec<(String, Vec<f64>, &'a Expected)> {
    let mut all = vec![("loss".to_string(), download(&run.loss), &graph.loss)];
    all.extend(run.held.iter().map(|(i, x)| (format!("%{i}"), download(x), &graph.values[*i])));
    for (i, dx) in &run.grads {
        let want = graph.grads[*i].as_ref().expect("the host has no gradient of this leaf");
        all.push((format!("the gradient of %{i}"), download(dx), want));
    }
    all
}

/// Compares a run with the expected results. Returns the worst error in units.
fn agree(graph: &Graph, run: &engine::Outcome) -> Result<f64, String> {
    let count = graph.grads.iter().flatten().count();
    if run.grads.len() != count {
        return Err(format!("{} leaves have gradients, not {count}", run.grads.len()));
    }
    let mut worst = 0.0;
    for (name, got, want) in compared(graph, run) {
        let off = want.off(&got);
        if off > UNITS {
            let error = |i: &usize| (got[*i] - want.value[*i]).abs();
            let at = (0..got.len()).max_by(|a, b| error(a).total_cmp(&error(b))).unwrap_or(0);
            let (g, w) = (got.get(at), want.value[at]);
            return Err(format!(
                "{name} is {off:.1} units of {:.2e} off: element {at} is {g:?}, want {w}",
                want.unit
            ));
        }
        worst = off.max(worst);
    }
    Ok(worst)
}

fn run(graph: &Graph, gpu: &Gpu) -> Result<engine::Outcome, String> {
    let program = &graph.program;
    let constants = engine::constants(gpu, program);
    let leaves = engine::leaves(gpu, program, |_, data| data.to_vec());
    engine::run(program, &constants, &leaves).map_err(|e| e.to_string())
}

#[test]
fn graphs_agree_with_f64() {
    let worst = Mutex::new(Vec::new());
    each(1, |graph| {
        let off = agree(graph, &run(graph, device(graph.program.seed))?)?;
        worst.lock().expect("no panic while held").push((off, graph.program.seed));
        Ok(())
    });
    let mut worst = worst.into_inner().expect("the threads are done");
    worst.sort_by(|a, b| b.0.total_cmp(&a.0));
    println!(
        "{} graphs; the worst, in units, and their seeds: {:.2?}",
        worst.len(),
        &worst[..worst.len().min(10)]
    );
}

/// Returns all results of a run, each in its own memory, as a recorded step does.
fn settled(graph: &Graph, constants: &engine::Constants, leaves: &[Tensor]) -> tiebeam::Result<Vec<Tensor>> {
    let run = engine::run(&graph.program, constants, leaves)?;
    let all = [run.loss].into_iter().chain(run.held.into_iter().chain(run.grads).map(|(_, x)| x));
    let all: Vec<Tensor> = all.map(|x| x.detach().contiguous()).collect();
    all.iter().for_each(Tensor::evaluate);
    Ok(all)
}

fn bits(all: &[Tensor]) -> Vec<Vec<u64>> {
    all.iter().map(|x| download(x).into_iter().map(f64::to_bits).collect()).collect()
}

fn same(what: &str, got: &[Tensor], want: &[Vec<u64>]) -> Result<(), String> {
    match bits(got).iter().zip(want).position(|(got, want)| got != want) {
        Some(i) => Err(format!("{what}: result {i} of {} (0 is the loss) has other bits", want.len())),
        None => Ok(()),
    }
}

/// Returns other elements of about the same size.
fn moved(i: usize, data: &[f64]) -> Vec<f64> {
    let factor = |e: usize| 1.0 + 0.04 * ((e * 7 + i * 3) as f64).sin();
    data.iter().enumerate().map(|(e, v)| v * factor(e)).collect()
}

#[test]
fn replays_agree_with_eager() {
    each(3, |graph| {
        let gpu = device(graph.program.seed);
        let constants = engine::constants(gpu, &graph.program);
        let first = engine::leaves(gpu, &graph.program, |_, data| data.to_vec());
        let second = engine::leaves(gpu, &graph.program, moved);
        let eager = |leaves: &[Tensor]| settled(graph, &constants, leaves).map(|all| bits(&all));
        let text = |e: tiebeam::Error| e.to_string();
        let wants = [eager(&first).map_err(text)?, eager(&second).map_err(text)?];
        let inputs: [Vec<&Tensor>; 2] = [first.iter().collect(), second.iter().collect()];
        let mut step = Step::record(gpu, &inputs[0], |x| settled(graph, &constants, x)).map_err(text)?;
        same("the recorded run", step.outputs(), &wants[0])?;
        for i in [1, 0, 1] {
            same(&format!("a replay of inputs {i}"), step.run(&inputs[i]).map_err(text)?, &wants[i])?;
        }
        Ok(())
    });
}

/// An expression that is pending when a step is recorded is a constant for the step: replays use its value at that time, even if
/// its inputs change later.
#[test]
fn replays_keep_what_was_pending_outside() {
    each(4, |graph| {
        let (gpu, text) = (device(graph.program.seed), |e: tiebeam::Error| e.to_string());
        let constants = engine::constants(gpu, &graph.program);
        let first = engine::leaves(gpu, &graph.program, |_, data| data.to_vec());
        let second = engine::leaves(gpu, &graph.program, moved);
        // Every second leaf comes from outside the step, as the negative of another step's output.
        let (outside, inside): (Vec<usize>, Vec<usize>) = (0..first.len()).partition(|i| i % 2 == 0);
        let of =
            |all: &'_ [Tensor], which: &[usize]| which.iter().map(|&i| all[i].clone()).collect::<Vec<_>>();
        let negated = |x: &[Tensor]| Ok(x.iter().map(Tensor::neg).collect());
        let bases = of(&first, &outside);
        let mut source = Step::record(gpu, &bases.iter().collect::<Vec<_>>(), negated).map_err(text)?;
        let pending: Vec<Tensor> = source.outputs().iter().map(Tensor::neg).collect();
        let woven = |inputs: &[Tensor], outer: &[Tensor]| -> Vec<Tensor> {
            (0..inputs.len() + outer.len())
                .map(|i| if i % 2 == 0 { &outer[i / 2] } else { &inputs[i / 2] })
                .cloned()
                .collect()
        };
        let [a, b] = [of(&first, &inside), of(&second, &inside)];
        let eager =
            |inputs: &[Tensor]| settled(graph, &constants, &woven(inputs, &bases)).map(|all| bits(&all));
        let wants = [eager(&a).map_err(text)?, eager(&b).map_err(text)?];
        let mut step = Step::record(gpu, &a.iter().collect::<Vec<_>>(), |x| {
            settled(graph, &constants, &woven(x, &pending))
        })
        .map_err(text)?;
        same("the recorded run", step.outputs(), &wants[0])?;
        // In some graphs the pending values are dropped now, in others they are still held.
        let _held = (graph.program.seed % 2 == 0).then_some(pending);
        for (inputs, want) in [(&b, &wants[1]), (&a, &wants[0])] {
            source.run(&of(&second, &outside).iter().collect::<Vec<_>>()).map_err(text)?;
            same("a replay", step.run(&inputs.iter().collect::<Vec<_>>()).map_err(text)?, want)?;
        }
        Ok(())
    });
}

/// Returns the host's results with a fault or with new noise, each with its name and its expected value.
fn interpreted<'a>(
    graph: &'a Graph,
    program: &Program,
    noise: Option<u64>,
    fault: Option<Fault>,
) -> Vec<(String, Option<Vec<f64>>, &'a Expected)> {
    let mut tape = Tape::new(noise);
    tape.fault = fault;
    let (vars, loss) = interpret::program(&mut tape, program);
    let grads = tape.backward(loss);
    let mut all = vec![("loss".into(), Some(tape.value(loss).to_vec()), &graph.loss)];
    for (i, line) in program.lines.iter().enumerate() {
        if line.held {
            all.push((format!("%{i}"), Some(tape.value(vars[i]).to_vec()), &graph.values[i]));
        }
        if let Some(want) = &graph.grads[i] {
            all.push((format!("the gradient of %{i}"), grads[vars[i]].clone(), want));
        }
    }
    all
}

/// Whether a fault is detected. `None` if it changes nothing that is compared.
fn seen(graph: &Graph, program: &Program, fault: Option<Fault>) -> Option<bool> {
    let all = interpreted(graph, program, None, fault);
    let off = |(_, got, want): &(_, Option<Vec<f64>>, &Expected)| {
        got.as_ref().map_or(f64::INFINITY, |got| want.off(got))
    };
    let most = all.iter().map(off).fold(0.0, f64::max);
    // Rounding in f64 does not count as a change, because some gradients are 0 apart from it.
    (most > 1e-6).then_some(most > UNITS)
}

#[test]
fn a_wrong_result_is_seen() {
    let (mut faults, mut missed) = (0, Vec::new());
    let mut count = |what: String, seen: Option<bool>| {
        faults += seen.is_some() as usize;
        missed.extend((seen == Some(false)).then_some(what));
    };
    for seed in 0..25 {
        let graph = generate::graph(seed);
        for noise in 0..4 {
            for (name, got, want) in interpreted(&graph, &graph.program, Some(seed + 977 * noise), None) {
                let off = want.off(&got.expect("a gradient"));
                assert!(off < UNITS, "rounding alone: {name} is {off:.1} units off\n{}", graph.program);
            }
        }
        // The faults are an omitted term, a gradient that is not propagated, and a view that begins one element late.
        for node in 0..graph.nodes {
            for fault in [Fault::Term(node), Fault::Gradient(node)] {
                count(format!("{fault:?} in graph {seed}"), seen(&graph, &graph.program, Some(fault)));
            }
        }
        for (i, line) in graph.program.lines.iter().enumerate() {
            if let Op::Slice(axis, start, end) = line.op
                && end < graph.program.lines[line.args[0]].shape[axis]
            {
                let mut wrong = graph.program.clone();
                wrong.lines[i].op = Op::Slice(axis, start + 1, end + 1);
                count(format!("a wrong start of %{i} in graph {seed}"), seen(&graph, &wrong, None));
            }
        }
    }
    println!("{} of {faults} faults are seen; missed: {missed:?}", faults - missed.len());
    assert!(
        faults > 1000 && missed.len() * 100 < faults,
        "{} of {faults} faults are missed: {missed:?}",
        missed.len()
    );
}
