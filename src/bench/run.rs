//! The loop over the rows. If a row fails, the failure is reported and the next row runs.

use super::{Ceiling, Ceilings, Entry, Failed, Host, Record, Row, Run, caught, measure};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::time::Duration;

/// The settings of a run.
pub struct Settings {
    /// The time for the samples of one row.
    pub budget: Duration,
    /// Ceilings that are already known. If `None`, they are measured first.
    pub ceilings: Option<Ceilings>,
    /// Whether more elements of every op's result are checked, and checked again after timing.
    pub check: bool,
    /// Opens the device again after it was lost.
    pub reopen: Box<dyn Fn() -> Result<Gpu>>,
}

impl Settings {
    /// Settings of a run that measures the ceilings and does not reopen a lost device.
    pub fn new(budget: Duration) -> Settings {
        let reopen = || Err(Error::Lost { message: "run the benchmark again".into() });
        Settings { budget, ceilings: None, check: false, reopen: Box::new(reopen) }
    }
}

/// An event of a run, reported when it happens.
#[non_exhaustive]
pub enum Event<'a> {
    /// The machine and its device. This is the first event.
    Host(&'a Host),
    /// A ceiling was measured, or failed with this error.
    Measured(Ceiling, Option<&'a Error>),
    /// All ceilings: once before the rows, and again after one was measured again.
    Ceilings(&'a Ceilings),
    /// The row of this name begins.
    Turn(&'a str),
    /// The row's result is right, and this is its time.
    Row(&'a Record),
    /// The row failed.
    Failed(&'a Failed),
    /// The device was lost, and either opened again or not, with this error.
    Lost(Result<(), &'a Error>),
}

/// Measures all `entries`, and calls `each` with every event as it happens.
///
/// If a row is above its ceiling, that ceiling is measured again. Fractions in the result refer to the final ceilings. Those in
/// events refer to the ceilings at that time.
///
/// # Errors
/// Only the errors of `each`, for example if it cannot write to a file. Rows that fail are part of the result.
pub fn run(
    gpu: Gpu,
    entries: Vec<Entry>,
    settings: &Settings,
    each: &mut dyn FnMut(Event) -> Result<()>,
) -> Result<Run> {
    let host = Host::new(&gpu);
    each(Event::Host(&host))?;
    let ceilings = match settings.ceilings {
        Some(ceilings) => ceilings,
        None => {
            let mut told = Ok(());
            let found = Ceilings::measure(&gpu, |which, error| {
                let told_now = each(Event::Measured(which, error.as_ref()));
                told = std::mem::replace(&mut told, Ok(())).and(told_now);
            });
            told?;
            found
        }
    };
    each(Event::Ceilings(&ceilings))?;
    let mut run = Run { host, ceilings, records: Vec::new(), failed: Vec::new() };
    let mut device = Ok(gpu);
    for entry in entries {
        let (name, family, shape) = (entry.name(), entry.family.to_string(), entry.shape.clone());
        each(Event::Turn(&name))?;
        let result = match &device {
            Ok(gpu) => turn(gpu, entry, &mut run.ceilings, settings, each)?.map_err(|e| e.to_string()),
            Err(error) => Err(format!("not run: {error}")),
        };
        match result {
            Ok(record) => {
                each(Event::Row(&record))?;
                run.records.push(record);
            }
            Err(error) => {
                let failed = Failed { family, shape, error };
                each(Event::Failed(&failed))?;
                run.failed.push(failed);
                device = recover(device, settings, each)?;
            }
        }
    }
    run.records.iter_mut().for_each(|record| record.hold(&run.ceilings));
    Ok(run)
}

/// Makes a row, checks it and times it. If the row is above its ceiling, measures that again. The outer error is from `each`, the
/// inner one from the row.
fn turn(
    gpu: &Gpu,
    entry: Entry,
    ceilings: &mut Ceilings,
    settings: &Settings,
    each: &mut dyn FnMut(Event) -> Result<()>,
) -> Result<Result<Record>> {
    let (family, shape) = (entry.family, entry.shape);
    let timed = caught(|| {
        let row = (entry.make)(gpu, settings.check)?;
        let record = time(gpu, &row, ceilings, settings.budget)?;
        if settings.check {
            row.check_again(gpu)?;
        }
        Ok(record)
    });
    let mut record = match timed {
        Ok(record) => Record { family: family.into(), shape, ..record },
        Err(error) => return Ok(Err(error)),
    };
    gpu.trim();
    let above = Ceiling::ALL.into_iter().find(|c| record.is_above() && c.name() == record.ceiling);
    if let Some(which) = above {
        let error = caught(|| ceilings.update(gpu, which)).err();
        if error.is_some() {
            gpu.take_fault();
        }
        each(Event::Measured(which, error.as_ref()))?;
        each(Event::Ceilings(ceilings))?;
        gpu.trim();
        record.hold(ceilings);
    }
    Ok(Ok(record))
}

/// Checks and times a row. The record's family and shape are empty.
///
/// # Errors
/// As [`Row::check`]; the device's fault; when a timed call does not find enough memory.
pub fn time(gpu: &Gpu, row: &Row, ceilings: &Ceilings, budget: Duration) -> Result<Record> {
    let first = row.check(gpu)?;
    let mut done = Ok(());
    let stats = measure(gpu, budget, |i| {
        let y = (row.run)(i % row.sets);
        let y = no_grad(|| y.contiguous());
        y.evaluate();
        // A skipped call would have taken no time.
        done = std::mem::replace(&mut done, Ok(())).and(y.check());
    })?;
    done?;
    Ok(Record::new(row, ceilings, first, stats))
}

/// Returns a device that works after a row failed: this one with its fault cleared, or else a reopened one.
fn recover(
    device: Result<Gpu>,
    settings: &Settings,
    each: &mut dyn FnMut(Event) -> Result<()>,
) -> Result<Result<Gpu>> {
    let Ok(gpu) = device else { return Ok(device) };
    gpu.take_fault();
    gpu.trim();
    if caught(|| computes(&gpu)).is_ok() {
        return Ok(Ok(gpu));
    }
    drop(gpu);
    let opened = caught(|| {
        let gpu = (settings.reopen)()?;
        computes(&gpu)?;
        Ok(gpu)
    });
    each(Event::Lost(opened.as_ref().map(|_| ())))?;
    Ok(opened)
}

/// Checks that the device still computes.
fn computes(gpu: &Gpu) -> Result<()> {
    let got: f32 = Tensor::ones(gpu, [1]).affine(2.0, 1.0).item()?;
    if got == 3.0 { Ok(()) } else { Err(Error::device(format!("2 + 1 is {got} on this device"))) }
}

impl Gpu {
    /// Loses the device, as a driver's reset would, so that tests can see what a run of the benchmark does then.
    pub fn lose(&self) {
        self.0.device.destroy();
    }
}
