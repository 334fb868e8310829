//! The loop over the rows: a row that fails is told, and the next one runs.

use super::{Ceiling, Ceilings, Entry, Failed, Host, Record, Row, Run, caught, measure};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::tape::no_grad;
use crate::tensor::Tensor;
use std::time::Duration;

/// How a run is made.
pub struct Settings {
    /// Time for the samples of a row.
    pub budget: Duration,
    /// Ceilings known beforehand; measured first where there are none.
    pub ceilings: Option<Ceilings>,
    /// Checks more elements of every op's result, and checks them again after timing.
    pub check: bool,
    /// Opens the device again when it was lost.
    pub reopen: Box<dyn Fn() -> Result<Gpu>>,
}

impl Settings {
    /// Measures the ceilings, and opens no lost device again.
    pub fn new(budget: Duration) -> Settings {
        let reopen = || Err(Error::device("the device was lost; run the benchmark again"));
        Settings { budget, ceilings: None, check: false, reopen: Box::new(reopen) }
    }
}

/// What happened, as a run goes on.
#[non_exhaustive]
pub enum Event<'a> {
    /// Where it takes place; the first.
    Host(&'a Host),
    /// A ceiling was measured, or could not be.
    Measured(Ceiling, Option<&'a Error>),
    /// All ceilings, before the rows and again whenever one was raised.
    Ceilings(&'a Ceilings),
    /// A row's turn came.
    Turn(&'a str),
    /// It is right and has a time.
    Row(&'a Record),
    /// It has none.
    Failed(&'a Failed),
    /// The device was lost; whether it could be opened again.
    Lost(Result<(), &'a Error>),
}

/// Goes through `entries`; `each` hears of everything as it happens.
///
/// A row above its ceiling has that ceiling measured again. Fractions in what is returned are of the ceilings at the end; those
/// that `each` heard are of the ceilings at the time.
///
/// # Errors
/// Only what `each` returns, such as a file that takes no more lines: rows that fail are part of the result.
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

/// Makes a row, checks it, times it, and measures its ceiling again where it is above. The outer error is `each`'s.
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

/// Checks and times a row. The record has no name yet.
///
/// # Errors
/// [`Row::check`]'s, the device's, or that a timed call found no memory.
pub fn time(gpu: &Gpu, row: &Row, ceilings: &Ceilings, budget: Duration) -> Result<Record> {
    let first = row.check(gpu)?;
    let mut done = Ok(());
    let stats = measure(gpu, budget, |i| {
        let y = (row.run)(i % row.sets);
        let y = no_grad(|| y.contiguous());
        y.evaluate();
        // A call that was skipped took no time.
        done = std::mem::replace(&mut done, Ok(())).and(y.check());
    })?;
    done?;
    Ok(Record::new(row, ceilings, first, stats))
}

/// A device that computes: this one without its fault, else opened again.
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

/// Whether the device still does anything.
fn computes(gpu: &Gpu) -> Result<()> {
    let got: f32 = Tensor::ones(gpu, [1]).affine(2.0, 1.0).item()?;
    if got == 3.0 { Ok(()) } else { Err(Error::device(format!("2 + 1 is {got} on this device"))) }
}

impl Gpu {
    /// Loses the device, as a driver's reset does: for tests of what is done then.
    #[doc(hidden)]
    pub fn lose(&self) {
        self.0.device.destroy();
    }
}
